"""Cross-entropy per supervised token, and what is measured with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.tasks.base import Metrics, Quality, Values

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.tasks.metrics import Score


@dataclass(frozen=True)
class TokenMetrics(Metrics):
    """Loss (nats per token), perplexity, token accuracy and, with a teacher, the divergence from it."""

    names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "tokens", "teacher_kl")

    @property
    def quality(self) -> Quality:
        return Quality("loss", False, "nll", "items")

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.tasks.causal_lm.losses import causal_lm_loss

        return causal_lm_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.tasks.causal_lm.losses import causal_lm_sums, sums_by_row

        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if "nll" not in outputs:
            return (causal_lm_sums(outputs["logits"], labels),)
        row = inputs["loss_rows"] // labels.shape[1]
        further = [outputs["kl"]] if "kl" in outputs else []
        return (sums_by_row(outputs["nll"], outputs["correct"], row, labels.shape[0], *further),)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        found = self.score(sums, {})(np.ones(len(sums[0])))
        return {**found, "tokens": float(sums[0][:, 1].astype("float64").sum())}, {}

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.metrics import ratios

        columns = self.columns(sums) | extra
        metrics = {
            "loss": lambda s: s["nll"] / max(s["items"], 1),
            "perplexity": lambda s: math.exp(min(s["nll"] / max(s["items"], 1), 700)),
            "token_accuracy": lambda s: s["right"] / max(s["items"], 1),
            "teacher_kl": lambda s: s["kl"] / max(s["items"], 1),
            "bits_per_byte": lambda s: s["nll"] / math.log(2) / max(s["bytes"], 1),
        }
        needed = {"teacher_kl": "kl", "bits_per_byte": "bytes"}
        return ratios(columns, {name: each for name, each in metrics.items() if needed.get(name, "nll") in columns})

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """`nll` over `items`, the tokens that are `right`, and `kl` (nats, summed) from a teacher, where there is one."""
        return dict(zip(("nll", "items", "right", "kl"), sums[0].astype("float64").T, strict=False))
