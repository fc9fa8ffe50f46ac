"""Every type of the installed PEFT is trained under the laws of the other strategies, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.peft_types import TRAINED, strategy_of
from helpers.recipes import recipe_of

from hfstrat import strategies
from hfstrat.errors import UserError
from hfstrat.models.load import Base, count_parameters, load_tokenizer, set_precision
from hfstrat.publish.merge import check_mergeable, merged_in
from hfstrat.recipe.peft import UNMERGED
from hfstrat.recipe.schema import Recipe
from hfstrat.strategies.defaults import parse_names
from hfstrat.strategies.peft import NOT_ON_META, ONLY_FLOAT32
from hfstrat.tasks.artifact import load_artifact
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.loading import load_base

QUICK = ("PROMPT_TUNING", "PREFIX_TUNING", "IA3", "LN_TUNING", "VERA", "OFT")  # the others take longer together


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


@pytest.mark.parametrize("peft_type", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in TRAINED])
def test_what_is_declared_is_counted_and_moves(tiny: Path, peft_type: str) -> None:
    model, _, recipe = built(tiny, peft_type)
    described = strategies.describe(recipe)
    if peft_type in NOT_ON_META:
        assert described is None
    else:
        assert described is not None
        assert described.footprint == count_parameters(model)
    dtype = torch.float32 if peft_type in ONLY_FLOAT32 else torch.bfloat16
    set_precision(model, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(8, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 3], ids[:, 9] = 5, 7  # the tokens of TRAINABLE_TOKENS
    gradients: dict[str, Any] = {}
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses(model, ids).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == parameter.requires_grad, f"{name} moved: {moved}, declared: {parameter.requires_grad}"
        if parameter.requires_grad:
            assert gradients[name].isfinite().all()
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT", "IA3"])
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


def merged(model: Any, ids: torch.Tensor) -> Any:
    check_mergeable(model, "a run")
    return merged_in(model, torch.float32, [{"input_ids": ids}], "a run")[0]


def checked(recipe: Recipe) -> None:
    """As before training."""
    strategies.build(recipe.strategy).check(recipe, network=False)
    strategies.describe(recipe)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("peft_type", TRAINED)
def test_a_saved_adapter_loads_and_merges_or_says_why_not(tiny: Path, tmp_path: Path, peft_type: str) -> None:
    model, base, _ = built(tiny, peft_type)
    ids = torch.randint(8, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = 5  # a token of TRAINABLE_TOKENS
    before = logits(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(2):
        optimizer.zero_grad()
        losses(model, ids).loss.backward()
        optimizer.step()
    trained = logits(model, ids)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # what is not saved would be other random numbers
    again = load_artifact(str(tmp_path), torch.float32, {"source": base.name_or_path})
    assert torch.equal(logits(again, ids), trained)
    moved = float((trained - before).abs().max())
    assert moved > 0
    if peft_type in UNMERGED or peft_type == "BEFT":
        with pytest.raises(UserError, match="PEFT does not merge"):
            merged(again, ids)
    else:
        assert float((logits(merged(again, ids), ids) - trained).abs().max()) < 0.01 * moved


@pytest.mark.parametrize(
    ("strategy", "more", "words"),
    [
        (strategy_of("FOURIERFT", n_frequency=10**6), {}, "strategy.n_frequency: PEFT .* refuses this FOURIERFT"),
        (strategy_of("IA3", target_modules=["nonsense"]), {}, "strategy.target_modules: PEFT .* refuses this IA3"),
        (strategy_of("PROMPT_TUNING"), {"objective": "dpo"}, "objective: dpo compares positions"),
        (strategy_of("PROMPT_TUNING"), {"training": {"packing": True}}, "training.packing"),
        (strategy_of("PREFIX_TUNING"), {"training": {"activation_checkpointing": True}}, "activation_checkpointing"),
        (strategy_of("OSF"), {"model": {"dtype": "bfloat16"}}, "model.dtype: PEFT's OSF"),
        (strategy_of("VERA"), {"model": {"quantization": "nf4"}}, "PEFT .* has no VERA for layers"),
        (strategy_of("IA3"), {"model": {"add_tokens": ["<a>"]}}, "model.add_tokens"),
        (strategy_of("PROMPT_TUNING"), {"task": "text-classification"}, "is for task: causal-lm"),
        (strategy_of("TRAINABLE_TOKENS"), {"task": "text-classification"}, "has no modules_to_save"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tiny: Path, strategy: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    model = {"name_or_path": str(tiny), **more.get("model", {})}
    recipe = Recipe.model_validate({"data": "x.jsonl", "output_dir": "x", **more, "model": model, "strategy": strategy})
    with pytest.raises(UserError, match=words):
        checked(recipe)


def test_nothing_is_proposed_for_it() -> None:
    with pytest.raises(UserError, match="--strategies: peft: nothing is proposed"):
        parse_names("lora,peft")
