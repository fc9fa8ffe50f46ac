"""Products in float8: the model's own parameters in other layers for the time of a step. On a CPU torchao computes them exactly
as the GPU's formats would be rounded (`emulate`); speed is measured on a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recipes import recipe_of
from helpers.runs import run
from torch import nn
from transformers import AutoModelForCausalLM

from hfstrat.errors import UserError
from hfstrat.models import float8
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.run import preflight
from hfstrat.trainer.distributed import ALONE, FSDP

RECIPE = """\
model: {name_or_path: MODEL}
strategy: full
data: {train: ROWS, eval_size: 8}
training: {max_steps: 6, eval_steps: 3, learning_rate: 2e-3, global_batch_size: 8}
evaluation: {samples: 0, control: 'off'}
output_dir: RUN
"""


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config that a CPU can compute with."""
    pytest.importorskip("torchao", reason="needs torchao (pip install 'hfstrat[float8]')")
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig(emulate=True)
    monkeypatch.setattr(float8, "config_for", lambda device: config)
    return config


def gradients(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_a_step_in_float8_has_nearly_the_same_gradient(emulated: Any, models: Callable[..., Path]) -> None:
    """And it changes nothing of the model: the same parameters under the same names, and the same layers afterwards."""
    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float32)
    before, layers, exact = dict(model.named_parameters()), list(model.modules()), gradients(model)
    inside = float8.Float8Layers(model, emulated)
    with inside:
        assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
        assert not any(type(module) is nn.Linear for block in model.model.layers for module in block.modules())
        assert type(model.lm_head) is nn.Linear
        rounded = gradients(model)
    assert [id(module) for module in model.modules()] == [id(module) for module in layers]
    alike = float(nn.functional.cosine_similarity(exact, rounded, dim=0))
    assert 0.9 < alike < 0.99999
    torch.testing.assert_close(gradients(model), exact, rtol=0, atol=0)


def test_only_trained_layers_with_wide_enough_products(emulated: Any, models: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float32)
    every = len(float8.Float8Layers(model, emulated).places)
    model.model.layers[0].requires_grad_(False)
    assert len(float8.Float8Layers(model, emulated).places) == every * (len(model.model.layers) - 1) / len(model.model.layers)
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"no torch\.nn\.Linear is trained"):
        float8.Float8Layers(model, emulated)
    narrow = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    with pytest.raises(UserError, match="multiples of 16"):
        float8.Float8Layers(narrow, emulated)


def test_a_run_in_float8_learns_and_its_result_is_verified(
    emulated: Any, models: Callable[..., Path], short_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is that of the run without it within a few percent, not bit for bit; the saved model is an ordinary one."""
    monkeypatch.setattr(preflight, "float8_is_installed", lambda: True)

    def trained(name: str, *overrides: str) -> dict[str, Any]:
        text = RECIPE.replace("MODEL", str(models())).replace("ROWS", str(short_rows)).replace("RUN", str(tmp_path / name))
        (tmp_path / f"{name}.yaml").write_text(text)
        found: dict[str, Any] = run(load_recipe(str(tmp_path / f"{name}.yaml"), overrides))["result"]
        return found

    plain, rounded = trained("plain"), trained("rounded", "training.float8=true")
    assert rounded["verified"]["bit_equal"]
    before, after = (rounded[f"metrics_{when}"]["loss"] for when in ("before", "after"))
    assert after < before == plain["metrics_before"]["loss"]
    assert after == pytest.approx(plain["metrics_after"]["loss"], rel=0.03)
    assert after != plain["metrics_after"]["loss"]


def test_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a weight is a product over the tokens; the GPU's product checks its shapes, also without any data."""
    pytest.importorskip("torchao", reason="needs torchao (pip install 'hfstrat[float8]')")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layer = nn.Sequential(nn.Linear(32, 48, bias=False, device="meta", dtype=torch.bfloat16))
    inside = float8.Float8Layers(layer, float8.config_for(torch.device("cuda")))
    for tokens in (16, 24, 7):
        with inside:
            layer(torch.empty(tokens, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)).sum().backward()
        assert layer[0].weight.grad.shape == (48, 32)


def test_a_device_without_float8_is_refused_before_anything_is_written(
    models: Callable[..., Path], short_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "float8_is_installed", lambda: True)
    text = RECIPE.replace("MODEL", str(models())).replace("ROWS", str(short_rows)).replace("RUN", str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"float8: true needs a GPU of compute capability 8\.9"):
        run(load_recipe(str(tmp_path / "recipe.yaml"), ["training.float8=true"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "wrapping", "names"),
    [
        ({"strategy": {"name": "lora"}}, ALONE, "adapter"),
        ({}, FSDP, "sharded"),
        ({"objective": {"name": "grpo", "rewards": ["json_valid"]}}, ALONE, "generates"),
        ({"strategy": {"name": "distill", "teacher": "t", "student": {"name": "full"}, "on_policy": True}}, ALONE, "generates"),
        ({"strategy": {"name": "distill", "teacher": "t", "student": {"name": "lora"}}}, ALONE, "adapter"),
        ({"strategy": {"name": "peft", "peft_type": "IA3"}}, ALONE, "adapter"),
    ],
)
def test_what_does_not_compute_in_float8_is_refused(changes: dict[str, Any], wrapping: str, names: str) -> None:
    given = recipe_of(Path("model"), {"name": "full"}).model_dump(exclude_unset=True)
    recipe = Recipe.model_validate(given | {"training": {"float8": True}} | changes)
    with pytest.raises(UserError, match=names):
        preflight.check_float8(recipe, wrapping)


def test_torchao_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate(
        recipe_of(Path("model"), {"name": "full"}).model_dump(exclude_unset=True) | {"training": {"float8": True}}
    )
    monkeypatch.setattr(preflight, "float8_is_installed", lambda: False)
    with pytest.raises(UserError, match="pip install torchao"):
        preflight.check_float8(recipe, ALONE)
