"""A student that is trained on its own answers, by TRL's trainer inside ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distillation import divergence_of
from helpers.runs import run
from safetensors.torch import load_file

from hfstrat.errors import UserError
from hfstrat.strategies.distill.on_policy import RepeatSampler


@pytest.fixture
def distil(recipe: Any, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`distil("divergence: jsd", "a=b", name=...)` runs a small recipe; returns the report's result and the trainer."""
    import hfstrat.run.train as page

    seen: dict[str, Any] = {}
    save = page.save

    def watched(job: Any) -> Path:
        seen["trainer"] = job.trainer
        return save(job)

    monkeypatch.setattr(page, "save", watched)
    monkeypatch.setattr("hfstrat.strategies.distill.report.speed_of", lambda *args: 1.0)

    def start(
        more: str = "divergence: reverse_kl", *settings: str, name: str = "run", student: str = "full", quick: bool = True
    ) -> Any:
        if quick:
            monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
        section = f"teacher: {models(tied=True)}, student: {student}, on_policy: true, max_new_tokens: 6, {more}"
        words = [f"strategy={{name: distill, {section}}}", "model.dtype=float32", f"output_dir={tmp_path / name}"]
        report = run(recipe(*words, "training.learning_rate=1e-3", *settings))
        assert report is not None
        return {**report["result"], **seen}

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def test_a_run_comes_nearer_to_its_teacher_and_reloads(
    distil: Any, models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = distil("divergence: reverse_kl", "training.max_steps=8", "training.eval_steps=4", quick=False)
    assert result["verified"]["bit_equal"]
    assert result["metrics_after"]["teacher_kl"] < result["metrics_before"]["teacher_kl"]
    assert result["losses"][-1]["loss"] < result["losses"][0]["loss"]
    assert weights(tmp_path / "run").keys() == load_file(models() / "model.safetensors").keys()
    stock = load_file(models(tied=True) / "model.safetensors")
    taught = dict(result["trainer"].teacher_model.named_parameters())
    assert all(torch.equal(taught[name], tensor) for name, tensor in stock.items())
    said = capsys.readouterr().out
    assert "on-policy with TRL's DistillationTrainer" in said
    assert "the answers of the student change in every step" in said
    assert "only the prompts of the data are used" in said
    assert 0 < result["tokens"] == result["trainer"].state.num_input_tokens_seen
    assert any("not run: on_policy has no loss" in line for line in result["comparison"]["lines"])
    cards = [file.read_text(encoding="utf-8") for file in tmp_path.rglob("README.md")]
    assert all("hfstrat" in card for card in cards)  # and no card of TRL's


def test_equal_splits_take_the_same_step(distil: Any, tmp_path: Path) -> None:
    """The answers to all prompts of a step are sampled at once, however it is split afterwards."""
    runs = []
    for size in (8, 2):
        result = distil(
            "divergence: jsd", "training.max_steps=1", f"training.per_device_train_batch_size={size}", name=f"by-{size}"
        )
        runs.append((result["losses"][0]["loss"], weights(tmp_path / f"by-{size}")))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("student", ["{name: partial, last_n_layers: 1}", "{name: lora, r: 2}"], ids=["partial", "lora"])
@pytest.mark.slow
def test_frozen_weights_may_be_of_16_bits(distil: Any, student: str) -> None:
    result = distil("divergence: reverse_kl", "model.dtype=bfloat16", "training.max_steps=2", student=student)
    assert all(0 < entry["loss"] < 10 for entry in result["losses"])


@pytest.mark.slow
def test_resumed_is_uninterrupted(distil: Any, tmp_path: Path) -> None:
    distil("divergence: forward_kl", "training.save_total_limit=5", name="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "half" / name)
    (tmp_path / "half" / "report.json").unlink()
    again = distil("divergence: forward_kl", "training.save_total_limit=5", name="half")
    assert again["resumed_from"].endswith("checkpoint-2")
    before = json.loads((tmp_path / "whole" / "checkpoint-2" / "trainer_state.json").read_text())["num_input_tokens_seen"]
    assert 0 < again["tokens"] == again["trainer"].state.num_input_tokens_seen - before
    ours, theirs = weights(tmp_path / "half"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_its_loss_is_the_named_divergence(distil: Any) -> None:
    """On given answers, at temperature 2, against autograd through the logits of both."""
    trainer = distil("divergence: jsd, temperature: 2.0", "training.max_steps=1", student="{name: lora, r: 2}")["trainer"]
    model, teacher = trainer.model.train(), trainer.teacher_model
    source = torch.Generator().manual_seed(0)
    prompt, answer = (torch.randint(5, 300, shape, generator=source) for shape in ((3, 4), (3, 5)))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    inputs = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": answer, "completion_mask": mask}
    ids, seen = torch.cat([prompt, answer], 1), torch.cat([torch.ones_like(prompt), mask], 1)
    p, q = (
        (one(input_ids=ids, attention_mask=seen).logits[:, 3:-1][mask.bool()].float() / 2.0).softmax(-1)
        for one in (teacher, model)
    )
    for name, beta in (("forward_kl", 0.0), ("jsd", 0.5), ("reverse_kl", 1.0)):
        trainer.beta = beta
        found = trainer.compute_loss(model, {**inputs, "num_items_in_batch": mask.sum()})
        assert float(found) == pytest.approx(float(divergence_of(name, p, q, 0.0).sum() / mask.sum()), rel=1e-3), name


def test_rows_come_again_for_each_part_of_a_step() -> None:
    again = RepeatSampler(range(8), 4, 2)
    assert list(again) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert len(again) == 16


def test_vocabularies_of_two_sizes_are_refused_before_anything_is_loaded(
    distil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfstrat.trainer.distributed.join_world", None)
    tiny = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 330}"
    with pytest.raises(UserError, match=r"strategy\.on_policy: the student has 330 tokens and the teacher \d+"):
        distil("divergence: jsd", "model={dtype: float32}", student=f"{{name: scratch, config: {tiny}}}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_learn_too(recipe: Any, models: Callable[..., Path], tmp_path: Path) -> None:
    """Each samples its own answers, so that losses are not those of one process."""
    from helpers.commands import hfstrat

    section = f"{{name: distill, teacher: {models(tied=True)}, student: full, on_policy: true, max_new_tokens: 6}}"
    words = [f"strategy={section}", "model.dtype=float32", "training.per_device_train_batch_size=2"]
    done = hfstrat("train", recipe().source, *words, "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())["result"]
    assert report["verified"]["bit_equal"]
    assert report["metrics_after"]["teacher_kl"] < report["metrics_before"]["teacher_kl"]
