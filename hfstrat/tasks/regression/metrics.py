"""Squared error of standardized targets, and errors and correlations in original units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hfstrat.tasks.base import Metrics, Quality, Values

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.models.output_scale import Units
    from hfstrat.tasks.metrics import Score


@dataclass(frozen=True)
class TargetMetrics(Metrics):
    """Loss (mean squared error of standardized targets), MAE, RMSE, Pearson and Spearman correlation.

    With several targets the last four are means over targets, and the details hold those of each.
    """

    units: Units | None = None

    of_distributions: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("loss", "mae", "rmse", "pearson", "spearman", "rows")

    @property
    def quality(self) -> Quality:
        return Quality("loss", False, "nll", "items")

    def for_data(self, data: Any) -> Self:
        return replace(self, labels=data.label_names, units=data.units)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Squared errors summed over this micro-batch and divided by the numbers to predict of the whole optimizer step.

        Args:
            outputs: `logits` `[B, targets]` in original units.
            labels: standardized targets, float `[B, targets]`.
        """
        import torch

        total = (self._standardized(outputs["logits"]) - labels).square().sum()
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    def _standardized(self, logits: torch.Tensor) -> torch.Tensor:
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        return wide if self.units is None else self.units.standardize(wide)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Summed squared error and items `[B, 2]`; standardized targets and predictions `[B, targets, 2]`; in float64."""
        import torch

        labels = inputs.pop("labels")
        predicted = self._standardized(model(**inputs)["logits"])
        wide = torch.float32 if predicted.is_mps else torch.float64
        pairs = torch.stack([labels.to(wide), predicted.to(wide)], dim=2)
        squared = (pairs[:, :, 0] - pairs[:, :, 1]).square().sum(1)
        return torch.stack([squared, torch.full_like(squared, labels.shape[1])], dim=1), pairs

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        from hfstrat.tasks.regression.scores import by_target

        values = self.score(sums, {})(np.ones(len(sums[0])))
        true, predicted = self._original(sums[1])
        details = by_target(true, predicted, self.labels, self._mean())
        return {**values, "rows": float(len(sums[0]))}, details

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.regression.scores import score_of

        return score_of(sums[0], *self._original(sums[1]))

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """`nll` (squared error of standardized targets) over `items`, and the absolute error, mean over targets."""
        import numpy as np

        true, predicted = self._original(sums[1])
        squared, items = sums[0].astype(np.float64).T
        return {"nll": squared, "items": items, "absolute_error": np.abs(true - predicted).mean(1)}

    def _original(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets and predictions `[examples, targets]` in original units."""
        import numpy as np

        wide = pairs.astype(np.float64)
        if self.units is not None:
            wide = wide * self.units.std.numpy()[:, None] + self.units.mean.numpy()[:, None]
        return wide[:, :, 0], wide[:, :, 1]

    def _mean(self) -> np.ndarray | None:
        return None if self.units is None else self.units.mean.numpy()
