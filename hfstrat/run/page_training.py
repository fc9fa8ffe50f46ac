"""The sections of a run's page about training and measuring: curves, metrics, baselines, predictions, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hfstrat.evaluation.intervals import ROWS
from hfstrat.objectives import task_of
from hfstrat.objectives.preference.objective import DIVERGENCE
from hfstrat.pages import charts
from hfstrat.pages.blocks import Block, Cell, Charts, Fact, Facts, Fold, Prose, Row, Section, Table
from hfstrat.pages.charts import Curve
from hfstrat.recipe import format
from hfstrat.run import verdict
from hfstrat.tasks.report import Report, Result, Run
from hfstrat.tasks.report_parts import Estimate, LoggedLoss, Measured, Point, Speed

ABOUT_CURVES = "The training loss is the mean since the last log; throughput is that of training steps alone."
ABOUT_INTERVALS = "In parentheses are intervals over examples"
NAMES = {ROWS: "evaluation examples", "control text": "general text, outside of the training data (a check for forgetting)"}
NAMES[DIVERGENCE] = "divergence from the reference, KL(reference || model) in nats, on answers that the reference sampled"
EVALUATIONS = 60  # lines of the table of evaluations


def curves(report: Report, points: list[Point], losses: list[LoggedLoss], speeds: list[Speed]) -> list[Section]:
    """Loss, metric, learning rate, norm of the gradient and throughput by step, and the evaluations as a table."""
    metric = verdict.main_metric(report)
    plain, steps = (format.count, charts.plain_tick), ("step",)
    same = task_of(report.run.recipe).metrics.can_overfit  # else an evaluation has another loss, which is its metric
    lines = [
        Curve("training", 0, [[(float(one.step), one.loss) for one in losses]]),
        Curve("evaluation", 1, [[(float(one.step), one.eval_loss) for one in points]]),
    ]
    title, unit = ("Loss", verdict.named(report, "loss")) if same else ("Training loss", "loss")
    drawn = [charts.curves(title, (*steps, unit), _drawable(lines if same else lines[:1]), plain)]
    if metric != "loss":
        values = [(float(one.step), value) for one in points if (value := _extra(one, metric)) is not None]
        show = (format.count, lambda value: charts.quality_tick(value, metric))
        name = verdict.named(report, metric)
        title = f"Evaluation: {name}"
        line = _drawable([Curve("evaluation", 1, [values])])
        drawn.append(charts.curves(title, (*steps, name), line, show, logs=False))
    for title, name, found in (
        ("Learning rate", "learning rate", [(one.step, one.learning_rate) for one in losses]),
        ("Gradient norm", "norm before clipping", [(one.step, one.grad_norm) for one in losses]),
        ("Throughput", "tokens/s", [(one.step, one.tokens_per_second) for one in speeds]),
    ):
        known = [(float(step), value) for step, value in found if value is not None]
        show, line = (format.count, format.count) if title == "Throughput" else plain, _drawable([Curve(title, 0, [known])])
        drawn.append(charts.curves(title, (*steps, name), line, show, logs=title == "Gradient norm"))
    drawn = [chart for chart in drawn if chart]
    if not drawn:
        return []
    blocks: list[Block] = [Charts(drawn, [(0, "training"), (1, "evaluation")]), Prose([ABOUT_CURVES], "faint")]
    if points:
        blocks.append(Fold("Evaluations as a table", [_evaluations(report, points)]))
    return [Section("Curves", blocks)]


def _drawable(lines: list[Curve]) -> list[Curve]:
    """The curves with at least two points, and those with one beside them; none where no curve has two."""
    several = any(len(line) > 1 for curve in lines for line in curve.lines)
    return [curve for curve in lines if any(curve.lines)] if several else []


def _extra(point: Point, metric: str) -> float | None:
    value = (point.model_extra or {}).get(f"eval_{metric}")
    return float(value) if isinstance(value, int | float) else None


def _evaluations(report: Report, points: list[Point]) -> Table:
    names = [verdict.main_metric(report)]
    names = [] if names == ["loss"] else [name for name in names if any(_extra(one, name) is not None for one in points)]
    shown = points[:: -(-len(points) // EVALUATIONS)]
    rows = []
    for one in shown:
        values = [format.metric(name, _extra(one, name)) for name in names]
        cells = [f"{one.step:,}", format.duration(one.seconds), format.count(one.tokens)]
        rows.append(Row([*cells, format.metric("loss", one.eval_loss), *values]))
    head = ["step", "time", "tokens", verdict.named(report, "loss"), *(verdict.named(report, name) for name in names)]
    return Table("Evaluations during training" + (", some of them" if len(shown) < len(points) else ""), head, rows)


def metrics(report: Report, result: Result) -> list[Section]:
    """Each metric before and after training, with intervals; of a report without them the metrics alone."""
    tables = [measured(report, NAMES.get(name, name), one) for name, one in result.measured.items()]
    how = [f"{ABOUT_INTERVALS}{f': {result.interval}' if result.interval else ''}."]
    if ROWS not in result.measured:
        before = result.metrics_before or {}
        rows = [
            Row(
                [
                    verdict.named(report, name),
                    format.metric(name, before.get(name)),
                    format.metric(name, result.metrics_after[name]),
                ]
            )
            for name in format.without_negative(result.metrics_after)
        ]
        tables.insert(0, Table("Metrics on the evaluation examples", ["metric", "before training", "after"], rows))
        how = how if result.measured else []
    return [Section("Metrics", [*tables, Prose(how, "faint")])]


def measured(report: Report, name: str, one: Measured, sides: tuple[str, str] = ("before training", "after")) -> Table:
    """One set of examples: value and interval on both sides, and of the difference."""
    before, change, rows = one.before or {}, one.difference or {}, []
    for metric in format.without_negative(one.after):
        cells = [_with_interval(metric, one.after[metric])]
        if one.before is not None:
            cells = [_with_interval(metric, before.get(metric)), *cells, _with_interval(metric, change.get(metric), True)]
        rows.append(Row([verdict.named(report, metric), *cells]))
    size = format.plural(one.rows, "example") + (f", {one.tokens:,.0f} tokens" if one.tokens else "")
    head = ["metric", sides[0], sides[1], "difference"] if one.before is not None else ["metric", sides[1]]
    return Table(f"{name[:1].upper()}{name[1:]} ({size})", head, rows)


def _with_interval(metric: str, entry: Estimate | None, is_difference: bool = False) -> str:
    """'81.2% (80.1% to 82.3%)', and for a difference that may be chance '~'."""
    if entry is None or entry.value is None:
        return format.MISSING
    show = format.difference if is_difference else format.metric
    text = show(metric, entry.value)
    if entry.low is None or entry.high is None:
        return text
    chance = ", may be chance" if is_difference and entry.low <= 0 <= entry.high else ""
    return f"{text} ({show(metric, entry.low)} to {show(metric, entry.high)}{chance})"


def baselines(result: Result) -> list[Section]:
    """What simple models reach on the same examples."""
    blocks: list[Block] = []
    if found := result.simple_models:
        rows = [
            Row(
                [one.name, _with_interval(one.metric, one.value), _with_interval(one.metric, one.difference, True)]
                + [f"{one.train_rows:,}", format.duration(one.seconds)]
            )
            for one in found
        ]
        name = found[0].metric.replace("_", " ")
        head = ["baseline", name, "result minus baseline", "training examples", "time"]
        blocks.append(Table("Baselines on the same evaluation examples, with 95% intervals", head, rows))
    if bars := result.baselines:
        losses = [("uniform (ln V)", bars.uniform), ("token frequencies (unigram)", bars.unigram)]
        after = result.metrics_after.get("loss")
        rows = [
            Row(
                [
                    name,
                    format.metric("loss", loss),
                    format.MISSING if after is None else format.difference("loss", after - loss),
                ]
            )
            for name, loss in losses
        ]
        head = ["baseline", "loss (nats per token)", "result minus baseline"]
        blocks.append(Table("Losses that a model from random weights has to beat", head, rows))
        unique = f"{format.count(bars.unique_tokens)} unique training tokens, {format.count(bars.parameters)} parameters"
        blocks.append(Prose([f"{bars.unique_tokens / max(bars.parameters, 1):.2g} tokens per parameter ({unique})."], "faint"))
    return [Section("Baselines", blocks)] if blocks else []


def predicted(result: Result) -> list[Section]:
    """What was predicted before the run, beside what was measured."""
    found = result.predicted
    if found is None:
        return []
    once = not result.resumed_from
    seconds = result.setup_seconds + result.train_seconds if once else None
    rows = [
        _compared("time to trained weights", found.seconds, found.seconds_band, seconds, format.duration),
        _compared("peak memory", found.memory_bytes, found.memory_band, result.peak_memory_bytes, format.memory),
    ]
    rows = [row for row in rows if row]
    head = ["", "predicted", "expected range", "measured", "measured / predicted"]
    notes = [f"Predicted from: {found.source}."] if found.source else []
    notes += [f"Not predicted: {found.reason}."] if found.reason else []
    notes += [] if once else ["The run was resumed, so its time is not compared."]
    blocks = [*([Table("Before and after the run", head, [row for row in rows if row])] if rows else []), Prose(notes, "faint")]
    return [Section("Predicted and measured", blocks)]


def _compared(
    name: str, value: float | None, band: tuple[float, float] | None, measured: float | None, show: Any
) -> Row | None:
    if value is None:
        return None
    between = f"{show(band[0])} to {show(band[1])}" if band else format.MISSING
    ratio = format.MISSING
    if measured is not None and value > 0:
        inside = "" if band is None else ", within" if band[0] <= measured <= band[1] else ", outside"
        ratio = f"{measured / value:.2f}{inside}"
    return Row([name, show(value), between, show(measured), ratio])


def course(report: Report, result: Result) -> Section:
    """How the run went, on which machine."""
    plan, machine, training = result.plan, report.environment, report.run.recipe.training
    facts = [
        Fact("Steps", f"{result.steps:,}", f"best: step {result.best_step:,}" if result.best_step is not None else ""),
        Fact("Epochs", f"{plan.epochs:.2f}") if plan.epochs else None,
        Fact("Batch", f"{plan.global_batch_size:,}", _passes(result)) if plan.global_batch_size else None,
        Fact("Learning rate", f"{training.learning_rate:.3g}", training.lr_scheduler_type) if training.learning_rate else None,
        Fact("Optimizer", training.optim),
        Fact("Attention", plan.attention, plan.attention_because) if plan.attention else None,
        Fact("Tokens trained on", format.count(result.tokens)) if result.tokens else None,
        Fact("Setup", format.duration(result.setup_seconds), "loading, cached computations"),
        Fact("Resumed", "yes", f"{format.plural(result.session_steps or 0, 'step')} in the last session")
        if result.resumed_from
        else None,
        Fact("Quantized base", result.quantization.name, format.memory(result.quantization.weight_bytes))
        if result.quantization
        else None,
    ]
    device = ", ".join(machine.gpus) or f"{machine.processor or 'CPU'}, {format.plural(machine.threads or 1, 'thread')}"
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    lines = [f"{device}; Python {machine.python}; {libraries}." if machine.python else f"{device}."]
    return Section("How it ran", [Facts([each for each in facts if each]), Prose(lines, "faint")])


def _passes(result: Result) -> str:
    plan = result.plan
    passes = format.plural(plan.accumulation, "pass", "passes")
    processes = f"{format.plural(plan.processes, 'process', 'processes')} x " if plan.processes > 1 else ""
    packed = "; packed" if plan.bins else ""
    return f"{processes}{passes} of {plan.micro_batch:,}{packed}" + ("; activation checkpointing" if plan.checkpointing else "")


def settings(run: Run) -> Section:
    """The settings that are not plain defaults, and where each was set."""
    recipe = run.recipe.model_dump(mode="json")
    rows = []
    for key, origin in run.origins.items():
        value, found = recipe, True
        for part in key.split("."):
            found = found and isinstance(value, dict) and part in value
            value = value[part] if found else value
        if found:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append(Row([key, Cell(text), origin]))
    blocks: Sequence[Block] = [Fold("Settings and where they come from", [Table("Settings", ["key", "value", "from"], rows)])]
    return Section("Recipe", blocks if rows else [Prose(["All settings have their default values."])])
