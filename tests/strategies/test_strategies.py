"""The declared parameters are trained, counted correctly, in a precision that keeps small updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recipes import recipe_of

from hfstrat import strategies
from hfstrat.data.collate import BatchOrder, Collator
from hfstrat.errors import UserError
from hfstrat.models.blocks import checkpoint_activations
from hfstrat.models.load import Base, count_parameters, load_tokenizer, read_shapes, set_precision
from hfstrat.recipe.schema import Model
from hfstrat.tasks.loading import load_base

STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "partial-last": {"name": "partial", "last_n_layers": 2},
    "partial-head": {"name": "partial", "head": True},
    "partial-patterns": {"name": "partial", "patterns": ["*.0.*", "*.2.*weight"]},
    "lora": {"name": "lora", "r": 4},
    "lora-named": {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"name": "lora", "r": 4, "use_dora": True},
    "rslora": {"name": "lora", "r": 4, "use_rslora": True},
    "gaussian": {"name": "lora", "r": 4, "init_lora_weights": "gaussian"},
    "orthogonal": {"name": "lora", "r": 4, "init_lora_weights": "orthogonal"},
    "pissa": {"name": "lora", "r": 4, "init_lora_weights": "pissa"},
    "olora": {"name": "lora", "r": 4, "init_lora_weights": "olora"},
    "lora-and-head": {"name": "lora", "r": 4, "modules_to_save": ["lm_head"]},
}


def built(folder: Path, strategy: dict[str, Any], **more: Any) -> tuple[Any, Base]:
    recipe = recipe_of(folder, strategy, **more)
    base = load_base(recipe.model, load_tokenizer(recipe.model))
    return strategies.build(recipe.strategy).build_model(base), base


def steps(model: Any, count: int = 2) -> dict[str, torch.Tensor]:
    """Train a little; returns the last gradients."""
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 300, (4, 24))
    for _ in range(count):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_only_what_is_declared_moves_and_all_of_it(models: Callable[..., Path], name: str, tied: bool) -> None:
    if tied and name == "lora-and-head":
        pytest.skip("a tied head is the embeddings; PEFT would copy it")
    model, _ = built(models(tied=tied), STRATEGIES[name], dtype="float32")
    set_precision(model, torch.bfloat16)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = steps(model)
    for key, parameter in model.named_parameters():
        moved = not torch.equal(before[key], parameter)
        assert moved == parameter.requires_grad, f"{key} moved: {moved}, declared: {parameter.requires_grad}"
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        if parameter.requires_grad:
            assert gradients[key].isfinite().all()


def test_a_norm_of_which_only_the_bias_is_trained_runs_in_16_bits(models: Callable[..., Path]) -> None:
    """A kernel takes one type for weight and bias; GPT-2 has biases."""
    model, _ = built(models(family="gpt2"), {"name": "partial", "patterns": ["*.bias"]})
    set_precision(model, torch.bfloat16)
    gradients = steps(model)
    assert any("ln_1.bias" in name for name in gradients)
    norm = model.transformer.h[0].ln_1
    assert norm.weight.dtype == norm.bias.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_footprint_equals_the_real_counts(models: Callable[..., Path], name: str, tied: bool, family: str) -> None:
    if family == "gpt2" and name in ("lora-named", "pissa", "olora"):
        pytest.skip("names or initialisations that GPT-2's Conv1D does not have")
    if tied and name == "lora-and-head":
        pytest.skip("a tied head is the embeddings; PEFT would copy it")
    folder = models(family=family, tied=tied)
    strategy = strategies.build(recipe_of(folder, STRATEGIES[name]).strategy)
    model, _ = built(folder, STRATEGIES[name], dtype="float32")
    assert strategy.describe(read_shapes(folder), tied).footprint == count_parameters(model)


def test_partial_says_that_embeddings_are_tied(models: Callable[..., Path]) -> None:
    _, base = built(models(tied=True), {"name": "partial", "head": True})
    assert "tied embeddings" in base.remarks[0]
    assert "both are trained" in base.remarks[0]
    _, base = built(models(tied=True), {"name": "partial", "last_n_layers": 1})
    assert "is not trained" in base.remarks[0]


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"name": "partial", "patterns": ["*.nonsense.*"]}, "matches no parameter"),
        ({"name": "partial", "last_n_layers": 9}, "has 4 layers"),
        ({"name": "partial"}, "no parameter would be trained"),
        ({"name": "lora", "target_modules": ["nonsense"]}, "nonsense"),
    ],
)
def test_what_cannot_be_is_refused(models: Callable[..., Path], strategy: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built(models(tied=True), strategy)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_added_tokens_learn_and_the_old_ones_are_frozen_under_lora(models: Callable[..., Path], name: str, tied: bool) -> None:
    model, base = built(models(tied=tied), STRATEGIES[name], add_tokens=["<think>", "</think>"])
    assert len(base.new_token_ids) == 2
    set_precision(model, torch.float32)

    def table() -> torch.Tensor:
        embeddings = model.get_input_embeddings()
        return embeddings(torch.arange(max(base.new_token_ids) + 1)).detach().clone()

    def head() -> torch.Tensor:
        layer = model.get_output_embeddings()
        return layer(torch.eye(32))[:, : max(base.new_token_ids) + 1].T.detach().clone()

    before, head_before = table(), head()
    ids = torch.tensor([[5, base.new_token_ids[0], 6, base.new_token_ids[1], 7]])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    moved = (table() != before).any(dim=1)
    head_moved = (head() != head_before).any(dim=1)
    assert head_moved[base.new_token_ids].all(), "a token that cannot be said"
    assert moved[base.new_token_ids].all()
    if name == "lora":
        assert int(moved.sum()) == 2


def test_added_tokens_that_could_not_learn_are_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="would stay random"):
        built(tiny, {"name": "partial", "last_n_layers": 1}, add_tokens=["<think>"])


def backward_through(model: Any, ids: torch.Tensor) -> set[int]:
    """The indices of the blocks whose input gets a gradient."""
    reached: set[int] = set()
    layers = model.get_base_model().model.layers if hasattr(model, "get_base_model") else model.model.layers
    hooks = [
        layer.register_full_backward_hook(lambda module, into, out, index=index: reached.add(index))
        for index, layer in enumerate(layers)
    ]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    return reached


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_stops_at_the_frozen_prefix(tiny: Path, checkpointing: bool) -> None:
    model, base = built(tiny, {"name": "partial", "last_n_layers": 1})
    set_precision(model, torch.float32)
    checkpoint_activations(base.model, checkpointing)
    assert backward_through(model, torch.randint(3, 300, (2, 12))) == {3}
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False] * 3 + [checkpointing]


@pytest.mark.parametrize("name", ["full", "lora", "partial-last"])
def test_activation_checkpointing_changes_no_gradient(tiny: Path, name: str) -> None:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        model, base = built(tiny, STRATEGIES[name])
        set_precision(model, torch.float32)
        checkpoint_activations(base.model, enable)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-7)


def test_learning_weights_are_float32_and_frozen_ones_16_bit(models: Callable[..., Path]) -> None:
    model, base = built(models(dtype="bfloat16"), STRATEGIES["lora"])
    set_precision(model, torch.bfloat16)
    assert base.own_dtype == torch.bfloat16
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_collated_batch_goes_through_every_family(models: Callable[..., Path]) -> None:
    from hfstrat.models.load import takes_logits_mask

    for family in ("llama", "gpt2"):
        model, base = built(models(family=family), STRATEGIES["full"])
        batch = Collator(0, 8, takes_logits_mask(base.model))([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
        batch.pop("labels")
        assert model(**batch).logits.shape == (2, base.model.config.vocab_size)
    assert BatchOrder([3], 1, 1, 0).batch(0).tolist() == [0]


def test_model_section_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Model(name_or_path="x").revision = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x02" + b"\x00" * 9]
)
def test_weights_that_are_not_complete_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: no complete safetensors file .*`git lfs pull`"):
        read_shapes(tmp_path)
