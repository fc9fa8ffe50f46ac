"""What the page of a run shows of a preference objective: rewards over the run, and the margins that they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages import charts
from hfstrat.pages.blocks import Block, Charts, Prose, Row, Section, Table
from hfstrat.pages.charts import Curve
from hfstrat.recipe import format

if TYPE_CHECKING:
    from hfstrat.tasks.report import Result

ABOUT = (
    "A reward is how much more probable an answer has become than under the reference, in nats, times beta. Both curves may "
    "fall: what counts is the distance between them."
)
SHOWN = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen answers",
    "rewards/rejected": "reward of rejected answers",
    "logps/chosen": "log-probability of chosen answers (nats)",
    "logps/rejected": "log-probability of rejected answers (nats)",
    "kl": "divergence that the loss estimates (nats)",
}


def sections(result: Result, names: tuple[str, str]) -> list[Section]:
    """Rewards before and after, and over the run.

    Args:
        names: of the two kinds of answers, such as chosen and rejected.
    """
    before, after = result.metrics_before or {}, result.metrics_after
    rows = [
        Row(
            [words.replace("chosen", names[0]).replace("rejected", names[1])]
            + [format.metric(key, one.get(key)) for one in both]
        )
        for key, words in SHOWN.items()
        if key in after
        for both in [(before, after)]
    ]
    blocks: list[Block] = [Table("Rewards on the evaluation examples", ["", "before training", "after"], rows)] if rows else []
    points = [(point.step, point.model_extra or {}) for point in result.curve]
    lines = [
        Curve(name, number, [[(step, more[f"eval_rewards/{key}"]) for step, more in points if f"eval_rewards/{key}" in more]])
        for number, (key, name) in enumerate(zip(("chosen", "rejected"), names, strict=True))
    ]
    drawn = charts.curves(
        f"Rewards of {names[0]} and {names[1]} answers", ("step", "reward"), lines, (format.count, charts.plain_tick)
    )
    if drawn:
        blocks += [Charts([drawn], list(enumerate(names))), Prose([ABOUT], "faint")]
    return [Section("Preferences", blocks)] if blocks else []


def advice(result: Result) -> list[tuple[str, str]]:
    """Where the rewards say what to change."""
    after, before = result.metrics_after, result.metrics_before or {}
    found = []
    if after.get("rewards/accuracies", 1.0) < 0.55:
        found.append(("The model hardly prefers chosen answers: train longer, or with a higher", "training.learning_rate"))
    if after.get("logps/chosen", 0.0) < before.get("logps/chosen", 0.0) and after.get("rewards/chosen", 0.0) < 0:
        found.append(
            ("Chosen answers have become less probable too: fewer steps, a lower learning rate, or a higher", "objective.beta")
        )
    return found
