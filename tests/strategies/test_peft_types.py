"""Every type of the installed PEFT is trained under the laws of the other strategies, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.peft_types import TRAINED, strategy_of
from helpers.recipes import recipe_of

from hfstrat import strategies
from hfstrat.models.load import Base, count_parameters, load_tokenizer, set_precision
from hfstrat.strategies.peft import NOT_ON_META
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.loading import load_base


def built(folder: Path, peft_type: str) -> tuple[Any, Base, Any]:
    recipe = recipe_of(folder, strategy_of(peft_type), dtype="float32")
    base = load_base(recipe.model, load_tokenizer(recipe.model))
    CausalLM().model.bind_loss(base)
    torch.manual_seed(0)
    return strategies.build(recipe.strategy).build_model(base), base, recipe


def losses(model: Any, ids: torch.Tensor) -> Any:
    """The output of the bound loss of all next tokens."""
    rows = torch.cat([torch.arange(ids.shape[1] - 1) + row * ids.shape[1] for row in range(len(ids))])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), loss_rows=rows, targets=ids[:, 1:].flatten())


@pytest.mark.parametrize("peft_type", TRAINED)
def test_what_is_declared_is_counted_and_moves(tiny: Path, peft_type: str) -> None:
    model, _, recipe = built(tiny, peft_type)
    described = strategies.describe(recipe)
    if peft_type in NOT_ON_META:
        assert described is None
    else:
        assert described is not None
        assert described.footprint == count_parameters(model)
    set_precision(model, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(8, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 3], ids[:, 9] = 5, 7  # the tokens of TRAINABLE_TOKENS
    gradients: dict[str, Any] = {}
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses(model, ids).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == parameter.requires_grad, f"{name} moved: {moved}, declared: {parameter.requires_grad}"
        if parameter.requires_grad:
            assert gradients[name].isfinite().all()
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize("peft_type", TRAINED)
def test_the_loss_is_that_of_the_logits(tiny: Path, peft_type: str) -> None:
    """Also where virtual tokens move all positions."""
    model, _, _ = built(tiny, peft_type)
    model.eval()
    ids = torch.randint(8, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = losses(model, ids)
    assert logits.shape[:2] == ids.shape
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found.nll, expected, atol=1e-5, rtol=1e-5)
