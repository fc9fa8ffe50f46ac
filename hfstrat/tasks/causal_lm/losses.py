"""Losses over rows that carry one. Sums and counts only: how they are averaged is the Trainer's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from hfstrat.data.collate import shift
from hfstrat.data.render import IGNORED


def supervised_rows(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[n, V]` in at least float32 and targets `[n]` of the positions that carry loss.

    Args:
        logits: `[n, V]` if the model projected only those positions, else `[B, T, V]`.
        labels: `[B, T]`, not shifted, -100 where there is no loss.
    """
    targets = shift(labels)
    keep = targets != IGNORED
    if logits.dim() == 3:
        logits = logits[keep]
    return (logits.float() if logits.dtype.itemsize < 4 else logits), targets[keep]


def causal_lm_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy summed over this micro-batch and divided by the supervised tokens of the whole optimiser step.

    `num_items_in_batch` counts over all micro-batches and processes, so that any split of a batch has the same
    gradient; None means this micro-batch alone. A batch without supervised tokens gives a finite zero. A model with our
    loss bound to it (`hfstrat.models.fused_loss`) has summed it already; not every family is told the number of items.
    """
    if "total" in outputs:
        if num_items_in_batch is None:
            return outputs["loss"]
        total, count = outputs["total"], num_items_in_batch
    else:
        logits, targets = supervised_rows(outputs["logits"], labels)
        total = functional.cross_entropy(logits, targets, reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else targets.numel()
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def causal_lm_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per row of the batch: summed negative log-likelihood (nats), supervised tokens, right top-1 guesses: `[B, 3]`."""
    logits, targets = supervised_rows(logits, labels)
    nll = functional.cross_entropy(logits, targets, reduction="none")
    row = (shift(labels) != IGNORED).nonzero()[:, 0]
    return sums_by_row(nll, logits.argmax(-1) == targets, row, labels.shape[0])


def sums_by_row(nll: torch.Tensor, right: torch.Tensor, row: torch.Tensor, rows: int, *beside: torch.Tensor) -> torch.Tensor:
    """The sums of `causal_lm_sums`, `[rows, 3]`, from the supervised tokens (`[n]` each) and the row each is in.

    What else there is of each token (`beside`) is summed into columns of its own.
    """
    columns = [nll, torch.ones_like(nll), right, *beside]
    sums = torch.zeros(rows, len(columns), device=nll.device, dtype=torch.float64 if not nll.is_mps else None)
    return sums.index_add_(0, row, torch.stack([one.to(sums.dtype) for one in columns], dim=1))
