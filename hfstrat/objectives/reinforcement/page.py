"""What the page of a run shows of training by rewards: the rewards of sampled answers by step, and what goes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages import charts
from hfstrat.pages.blocks import Block, Charts, Prose, Section
from hfstrat.pages.charts import Curve
from hfstrat.recipe import format

if TYPE_CHECKING:
    from hfstrat.tasks.report import Result

ABOUT = (
    "Of answers that are sampled in training, by step; the metrics above are of greedy answers to the evaluation prompts. "
    "Where all answers to a prompt have the same reward, nothing is learned from it."
)
OTHERS = {  # TRL's names
    "frac_reward_zero_std": ("Prompts whose answers all have the same reward", "share"),
    "completions/mean_length": ("Length of sampled answers", "tokens"),
    "completions/clipped_ratio": ("Sampled answers that are cut", "share"),
    "kl": ("Divergence from the reference", "nats"),
}
STUCK, CUT = 0.8, 0.3  # shares of prompts without a difference, and of answers that are cut, from which advice is given


def sections(result: Result) -> list[Section]:
    """Charts over the steps."""
    logs = result.rewards or []
    parts = [key for key in dict.fromkeys(key for log in logs for key in log) if key.startswith("rewards/")]
    lines = [_curve("reward", "reward", 0, logs)]
    if len(parts) > 1:
        lines += [_curve(key.removeprefix("rewards/").removesuffix("/mean"), key, n, logs) for n, key in enumerate(parts, 1)]
    show = (format.count, charts.plain_tick)
    drawn = [charts.curves("Reward of sampled answers", ("step", "reward"), lines, show)]
    for key, (title, unit) in OTHERS.items():
        drawn.append(charts.curves(title, ("step", unit), [_curve(title, key, 0, logs)], show))
    drawn = [chart for chart in drawn if chart]
    blocks: list[Block] = [Charts(drawn, [(line.number, line.label) for line in lines]), Prose([ABOUT], "faint")]
    return [Section("Rewards in training", blocks)] if drawn else []


def _curve(label: str, key: str, number: int, logs: list[dict[str, float]]) -> Curve:
    return Curve(label, number, [[(log["step"], log[key]) for log in logs if key in log]])


def advice(result: Result) -> list[tuple[str, str]]:
    """Where the sampled answers give nothing to learn from, or are cut."""
    logs, found = result.rewards or [], []
    last = logs[len(logs) * 3 // 4 :]
    if last and _mean(last, "frac_reward_zero_std") > STUCK:
        text = (
            "For most prompts all sampled answers have the same reward, so that nothing is learned from them: use other prompts"
        )
        found.append((f"{text} or rewards with steps in between, or sample more answers:", "objective.num_generations"))
    if last and _mean(last, "completions/clipped_ratio") > CUT:
        found.append(("Many sampled answers are cut before they end: raise", "objective.max_completion_length"))
    return found


def _mean(logs: list[dict[str, float]], key: str) -> float:
    values = [log[key] for log in logs if key in log]
    return sum(values) / len(values) if values else 0.0
