"""What is measured of a model that is trained by rewards: those of its greedy answers, by TRL's names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hfstrat.objectives.reinforcement.rewards import Scorer
from hfstrat.recipe.rewards import labels
from hfstrat.tasks.base import Metrics, Quality, Score, Values, ratios

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.prepare import PreparedData

FIRST = ("items", "length", "cut")  # columns before the rewards
KNOWN, VALUE = "known ", "reward "  # begin the names of the two columns of each reward


@dataclass(frozen=True)
class RewardMetrics(Metrics):
    """The mean reward of greedy answers, and its parts. `loss` is the negative reward, which training minimizes.

    Args:
        section: of the recipe.
        scorer: of the answers, with the tokenizer; once the data of a run are known.
    """

    can_overfit: ClassVar[bool] = False  # the loss of a policy gradient is not that of an evaluation

    section: Any = None
    scorer: Scorer | None = None

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        parts = [f"rewards/{name}/mean" for name in labels(self.section.rewards)]
        return ("loss", "reward", *parts, "completions/mean_length", "completions/clipped_ratio")

    @property
    def quality(self) -> Quality:
        return Quality("reward", True, "reward", "items")

    def for_data(self, data: PreparedData) -> Self:
        return replace(self, scorer=Scorer(self.section, data.renderer.tokenizer))

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Of sequences with loss, from which the memory of a step is measured; the loss of training is TRL's."""
        from hfstrat.tasks.causal_lm.losses import causal_lm_loss

        return causal_lm_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Answers each prompt greedily; columns FIRST, then for each reward whether it applies, and its value."""
        import torch

        from hfstrat.objectives.reinforcement.collate import prompts_of
        from hfstrat.tasks.generation import continued, end_tokens, room

        assert self.scorer is not None
        prompts, given = prompts_of(inputs)
        most = max(1, room(model, max(map(len, prompts)), self.section.max_completion_length))
        out = continued(model, prompts, self.scorer.tokenizer, most).tolist()
        ends = set(end_tokens(model, self.scorer.tokenizer) or [])
        answers = [_until(answer, ends) for answer in out]
        found = [self.scorer.score(place, given, answers) for place in range(len(self.scorer.names))]
        rows = [
            [1.0, len(answer), float(answer[-1] not in ends)]
            + [value for score in found for value in (float(score[n] is not None), score[n] or 0.0)]
            for n, answer in enumerate(answers)
        ]
        return (torch.tensor(rows, dtype=torch.float32, device=inputs["input_ids"].device),)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        return self.score(sums, {})(np.ones(len(sums[0]))), {}

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        def mean(above: str, below: str = "items", sign: float = 1.0) -> Any:
            return lambda s: sign * s[above] / max(s[below], 1e-9) + 0.0  # no negative zero

        parts = {f"rewards/{name}/mean": mean(VALUE + name, KNOWN + name) for name in labels(self.section.rewards)}
        lengths = {"completions/mean_length": mean("length"), "completions/clipped_ratio": mean("cut")}
        return ratios(self.columns(sums), {"loss": mean("reward", sign=-1.0), "reward": mean("reward"), **parts, **lengths})

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Those of FIRST, of each reward, and `reward`, their weighted sum; `nll` is its negative."""
        names = labels(self.section.rewards)
        titles = [*FIRST, *(kind + name for name in names for kind in (KNOWN, VALUE))]
        found = dict(zip(titles, sums[0].astype("float64").T, strict=True))
        total = sum(reward.weight * found[VALUE + name] for reward, name in zip(self.section.rewards, names, strict=True))
        return found | {"reward": total, "nll": -total}


def _until(answer: list[int], ends: set[int]) -> list[int]:
    """An answer up to its end token, which counts."""
    place = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: place + 1]
