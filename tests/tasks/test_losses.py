"""The loss against a float64 reference, and the law of equal splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfstrat.data.collate import Collator, shift
from hfstrat.tasks.causal_lm.losses import causal_lm_loss, causal_lm_sums

VOCABULARY = 11


def reference(logits: torch.Tensor, labels: torch.Tensor, count: int) -> float:
    """One position at a time, in float64."""
    total = 0.0
    for row, row_labels in zip(logits.double(), labels, strict=True):
        for position, target in enumerate(row_labels[1:].tolist()):
            if target != -100:
                total -= float(row[position, target] - row[position].logsumexp(-1))
    return total / count


def a_batch(rows: int = 3, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (rows, width))
    labels[torch.rand(rows, width) < 0.4] = -100
    return torch.randn(rows, width, VOCABULARY), labels


@pytest.mark.parametrize("selected", [False, True])
def test_loss_equals_the_float64_reference(selected: bool) -> None:
    logits, labels = a_batch()
    given = logits[shift(labels) != -100] if selected else logits
    count = int((labels[:, 1:] != -100).sum())
    loss = causal_lm_loss({"logits": given}, labels, count)
    assert math.isclose(float(loss), reference(logits, labels, count), rel_tol=1e-6)


def test_sums_are_per_row_and_equal_the_reference() -> None:
    logits, labels = a_batch()
    sums = causal_lm_sums(logits, labels)
    for index in range(len(labels)):
        one = slice(index, index + 1)
        assert math.isclose(float(sums[index, 0]), reference(logits[one], labels[one], 1), rel_tol=1e-6)
        assert int(sums[index, 1]) == int((labels[index, 1:] != -100).sum())


def test_no_supervised_token_gives_a_finite_zero_with_a_gradient() -> None:
    logits = torch.randn(2, 5, VOCABULARY, requires_grad=True)
    labels = torch.full((2, 5), -100)
    loss = causal_lm_loss({"logits": logits}, labels, torch.tensor(0))
    loss.backward()
    assert float(loss) == 0.0
    assert logits.grad is not None
    assert not logits.grad.abs().sum()


def gradients(model: Any, rows: list[dict[str, Any]], micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    collate = Collator(pad_token_id=0, multiple=8, masks_logits=True)
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    model.zero_grad()
    loss = 0.0
    for start in range(0, len(rows), micro):
        batch = collate(rows[start : start + micro])
        labels = batch.pop("labels")
        part = causal_lm_loss(model(**batch), labels, count)
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_any_split_of_a_batch_has_the_same_loss_and_gradient(models: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float64)
    torch.manual_seed(2)
    rows = []
    for length in (5, 9, 14, 30, 31, 6, 22, 12):  # unequal lengths, unequal shares of supervised tokens
        ids = torch.randint(3, 300, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    whole, expected = gradients(model, rows, 8)
    for micro in (1, 2, 4):
        loss, found = gradients(model, rows, micro)
        assert math.isclose(loss, whole, rel_tol=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


def test_masked_head_equals_the_full_head(models: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float64)
    rows = [{"input_ids": list(range(3, 20)), "labels": [-100] * 6 + list(range(9, 20))}]
    rows.append({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    batch = Collator(0, 8, masks_logits=True)(rows)
    keep, labels = batch.pop("logits_to_keep"), batch.pop("labels")
    full = causal_lm_loss(model(**batch), labels, 13)
    masked = causal_lm_loss(model(**batch, logits_to_keep=keep), labels, 13)
    torch.testing.assert_close(full, masked, rtol=1e-12, atol=0)


def test_transformers_own_loss_agrees(models: Callable[..., Path]) -> None:
    """Ours is the loss that every causal LM in transformers has, on fewer rows of the head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float64)
    batch = Collator(0, 8, masks_logits=False)([{"input_ids": list(range(3, 20)), "labels": [-100] * 6 + list(range(9, 20))}])
    theirs = model(**batch).loss
    ours = causal_lm_loss({"logits": model(**batch).logits}, batch["labels"], None)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=0)
