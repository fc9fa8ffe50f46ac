"""Classifiers of every family: which weights are trained, how many there are, and what a saved model predicts after loading."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.classifiers import ENCODERS, FAMILIES
from safetensors.torch import load_file, save_file

from hfstrat import strategies
from hfstrat.errors import UserError
from hfstrat.models.load import count_parameters, load_tokenizer, read_config, read_shapes, set_precision
from hfstrat.recipe.schema import Model, Recipe
from hfstrat.strategies.base import Strategy
from hfstrat.tasks import TASKS, artifact, verify
from hfstrat.tasks.loading import load_base

TASK = TASKS["text-classification"]
STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "partial": {"name": "partial", "last_n_layers": 1},
    "partial-head": {"name": "partial"},
    "lora": {"name": "lora", "r": 4},
    "dora": {"name": "lora", "r": 4, "use_dora": True},
}
DATA: Any = SimpleNamespace(label_names=("a", "b", "c"), many=False)


def built(folder: Path, strategy: dict[str, Any]) -> tuple[Any, Any, Strategy[Any]]:
    recipe = Recipe.model_validate(
        {"task": TASK.name, "model": str(folder), "strategy": strategy, "data": "x.jsonl", "output_dir": "x"}
    )
    torch.manual_seed(0)
    base = load_base(recipe.model, load_tokenizer(recipe.model), TASK, DATA)
    strategy = strategies.build(recipe.strategy)
    return strategy.build_model(base), base, strategy


def batch(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four rows of which one is padded, and their labels."""
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 2, 1])


def train(model: Any, steps: int = 2) -> dict[str, torch.Tensor]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, labels = batch()
    for _ in range(steps):
        optimiser.zero_grad()
        TASK.metrics.loss(model(**inputs), labels).backward()
        optimiser.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_learns_is_declared_counted_and_includes_the_head(bodies: Any, family: str, name: str) -> None:
    model, base, strategy = built(bodies(family), STRATEGIES[name])
    made = TASK.model.shapes(read_shapes(bodies(family)), read_config(Model(name_or_path=str(bodies(family)))) or {}, 3)
    assert made is not None
    assert strategy.describe(*made).footprint == count_parameters(model)
    set_precision(model, torch.float32)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = train(model)
    for key, parameter in model.named_parameters():
        moved = not torch.equal(before[key], parameter)
        assert moved == parameter.requires_grad, f"{key} moved: {moved}, declared: {parameter.requires_grad}"
        if parameter.requires_grad:
            assert gradients[key].isfinite().all()
    heads = [f"{module}." for module in base.head_modules]
    learning = [key for key, p in model.named_parameters() if p.requires_grad]
    assert heads
    assert all(any(head in key for key in learning) for head in heads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["full", "lora"])
def test_what_is_saved_says_the_same_when_loaded(bodies: Any, family: str, name: str, tmp_path: Path) -> None:
    model, base, _ = built(bodies(family), STRATEGIES[name])
    set_precision(model, torch.float32)
    train(model)
    model.save_pretrained(tmp_path / "saved")
    base.task.model.write_config(base, tmp_path / "saved")
    load_tokenizer(Model(name_or_path=str(bodies(family)))).save_pretrained(tmp_path / "saved")
    loaded = artifact.load_artifact(str(tmp_path / "saved"), torch.float32, {"task": TASK.name})
    inputs, _ = batch(seed=1)
    assert torch.equal(verify.probe_logits(loaded, inputs), verify.probe_logits(model, inputs))
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.config.pad_token_id is not None


@pytest.mark.parametrize("family", ENCODERS)
def test_the_head_of_pretraining_is_left_behind(bodies: Any, family: str) -> None:
    """A checkpoint with a masked-LM head: its body is used, the classification head is new."""
    model, _, strategy = built(bodies(family, "mlm"), {"name": "full"})
    folder = bodies(family, "mlm")
    made = TASK.model.shapes(read_shapes(folder), read_config(Model(name_or_path=str(folder))) or {}, 3)
    assert made is not None
    assert strategy.describe(*made).footprint == count_parameters(model)


def test_missing_weights_of_the_body_are_refused(bodies: Any, tmp_path: Path) -> None:
    folder = copytree(bodies("bert"), tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1.output" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for bert.encoder.layer.1.output"):
        built(folder, {"name": "full"})


def test_an_artefact_without_its_head_does_not_load(bodies: Any, tmp_path: Path) -> None:
    """The negative control: a re-initialized head is not accepted as the trained one."""
    for name, file in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        model, base, _ = built(bodies("bert"), STRATEGIES[name])
        folder = tmp_path / name
        model.save_pretrained(folder)
        base.task.model.write_config(base, folder)
        load_tokenizer(Model(name_or_path=str(bodies("bert")))).save_pretrained(folder)
        weights = load_file(folder / file)
        save_file({k: v for k, v in weights.items() if "classifier" not in k}, folder / file, {"format": "pt"})
        with pytest.raises(Exception, match=r"classifier|missing adapter keys"):
            artifact.load_artifact(str(folder), torch.float32, {"task": TASK.name})
