"""Cross-entropy of labels, and what is measured with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.tasks.base import Metrics, Quality, Values

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.tasks.metrics import Score


@dataclass(frozen=True)
class ClassMetrics(Metrics):
    """Loss (nats per text or, with several labels, per label), accuracy and F1."""

    names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "rows")
    shares: ClassVar[tuple[str, ...]] = ("accuracy",)

    @property
    def quality(self) -> Quality:
        return Quality("accuracy", True, "right", "rows")

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.tasks.text_classification.losses import class_loss

        return class_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.tasks.text_classification.losses import class_sums

        labels = inputs.pop("labels")
        return class_sums(model(**inputs)["logits"], labels)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        from hfstrat.tasks.text_classification.scores import of_sums

        totals, marks = sums
        return of_sums(totals, marks, self.labels)

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.text_classification.scores import score_of

        return score_of(sums[0], sums[1], len(self.labels))

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        from hfstrat.tasks.text_classification.scores import columns_of

        return columns_of(*sums)
