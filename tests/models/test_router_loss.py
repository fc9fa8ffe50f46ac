"""The load-balancing loss of routers: that of the model's own forward, in training only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import make_family

from hfstrat.models import fused_loss, router_loss
from hfstrat.tasks.generation import continued

BALANCED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "ernie4_5_moe", "minimax", "jetmoe", "jamba"]


def load(folder: Path, family: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_family(folder, family)).train()


@pytest.mark.parametrize("family", BALANCED)
def test_it_is_part_of_the_training_loss(family: str, tmp_path: Path) -> None:
    model = load(tmp_path, family)
    assert router_loss.coefficient(model) > 0
    assert fused_loss.bind_head_loss(model) is None
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    rows = torch.cat([torch.arange(15), torch.arange(16, 25)])
    given = {"input_ids": ids, "attention_mask": mask}
    ours = model(**given, loss_rows=rows, targets=ids.flatten()[rows + 1]).loss
    theirs = type(model).forward(model, **given, labels=labels, output_router_logits=True)
    without = type(model).forward(model, **given, labels=labels, output_router_logits=False)
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-5, atol=1e-6)
    assert float(theirs.loss) - float(without.loss) > 1e-3, "a test that could not fail"
    model.eval()
    torch.testing.assert_close(
        model(**given, loss_rows=rows, targets=ids.flatten()[rows + 1]).loss, without.loss, rtol=1e-5, atol=1e-6
    )


def test_it_counts_each_micro_batch_by_its_supervised_tokens(tmp_path: Path) -> None:
    """Two micro-batches of one optimizer step: the mean of their load-balancing losses, weighted by supervised tokens."""
    model = load(tmp_path, "mixtral")
    fused_loss.bind_head_loss(model)
    ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    halves = [(ids[:1], torch.arange(7)), (ids[1:], torch.arange(3))]
    total = sum(
        model(input_ids=half, loss_rows=rows, targets=half.flatten()[rows + 1], num_items_in_batch=10).loss
        for half, rows in halves
    )
    parts = []
    for half, rows in halves:
        out = type(model).forward(model, input_ids=half, output_router_logits=True)
        nll = torch.nn.functional.cross_entropy(out.logits[0, rows], half[0, rows + 1], reduction="sum")
        parts.append((nll + len(rows) * router_loss.coefficient(model) * out.aux_loss) / 10)
    torch.testing.assert_close(total, torch.stack(parts).sum(), rtol=1e-5, atol=1e-6)


def test_a_coefficient_of_zero_turns_it_off(tmp_path: Path) -> None:
    model = load(tmp_path, "mixtral")
    model.config.router_aux_loss_coef = 0.0
    with router_loss.Routing(model) as routing:
        model.base_model(input_ids=torch.arange(3, 9)[None])
    assert routing.loss() == 0.0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jamba"])
def test_batched_generation_is_that_of_single_prompts(family: str, tmp_path: Path) -> None:
    model = load(tmp_path, family).eval()
    model.config.output_router_logits = True
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    batched = continued(model, prompts, None, 6, eos_token_id=None)
    single = [continued(model, [prompt], None, 6, eos_token_id=None)[0] for prompt in prompts]
    assert torch.equal(batched, torch.stack(single))
