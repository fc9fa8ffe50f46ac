"""What is measured of preferences, by TRL's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.tasks.base import Metrics, Quality, Score, Values, ratios

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class PreferenceMetrics(Metrics):
    """The loss of a pair, rewards, and log-probabilities of the answers; the cross-entropy of the chosen ones.

    `rewards/accuracies` counts a pair whose answers have equal rewards by half: with a reference, all have before training.
    """

    names: ClassVar[tuple[str, ...]] = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "nll_loss",
        "mean_token_accuracy",
    )
    shares: ClassVar[tuple[str, ...]] = ("rewards/accuracies",)

    @property
    def quality(self) -> Quality:
        return Quality("rewards/accuracies", True, "right", "items")

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The summed loss of a micro-batch over the rows of the complete step."""
        import torch

        total: torch.Tensor = outputs["total"]
        count = outputs["count"] if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        inputs.pop("labels")
        return (model(**inputs)["pairs"].double(),)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        return self.score(sums, {})(np.ones(len(sums[0]))), {}

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        def mean(name: str) -> Any:
            return lambda s: s[name] / max(s["items"], 1)

        return ratios(
            self.columns(sums),
            {
                "loss": mean("nll"),
                "rewards/accuracies": mean("right"),
                "rewards/margins": lambda s: (s["chosen_reward"] - s["rejected_reward"]) / max(s["items"], 1),
                "rewards/chosen": mean("chosen_reward"),
                "rewards/rejected": mean("rejected_reward"),
                "logps/chosen": mean("chosen_logps"),
                "logps/rejected": mean("rejected_logps"),
                "nll_loss": lambda s: s["cross"] / max(s["cross_tokens"], 1),
                "mean_token_accuracy": lambda s: s["top_1"] / max(s["cross_tokens"], 1),
            },
        )

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Those of `loss.COLUMNS`; as in other tasks the loss is `nll`, and the cross-entropy `cross` over `cross_tokens`."""
        from hfstrat.objectives.preference.loss import COLUMNS

        names = {"loss": "nll", "nll": "cross", "nll_tokens": "cross_tokens"}
        return {names.get(name, name): column for name, column in zip(COLUMNS, sums[0].T, strict=True)}
