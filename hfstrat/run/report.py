"""Builds the report of a run and summarizes it for the terminal. Its model is in `hfstrat.tasks.report`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hfstrat.errors import NAMES, RunError
from hfstrat.evaluation import table
from hfstrat.evaluation.intervals import ROWS
from hfstrat.models.fingerprint import environment
from hfstrat.objectives import task_of
from hfstrat.recipe import format
from hfstrat.recipe.load import Loaded
from hfstrat.run import simple_models
from hfstrat.tasks.report import Failure, Report, Result, Run, write
from hfstrat.tasks.report_parts import Baselines, DataStatistics, Environment, Verified


def build(loaded: Loaded, result: Result, data: dict[str, Any]) -> Report:
    """The report of a finished run; `data` are the statistics of its data."""
    recipe = loaded.recipe
    named = [Path(source.path).expanduser() for source in (*recipe.data.train, *(recipe.data.eval or []))]
    files = [path for path in named if path.is_file()] if not recipe.data.streaming else []  # of any size
    facts = environment(recipe.model.name_or_path, recipe.model.revision, files)
    run = _run(loaded, DataStatistics.model_validate(data))
    return Report(run=run, result=result, environment=Environment.model_validate(facts))


def write_failure(loaded: Loaded, folder: Path, error: RunError, **parts: Any) -> Report | None:
    """Write a report of how a run ended that did not finish; `parts` of its training are added where there are some.

    Returns:
        The report; None where it could not be written.
    """
    found = {name: value for name, value in parts.items() if value}
    report = Report(run=_run(loaded), result=Failure(status=NAMES[error.code], message=str(error), **found))
    with contextlib.suppress(OSError):  # the disk may be what failed
        write(report, folder)
        return report
    return None


def _run(loaded: Loaded, data: DataStatistics | None = None) -> Run:
    origins = {".".join(path): origin for path, origin in sorted(loaded.origins.items())}
    return Run(recipe=loaded.recipe, source=loaded.source, origins=origins, data=data)


def summary(report: Report) -> list[str]:
    """The report of a finished run in a few lines."""
    result, task = report.finished, task_of(report.run.recipe)
    before, after = result.metrics_before, result.metrics_after
    lines = []
    if ROWS not in result.measured:  # else its table has these metrics with their intervals
        text = task.text.metrics(after)
        if before:
            losses = f"loss {format.metric('loss', before['loss'])} -> {format.metric('loss', after['loss'])}"
            text = f"{losses}, {task.text.change(before, after)}"
        lines.append(_entry("evaluation", text))
    lines += task.text.details(result.evaluation.model_dump() if result.evaluation else {})
    lines += table.lines({name: measured.model_dump() for name, measured in result.measured.items()})
    if result.baselines:
        lines.append(_entry("baselines", _baselines(result.baselines, before, after)))
    lines += simple_models.summary(result.simple_models)
    speed = f" at {format.rate(result.tokens_per_second)}" if result.tokens_per_second else ""
    times = f"{format.duration(result.train_seconds)} of training{speed}"
    cost = f"{format.duration(result.total_seconds)} in total, peak memory {format.memory(result.peak_memory_bytes)}"
    lines += [
        _entry("strategy", report.run.strategy),
        _entry("parameters", format.trainable(result.trainable_parameters, result.total_parameters)),
        _entry("cost", f"{times}, {cost}"),
    ]
    if held := result.quantization:
        sizes = f"{format.memory(held.weight_bytes)} instead of {format.memory(2 * held.parameters)} in 16 bits"
        lines.append(_entry("quantized", f"{format.percent(held.share)} of the base weights to {held.name}: {sizes}"))
    lines += result.comparison.lines if result.comparison else []
    if result.verified:
        lines.append(_entry("verified", _verified(result.verified)))
    return lines


def _entry(name: str, text: str) -> str:
    return f"{name:<16} {text}"


def _baselines(baselines: Baselines, before: dict[str, float] | None, after: dict[str, float]) -> str:
    """How far the losses are from those of models that know nothing, or only the frequencies of tokens."""

    def distance(loss: float, baseline: float, name: str) -> str:
        side = "above" if loss > baseline else "below"
        return f"{format.metric('loss', abs(loss - baseline))} {side} {name} {format.metric('loss', baseline)} nats/token"

    epochs = baselines.epochs or 0.0
    each = baselines.epoch_tokens * epochs / baselines.parameters
    initial = [f"initial loss {distance(before['loss'], baselines.uniform, 'uniform (ln V)')}"] if before else []
    final = f"final loss {distance(after['loss'], baselines.unigram, 'unigram')}"
    return "; ".join([*initial, final, f"{each:.2g} tokens per parameter in {epochs:.1f} epochs"])


def _verified(check: Verified) -> str:
    same = "bit for bit" if check.bit_equal else f"within {check.max_difference:.2g}"
    other = f" on the {check.device}" if check.device != check.trained_on else ""  # a GPU without room for a second model
    return f"reloaded with {check.loaded_with} in a fresh process{other}: the logits are the same {same}"
