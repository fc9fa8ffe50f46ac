"""Optimizers by their names in transformers, each of which trains or is refused with a reason; and Muon."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import sentences, write_jsonl
from helpers.runs import folder_of, run, stop_at, weights
from transformers import AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from hfstrat.errors import UserError
from hfstrat.recipe.foreign import VALUES
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Optimizer
from hfstrat.run import preflight
from hfstrat.run.setup import set_up
from hfstrat.trainer.distributed import join_world
from hfstrat.trainer.muon import Muon, hidden_matrices, make

NAMES = get_args(Optimizer)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, models: Callable[..., Path]) -> Callable[..., Any]:
    """A small run of the strategy full, with other settings."""
    folder = tmp_path_factory.mktemp("optimizers")
    pairs = zip(sentences(40), sentences(40, seed=1), strict=True)
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {models()}, dtype: float32}}\nstrategy: full\ndata: {{train: {rows}, eval_size: 8}}\n"
        "training: {max_steps: 4, global_batch_size: 4, per_device_train_batch_size: 2, learning_rate: 1e-2, eval_steps: 2}\n"
        "evaluation: {samples: 0, baselines: false, control: 'off'}\n"
    )
    return lambda output, *words: load_recipe(str(folder / "recipe.yaml"), [f"output_dir={output}", *words])


def test_every_name_of_transformers_is_offered_or_answered() -> None:
    answered = set(VALUES["training.optim"])
    theirs = {name.value for name in OptimizerNames}
    assert set(NAMES) <= theirs | {"muon"}
    assert theirs <= set(NAMES) | answered
    assert not answered & set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "adamw_torch_4bit")) for name in NAMES]
)
def test_each_optimizer_trains_or_names_its_package(recipe: Any, name: str, tmp_path: Path) -> None:
    loaded = recipe(tmp_path / "run", f"training.optim={name}")
    try:
        preflight.check(loaded)
    except UserError as error:
        module = str(error).partition(" needs ")[2].partition(":")[0]
        assert importlib.util.find_spec(module) is None
        pytest.skip(f"needs {module}")
    job = set_up(loaded, join_world(), overwrite=False)
    optimizer, model = job.trainer.create_optimizer(), job.trainer.model
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in updated} == {id(p) for p in model.parameters()}
    model(input_ids=torch.arange(8)[None], loss_rows=torch.arange(7), targets=torch.arange(1, 8)).loss.backward()
    before = [p.detach().clone() for p in updated]
    try:
        for _ in range(3):  # ademamix has no step at first
            optimizer.step()
    finally:
        job.lock.close()
    assert all(torch.isfinite(p).all() for p in updated)
    assert any(not torch.equal(old, new) for old, new in zip(before, updated, strict=True))


def test_optimizers_without_their_package_are_refused(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    missing = ("bitsandbytes", "torchao", "optimi", "grokadamw")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in missing else find(name, *args))
    for name, install in (
        ("adamw_bnb_8bit", r"'hfstrat\[quantization\]'"),
        ("paged_lion_32bit", r"'hfstrat\[quantization\]'"),
        ("rmsprop_bnb", r"'hfstrat\[quantization\]'"),
        ("adamw_torch_8bit", "torchao"),
        ("stable_adamw", "torch-optimi"),
        ("grokadamw", "grokadamw"),
    ):
        with pytest.raises(UserError, match=rf"training\.optim: {name} needs .*: pip install {install}$"):
            preflight.check(recipe(tmp_path / "run", f"training.optim={name}"))
    for name in ("adamw_torch_fused", "adafactor", "sgd", "muon"):
        preflight.check(recipe(tmp_path / "run", f"training.optim={name}"))


def test_a_step_of_muon_is_that_of_torch_and_the_rest_is_adamw(models: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float32)
    twin = copy.deepcopy(model)
    decayed = {name for name, p in model.named_parameters() if p.ndim == 2}
    ours = make(model, decayed, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    chosen = hidden_matrices(twin)
    names = {name for name, p in twin.named_parameters() if id(p) in chosen}
    assert names == {name for name, _ in twin.named_parameters() if "proj" in name}
    rest = [(name, p) for name, p in twin.named_parameters() if id(p) not in chosen]
    theirs = [
        torch.optim.Muon([p for p in twin.parameters() if id(p) in chosen], 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p], "weight_decay": 0.1 if name in decayed else 0.0} for name, p in rest],
            lr=0.01,
            betas=(0.9, 0.99),
            fused=True,
        ),
    ]
    ids = torch.arange(24).reshape(2, 12)
    for number in range(3):
        for one, optimizers in ((model, [ours]), (twin, theirs)):
            one(input_ids=ids + number, labels=ids + number).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for (name, here), there in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(here, there), name


def test_muon_is_restored_from_its_state(models: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float32)
    options: dict[str, Any] = {"decayed": set(), "lr": 0.01, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}
    first, ids = make(model, **options), torch.arange(12)[None]

    def step(one: Any, optimizer: Muon) -> None:
        optimizer.zero_grad()
        one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step(model, first)
    twin = copy.deepcopy(model)
    second = make(twin, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        step(model, first)
        step(twin, second)
    assert all(torch.equal(here, there) for here, there in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(UserError, match="muon updates matrices of hidden layers"):
        make(model.requires_grad_(False), **options)


@pytest.mark.slow
def test_a_resumed_run_with_muon_is_the_same(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (recipe(tmp_path / name, "training.optim=muon") for name in ("whole", "broken"))
    run(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    again = run(broken)
    assert again["result"]["resumed_from"].endswith("checkpoint-2")
    expected = weights(folder_of(whole))
    for name, tensor in weights(folder_of(broken)).items():
        assert torch.equal(tensor, expected[name]), name
