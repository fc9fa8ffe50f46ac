"""Divergences in float64, and students bound to their teachers."""

from __future__ import annotations

from typing import Any

import torch

from helpers.losses import count
from hfstrat.data.collate import Collator
from hfstrat.models import fused_loss
from hfstrat.strategies.distill.loss import Mix
from hfstrat.strategies.distill.objective import Distiller, FrozenTeacher
from hfstrat.tasks.causal_lm.losses import causal_lm_loss

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


def divergence_of(name: str, p: torch.Tensor, q: torch.Tensor, skew: float) -> torch.Tensor:
    """The divergence from probabilities, as written in the papers."""
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    middle = (p + q) / 2
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: (kl(p, middle) + kl(q, middle)) / 2,
        "skew_kl": lambda: kl(p, skew * p + (1 - skew) * q),
    }[name]()


def taught(model: Any, teacher: Any, mix: Mix) -> Any:
    """The student, bound to the teacher's objective."""
    asked = FrozenTeacher(teacher)
    distiller = Distiller(mix, asked)
    assert fused_loss.bind_head_loss(model, distiller) is None
    distiller.width, distiller.is_active = min(model.config.vocab_size, teacher.config.vocab_size), True
    return model


def gradients(model: Any, rows: list[dict[str, Any]], micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    collate, loss = Collator(0, 8, masks_logits=False, selects_rows=True), 0.0
    model.zero_grad()
    for start in range(0, len(rows), micro):
        batch = collate(rows[start : start + micro])
        labels = batch.pop("labels")
        part = causal_lm_loss(model(**batch), labels, count(rows))
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
