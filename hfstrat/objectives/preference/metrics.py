"""What is measured of preferences, by TRL's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.tasks.base import Metrics, Quality, Score, Values, ratios

if TYPE_CHECKING:
    import numpy as np
    import torch


REWARDS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)


def share(above: str, below: str) -> Any:
    """A metric that is one summed column divided by another."""
    return lambda s: s[above] / max(s[below], 1)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """In float64, which Apple's GPUs lack: there as they are."""
    return values if values.is_mps else values.double()


@dataclass(frozen=True)
class PreferenceMetrics(Metrics):
    """The loss of a pair, rewards, and log-probabilities of the answers; the cross-entropy of the chosen ones.

    `rewards/accuracies` counts a pair whose answers have equal rewards by half: with a reference, all have before training.
    """

    names: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss", "mean_token_accuracy")
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
        return (in_float64(model(**inputs)["pairs"]),)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        return self.score(sums, {})(np.ones(len(sums[0]))), {}

    def means(self, sums: np.ndarray) -> Values:
        """The metrics but the loss, from the summed columns of some rows, `[columns]`, for a log."""
        import numpy as np

        return {name: value for name, value in self.score((sums[None],), {})(np.ones(1)).items() if name != "loss"}

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        return ratios(
            self.columns(sums),
            {
                "loss": share("nll", "items"),
                "rewards/accuracies": share("right", "items"),
                "rewards/margins": lambda s: (s["chosen_reward"] - s["rejected_reward"]) / max(s["items"], 1),
                "rewards/chosen": share("chosen_reward", "items"),
                "rewards/rejected": share("rejected_reward", "items"),
                "logps/chosen": share("chosen_logps", "items"),
                "logps/rejected": share("rejected_logps", "items"),
                "nll_loss": share("cross", "cross_tokens"),
                "mean_token_accuracy": share("top_1", "cross_tokens"),
            },
        )

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Those of `loss.COLUMNS`; as in other tasks the loss is `nll`, and the cross-entropy `cross` over `cross_tokens`."""
        from hfstrat.objectives.preference.loss import COLUMNS

        names = {"loss": "nll", "nll": "cross", "nll_tokens": "cross_tokens"}
        return {names.get(name, name): column for name, column in zip(COLUMNS, sums[0].T, strict=True)}


@dataclass(frozen=True)
class LabeledMetrics(PreferenceMetrics):
    """The loss of an answer with a label, rewards and log-probabilities; `kl` is the divergence that KTO estimates.

    Args:
        section: of the recipe.
    """

    section: Any = None

    names: ClassVar[tuple[str, ...]] = (*REWARDS, "kl")

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        import torch

        from hfstrat.objectives.preference.collate import REFERENCE, split_others

        inputs.pop("labels")
        batch, others = split_others(inputs)
        ratios = model(**others)["logps"] - batch[REFERENCE][:, 1]
        rows = model(**batch)["pairs"]
        return (in_float64(torch.cat([rows, ratios[:, None].to(rows.dtype)], dim=1)),)

    def means(self, sums: np.ndarray) -> Values:
        import numpy as np

        from hfstrat.objectives.preference.loss import LABELED

        known = {name: metric for name, metric in self.known().items() if name not in ("loss", "rewards/accuracies")}
        return ratios({name: sums[None, place] for place, name in enumerate(LABELED)}, known)(np.ones(1))

    @staticmethod
    def known() -> dict[str, Any]:
        """The metrics as functions of summed columns."""
        return {
            "loss": share("nll", "items"),
            "rewards/accuracies": share("right", "items"),
            "rewards/margins": lambda s: (
                s["chosen_reward"] / max(s["chosen"], 1) - s["rejected_reward"] / max(s["rejected"], 1)
            ),
            "rewards/chosen": share("chosen_reward", "chosen"),
            "rewards/rejected": share("rejected_reward", "rejected"),
            "logps/chosen": share("chosen_logps", "chosen"),
            "logps/rejected": share("rejected_logps", "rejected"),
            "kl": share("kl", "items"),
        }

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        return ratios(self.columns(sums), self.known())

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Those of `loss.LABELED`, with loss and divergence over all answers instead of a batch, and whether each is `right`: a
        desirable answer has a reward above that divergence, an undesirable one below it."""
        import numpy as np
        import torch

        from hfstrat.objectives.preference.loss import LABELED
        from hfstrat.objectives.preference.losses import Answers, kto

        *known, other = sums[0].T.astype(np.float64)
        found = dict(zip(LABELED, known, strict=True))
        ratio, good = (found["chosen_reward"] + found["rejected_reward"]) / self.section.beta, found["chosen"] > 0.5
        divergence = torch.tensor(max(0.0, float(other.mean())), dtype=torch.float64)
        answers = Answers(torch.from_numpy(ratio), torch.ones(len(ratio)), torch.zeros(len(ratio)))
        found["nll"] = kto(self.section, answers, torch.from_numpy(good), divergence).losses.numpy()
        above = (ratio > float(divergence)) + 0.5 * (ratio == float(divergence))
        return found | {"right": np.where(good, above, 1 - above), "kl": np.full(len(ratio), float(divergence))}
