"""Partial fine-tuning in complete runs: cached or computed each time, interrupted, unfrozen gradually."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import UNVERIFIED, folder_of, run, stop_at, weights
from safetensors.torch import load_file

from hfstrat.errors import UserError

PARTIAL = "last_n_layers: 1"
RUN = ("training.max_steps=24", "training.eval_steps=6", "training.logging_steps=6", "evaluation.samples=0")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs without the reload in a fresh process, and with a cache of their own."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))


def runs(recipe: Any, folder: Path, section: str, *overrides: str) -> Any:
    return recipe(f"strategy={{name: partial, {section}}}", *RUN, f"output_dir={folder}", *overrides)


@pytest.fixture
def short(tmp_path: Path) -> str:
    """Examples of one width, so that every batch has the same shape."""
    rows = [{"text": "the cat sat on the mat " * (3 + number % 2) + f"{number}"} for number in range(60)]
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data={{train: {file}, eval_size: 12, max_length: 30, train_on: all}}"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_computed_once_equals_computed_each_time_bit_for_bit(
    recipe: Any, tmp_path: Path, short: str, quick: None, dtype: str, seed: int
) -> None:
    found = []
    for wish in ("true", "false"):
        loaded = runs(recipe, tmp_path / wish, f"{PARTIAL}, precompute: {wish}", short, f"model.dtype={dtype}", f"seed={seed}")
        found.append((run(loaded), weights(folder_of(loaded))))
    (once, ours), (each, theirs) = found
    assert once["result"]["precomputed"]["blocks"] == [3, 4]
    assert "precomputed" not in each["result"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert once["result"]["losses"] == each["result"]["losses"]
    assert once["result"]["metrics_after"] == each["result"]["metrics_after"]
    assert sorted(p.name for p in (tmp_path / "true" / "final").iterdir()) == sorted(
        p.name for p in (tmp_path / "false" / "final").iterdir()
    )
    assert (tmp_path / "true" / "final" / "config.json").read_text() == (
        tmp_path / "false" / "final" / "config.json"
    ).read_text()


@pytest.mark.slow
def test_with_rows_of_all_widths_it_is_the_same_but_for_rounding(recipe: Any, tmp_path: Path, quick: None) -> None:
    found = []
    for wish in ("true", "false"):
        loaded = runs(recipe, tmp_path / wish, f"{PARTIAL}, precompute: {wish}", "model.dtype=float32")
        found.append((run(loaded), weights(folder_of(loaded))))
    for name, tensor in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], tensor, rtol=1e-4, atol=1e-4)
    after = [report["result"]["metrics_after"]["loss"] for report, _ in found]
    assert after[0] == pytest.approx(after[1], abs=1e-5)


@pytest.mark.slow
def test_packed_or_not_computed_once_or_not_it_is_one_run(recipe: Any, tmp_path: Path, quick: None) -> None:
    """And packed and unpacked runs share what was computed."""
    curves, weighed, built = {}, {}, {}
    for packing, wish in (("true", "true"), ("false", "true"), ("true", "false"), ("false", "false")):
        loaded = runs(
            recipe, tmp_path / f"{packing}-{wish}", f"{PARTIAL}, precompute: {wish}", f"training.packing={packing}",
            "training.train_sampling_strategy=random", "model.dtype=float32", "data.max_length=64",
        )  # fmt: skip
        report = run(loaded)["result"]
        assert (report["plan"]["bins"] is not None) == (packing == "true")
        assert ("precomputed" in report) == (wish == "true")
        curves[packing, wish] = [entry["loss"] for entry in report["losses"]] + [report["metrics_after"]["loss"]]
        weighed[packing, wish] = weights(folder_of(loaded))
        built[packing, wish] = report["precomputed"]["built"] if wish == "true" else None
    for way in curves:
        assert curves[way] == pytest.approx(curves["false", "false"], rel=1e-5)
        for name, tensor in weighed["false", "false"].items():
            torch.testing.assert_close(weighed[way][name], tensor, rtol=1e-4, atol=1e-4)
    assert built["true", "true"] == ["train", "eval"]
    assert built["false", "true"] == []


@pytest.mark.parametrize(
    ("section", "packing"),
    [
        (f"{PARTIAL}, precompute: true", "false"),
        pytest.param(f"{PARTIAL}, precompute: true", "true", marks=pytest.mark.slow),
        pytest.param(
            "last_n_layers: 2, head: true, gradual_unfreezing: {every: 5}, layer_decay: 0.5, precompute: true",
            "false",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["precomputed", "precomputed and packed", "thawed"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, section: str, packing: str
) -> None:
    more = ("training.weight_decay=0.1", "data.max_length=64", f"training.packing={packing}")
    whole = runs(recipe, tmp_path / "whole", section, *more)
    first = run(whole)
    assert first["result"]["precomputed"]["built"] == ["train", "eval"]
    broken = runs(recipe, tmp_path / "broken", section, *more)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    again = run(broken)
    assert again["result"]["resumed_from"].endswith("checkpoint-6")
    assert again["result"]["precomputed"]["built"] == []
    for name, tensor in weights(folder_of(broken)).items():
        assert torch.equal(tensor, weights(folder_of(whole))[name]), name


def test_the_artefact_is_loaded_by_plain_transformers(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    report = run(runs(recipe, tmp_path / "run", f"{PARTIAL}, precompute: true"))
    assert report["result"]["verified"]["bit_equal"]
    facts = json.loads((tmp_path / "run" / "report.json").read_text())["result"]["precomputed"]
    assert facts["bytes"] > 0
    assert facts["rows"]["eval"] >= 12


def test_what_is_frozen_does_not_move_until_it_is_thawed(
    recipe: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Weight decay included; after its turn each has moved; and each block has the learning rate of its depth."""
    from hfstrat.trainer.trainer import StrategyTrainer

    before = load_file(tiny / "model.safetensors")
    moved: dict[str, int] = {}
    rates: dict[int, dict[str, float]] = {}
    original = StrategyTrainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in model.named_parameters():
            if name not in moved and not torch.equal(parameter.detach().float(), before[name].to(parameter.dtype).float()):
                moved[name] = self.state.global_step
        names = {id(p): name for name, p in model.named_parameters()}
        rates[self.state.global_step] = {
            names[id(p)]: group["lr"] for group in self.optimizer.param_groups for p in group["params"]
        }
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(StrategyTrainer, "training_step", training_step)
    section = "last_n_layers: 2, head: true, embeddings: true, gradual_unfreezing: {every: 5}, layer_decay: 0.5"
    settings = ("training.weight_decay=0.5", "training.lr_scheduler_type=constant", "training.warmup_steps=0")
    report = run(runs(recipe, tmp_path / "run", section, *settings, "model.dtype=float32"))
    turns = {"lm_head": 1, "model.norm": 1, "model.layers.3": 6, "model.layers.2": 11, "model.embed": 16}
    for name in before:
        expected = next((step for start, step in turns.items() if name.startswith(start)), None)
        assert moved.get(name) == expected, name
    assert report["result"]["trainable_parameters"] == sum(t.numel() for n, t in before.items() if n.startswith(tuple(turns)))
    shares = {"lm_head": 1.0, "model.norm": 1.0, "model.layers.3": 0.5, "model.layers.2": 0.25, "model.embed": 0.5**5}
    for name, rate in rates[20].items():
        share = next(share for start, share in shares.items() if name.startswith(start))
        assert rate == pytest.approx(1e-2 * share), name


def test_a_norm_alone_is_no_stage() -> None:
    from hfstrat.models.parameter_names import stages

    shapes = {
        "model.norm.weight": (4,),
        "model.layers.3.w": (4, 4),
        "model.layers.2.w": (4, 4),
        "model.embed_tokens.weight": (9, 4),
    }
    assert stages(shapes, 4) == [
        {"model.norm.weight", "model.layers.3.w"},
        {"model.layers.2.w"},
        {"model.embed_tokens.weight"},
    ]


@pytest.mark.parametrize(
    ("section", "more", "words"),
    [
        (
            "last_n_layers: 3, gradual_unfreezing: {every: 0.6}",
            (),
            r"0.6 \(14 steps\) is too long for 4 parts in a run of 24 .*at most 7",
        ),
        ("last_n_layers: 3, gradual_unfreezing: {every: 8}", (), r"8 \(8 steps\) is too long"),
        ("last_n_layers: 2, gradual_unfreezing: {every: 0.2}", ("training={max_time: 60s}",), "give whole steps"),
        ("head: true, embeddings: true, precompute: true", (), "precompute: true, but the input embeddings are trained"),
        ("head: true, embeddings: true, frozen_dropout: false", (), "frozen_dropout: false: the input embeddings are trained"),
    ],
    ids=["a share too long", "steps too long", "a share of a time", "nothing frozen", "nothing frozen to keep still"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    recipe: Any, tmp_path: Path, quick: None, section: str, more: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(runs(recipe, tmp_path / "run", section, *more))
    assert not (tmp_path / "run").exists()
