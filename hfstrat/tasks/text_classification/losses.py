"""Losses and sums of classifiers. How they are averaged over a batch is the Trainer's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def class_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """A classifier's loss summed over this micro-batch and divided by the items of the whole optimiser step.

    Labels `[B]` (int64, one class a row): cross-entropy, an item is a row. Labels `[B, L]` (float, 0 or 1, any number of
    labels a row): binary cross-entropy, an item is a row's yes or no to one label. Stock classification heads know nothing of
    `num_items_in_batch`, so that their gradient grows with the number of micro-batches.
    """
    total = class_nll(outputs["logits"], labels).sum()
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def class_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each row `[B]` (nats), in at least float32, from logits `[B, L]`; with several labels summed over them."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if labels.is_floating_point():
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(1)
    return functional.cross_entropy(logits, labels, reduction="none")


def class_sums(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row: summed loss and items, `[B, 2]`; and what is true and what the model says.

    These are the class and the one with the largest logit (int64 `[B, 2]`); with several labels (int8 `[B, L]`) 2 where a label
    holds plus 1 where the model says so, which is where its probability is above one half.
    """
    nll = class_nll(logits, labels)
    sums = torch.stack([nll, torch.full_like(nll, labels.numel() / max(1, len(labels)))], dim=1)
    sums = sums.to(torch.float64 if not nll.is_mps else nll.dtype)
    if labels.is_floating_point():
        return sums, (2 * (labels > 0.5) + (logits > 0)).to(torch.int8)
    return sums, torch.stack([labels, logits.argmax(-1)], dim=1)
