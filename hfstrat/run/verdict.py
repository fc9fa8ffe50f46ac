"""What a run has shown, in a sentence, and what speaks for and against it. All from its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfstrat.data.prepare import FEW_ROWS
from hfstrat.evaluation.intervals import CONTROL, ROWS
from hfstrat.objectives import task_of
from hfstrat.pages.blocks import BAD, GOOD, PLAIN, UNCLEAR, Line, Verdict
from hfstrat.publish.card import METRICS
from hfstrat.recipe import format
from hfstrat.run import simple_models
from hfstrat.tasks.report import Failure, Report, Result
from hfstrat.tasks.report_parts import Estimate, SimpleModel

CHANCE = "which may be chance"
ENDS = {"interrupted": "was interrupted", "out-of-memory": "ran out of memory", "disk-full": "ended because the disk is full"}


def verdict(report: Report) -> Verdict:
    """The verdict on a run, finished or not."""
    result = report.result
    if isinstance(result, Failure):
        words = ENDS.get(result.status, f"did not finish ({result.status})")
        lines = [Line(f"{result.message[:1].upper()}{result.message[1:]}", PLAIN)] if result.message else []
        return Verdict(Line(f"The run {words}.", BAD), lines)
    lines = list(reasons(report, result))
    worse = any(is_worse(report, one) for one in result.simple_models)
    return Verdict(headline(report, result, worse), lines)


def main_metric(report: Report) -> str:
    """The metric by which a run is judged."""
    return simple_models.shown_metric(task_of(report.run.recipe))


def higher_is_better(report: Report, metric: str) -> bool:
    """Whether more of a metric is better, also of one that is not the task's main one, such as the equal error rate."""
    quality = task_of(report.run.recipe).metrics.quality
    if metric == quality.metric:
        return quality.higher_is_better
    return not METRICS[metric].lower_is_better if metric in METRICS else format.is_share(metric)


def named(report: Report, metric: str) -> str:
    """A metric in words, with the unit of the loss."""
    unit = task_of(report.run.recipe).text.loss_unit
    return METRICS[metric].name.format(unit=unit) if metric in METRICS else metric.replace("_", " ")


def headline(report: Report, result: Result, worse: bool) -> Line:
    """The main metric after training, and what training changed about it."""
    metric = main_metric(report)
    name, value = named(report, metric), result.metrics_after.get(metric)
    if value is None:
        return Line("The run finished; nothing was evaluated.", PLAIN)
    measured = result.measured.get(ROWS)
    change = (measured.difference or {}).get(metric) if measured else None
    before = (result.metrics_before or {}).get(metric)
    text = f"{name[:1].upper()}{name[1:]}: {format.metric(metric, value)} after training"
    if before is None:
        own = measured.after.get(metric) if measured else None
        return Line(f"{text}{bounds(metric, own)}; it was not measured before.", BAD if worse else PLAIN)
    text += f", {format.metric(metric, before)} before"
    if change is None or change.value is None:
        return Line(f"{text}.", BAD if worse else PLAIN)
    text += f": a difference of {format.difference(metric, change.value)}{bounds(metric, change, is_difference=True)}"
    improved = (change.value > 0) == higher_is_better(report, metric)
    if change.low is None or change.high is None:
        return Line(f"{text}; without an interval, since there are too few examples.", BAD if worse else UNCLEAR)
    if change.low <= 0 <= change.high:
        return Line(f"{text}, {CHANCE}.", BAD if worse else UNCLEAR)
    if not improved:
        return Line(f"{text}. Training made the model worse.", BAD)
    return Line(f"{text}.", BAD if worse else GOOD)


def bounds(metric: str, entry: Estimate | None, is_difference: bool = False) -> str:
    """' (95% interval 80.1% to 82.3%)'; "" without one."""
    if entry is None or entry.low is None or entry.high is None:
        return ""
    show = format.difference if is_difference else format.metric
    return f" (95% interval {show(metric, entry.low)} to {show(metric, entry.high)})"


def is_worse(report: Report, one: SimpleModel) -> bool:
    """Whether the result is worse than a baseline beyond chance."""
    return _differs(one, upward=not higher_is_better(report, one.metric))


def is_better(report: Report, one: SimpleModel) -> bool:
    """Whether the result is better than a baseline beyond chance."""
    return _differs(one, upward=higher_is_better(report, one.metric))


def _differs(one: SimpleModel, upward: bool) -> bool:
    low, high = one.difference.low, one.difference.high
    return low is not None and high is not None and (low > 0 if upward else high < 0)


def reasons(report: Report, result: Result) -> Iterator[Line]:
    """What speaks for and against the result."""
    yield from _baselines(report, result)
    yield from _forgetting(result)
    yield from _fit(report, result)
    yield from _data(report, result)
    if check := result.verified:
        same = "bit for bit" if check.bit_equal else f"within {check.max_difference:.2g}"
        yield Line(f"The saved model, reloaded with {check.loaded_with}, gives the logits of the trained one {same}.", GOOD)


def _baselines(report: Report, result: Result) -> Iterator[Line]:
    found = result.simple_models
    for one in found:
        if is_worse(report, one):
            yield Line(f"The baseline {_about(one)} is better than the result.", BAD)
    beaten = [one for one in found if is_better(report, one)]
    equal = [one for one in found if one not in beaten and not is_worse(report, one)]
    if unknown := [one for one in equal if one.difference.low is None]:
        names = ", ".join(one.name for one in unknown)
        yield Line(f"There are too few evaluation examples to compare the result with the baselines ({names}).", UNCLEAR)
    for one in equal:
        if one not in unknown:
            yield Line(f"No difference was measured between the result and the baseline {_about(one)}.", UNCLEAR)
    if beaten:
        sign = 1 if higher_is_better(report, beaten[0].metric) else -1
        best = max(beaten, key=lambda one: sign * (one.value.value or 0.0))
        count = (
            "The result is better than the baseline" if len(beaten) == 1 else f"Better than {len(beaten)} baselines, the best:"
        )
        yield Line(f"{count} {_about(best)}.", GOOD)
    if bars := result.baselines:
        after = result.metrics_after.get("loss")
        if after is not None:
            yield _frequencies(bars.unigram, after, result.measured.get(ROWS))


def _frequencies(unigram: float, after: float, measured: Any) -> Line:
    """The loss beside that of predicting token frequencies alone, by the interval of the loss where there is one."""
    own: Estimate | None = measured.after.get("loss") if measured else None
    low, high = (own.low, own.high) if own else (None, None)
    alone = f"that of predicting token frequencies alone ({format.metric('loss', unigram)} nats per token)"
    text = f"The loss{bounds('loss', own)}"
    if low is None or high is None:
        side = "below" if after < unigram else "above"
        return Line(f"{text} is {side} {alone}, without an interval, since there are too few examples.", UNCLEAR)
    if low <= unigram <= high:
        return Line(f"{text} does not differ from {alone}.", UNCLEAR)
    return Line(f"{text} is {'below' if high < unigram else 'above'} {alone}.", GOOD if high < unigram else BAD)


def _about(one: SimpleModel) -> str:
    """'TF-IDF (accuracy 81.2%; the result differs by +1.2 pp, 95% interval +0.1 pp to +2.3 pp)'."""
    value, metric = format.metric(one.metric, one.value.value), one.metric.replace("_", " ")
    differs = format.difference(one.metric, one.difference.value)
    inside = bounds(one.metric, one.difference, is_difference=True).removeprefix(" (").removesuffix(")")
    return f"{one.name} ({metric} {value}; the result differs by {differs}{', ' if inside else ''}{inside})"


def _forgetting(result: Result) -> Iterator[Line]:
    control = result.measured.get(CONTROL)
    change = (control.difference or {}).get("loss") if control else None
    if change is None or change.value is None or change.low is None or change.high is None:
        return
    size = f"{format.difference('loss', change.value)} nats per token{bounds('loss', change, is_difference=True)}"
    if change.low > 0:
        yield Line(f"Forgetting: the loss on general text rose by {size}.", BAD)
    else:
        yield Line(f"No forgetting was measured: the loss on general text changed by {size}.", GOOD)


def _fit(report: Report, result: Result) -> Iterator[Line]:
    """How training went."""
    if result.best_step == 0:
        yield Line("The evaluation never improved on the untrained model: its weights are the result.", BAD)
    elif result.overfitting:
        first, kept = result.overfitting[0], report.run.recipe.training.load_best_model_at_end
        told = (
            f"the weights of step {result.best_step:,} are the result" if kept and result.best_step else "the last weights are"
        )
        tone = UNCLEAR if kept else BAD
        yield Line(f"Overfitting: the evaluation loss rose at step {first.step:,} while the training loss fell; {told}.", tone)


def _data(report: Report, result: Result) -> Iterator[Line]:
    measured, data = result.measured.get(ROWS), report.run.data
    if measured and measured.rows < FEW_ROWS:
        rows = format.plural(measured.rows, "evaluation example")
        yield Line(f"Only {rows}: metrics and their intervals are mostly chance.", UNCLEAR)
    if data and data.overlap.eval_rows_in_train:
        count = format.plural(data.overlap.eval_rows_in_train, "evaluation example")
        yield Line(f"{count} are also in the training data, so that the metrics look better than they are.", BAD)
