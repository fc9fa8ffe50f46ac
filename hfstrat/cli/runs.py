"""`hfstrat runs`: a table of the runs below a folder, and the differences of two runs. Reads reports; no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.recipe.stored import flat
from hfstrat.tasks import report as reports
from hfstrat.tasks.report import Report, Result

APART = {"output_dir", "hub"}  # of a recipe: where things go, not what is done
UNLIKE = {"data_sha256"}  # of an environment: named by file, and compared with the data
COMPARED = {"rows_kept", "tokens", "supervised", "sha256"}  # of the statistics of the data: a file name says little
NUMBERS = {
    *("status", "steps", "best_step", "train_seconds", "total_seconds", "tokens", "tokens_per_second"),
    *("peak_memory_bytes", "trainable_parameters", "total_parameters", "artifact_bytes"),
    *("metrics_before", "metrics_after"),
}
METRICS = {"accuracy": "accuracy", "mae": "MAE", "bits_per_byte": "bits/byte", "perplexity": "perplexity"}


class Line(NamedTuple):
    """A run as a line of the table; numbers are None if the run did not finish."""

    run: Path
    status: str
    strategy: str
    model: str
    data: str
    before: float | None = None  # evaluation losses
    after: float | None = None
    metric: str = format.MISSING
    trainable: float | None = None  # share of the parameters
    seconds: float | None = None
    memory: int | None = None


SORTS: dict[str, Callable[[Line], Any]] = {
    "name": lambda line: str(line.run),
    "loss": lambda line: (line.after is None, line.after or 0.0),
    "time": lambda line: -(line.run / reports.FILE).stat().st_mtime,  # when the report was written
    "cost": lambda line: (line.seconds is None, line.seconds or 0.0),
}


def table(folder: Path, sort: str) -> list[str]:
    """The lines of a table of the runs below a folder (or in it).

    Raises:
        UserError: an unknown order, a folder that does not exist, or no runs.
    """
    if sort not in SORTS:
        raise UserError(f"--sort: {sort}; expected one of {', '.join(SORTS)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that contains your output_dir")
    lines = [line_of(run, report) for run, report in reports.find(folder)]
    if not lines:
        raise UserError(f"{folder}: no run below this folder (no report.json of hfstrat)")
    cells = [["run", "strategy", "model", "data", "loss before", "after", "metric", "trainable", "time", "memory"]]
    for line in sorted(lines, key=SORTS[sort]):
        name = str(line.run.relative_to(folder)) if line.run != folder else folder.name
        status = "" if line.status == "done" else f" ({line.status})"
        losses = [format.metric("loss", loss) for loss in (line.before, line.after)]
        costs = [format.percent(line.trainable, digits=2), format.duration(line.seconds), format.memory(line.memory)]
        cells.append([name + status, line.strategy, line.model, line.data, *losses, line.metric, *costs])
    return aligned(cells)


def line_of(run: Path, report: Report) -> Line:
    """The line of one run."""
    recipe, result = report.run.recipe, report.result
    names = [Path(source.path).name for source in recipe.data.train]
    data = names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
    model = Path(recipe.model.name_or_path).name or format.MISSING
    known = Line(run, result.status, report.run.strategy, model, data)
    if not isinstance(result, Result):
        return known
    after = result.metrics_after
    key = next((key for key in METRICS if key in after), None)  # the most informative metric besides the loss
    return known._replace(
        before=(result.metrics_before or {}).get("loss"),
        after=after["loss"],
        metric=f"{METRICS[key]} {format.metric(key, after[key])}" if key else format.MISSING,
        trainable=result.trainable_parameters / result.total_parameters,
        seconds=result.total_seconds,
        memory=result.peak_memory_bytes,
    )


def aligned(cells: list[list[str]]) -> list[str]:
    """Rows of cells as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def diff(one: Path, two: Path) -> list[str]:
    """The differences of two runs in recipe, data, environment and result. Raises UserError if one is not a run."""
    found = []
    for run in (one, two):
        report = reports.read(run)
        if report is None:
            raise UserError(f"{run}: not a run (no report.json of hfstrat in this folder)")
        found.append(_parts(report))
    lines: list[str] = []
    for title, left in found[0].items():
        right = found[1][title]
        keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
        pairs = [(key, left.get(key), right.get(key)) for key in keys]
        if pairs:
            lines += [title, *aligned([[f"  {key}", _text(a), _text(b), _change(a, b)] for key, a, b in pairs])]
    same = ["recipe, data, environment and result are identical"]
    return [f"a: {one}", f"b: {two}", *(lines or same)]


def _parts(report: Report) -> dict[str, dict[str, Any]]:
    """What is compared, by dotted keys."""
    return {
        "recipe": flat(report.run.recipe.model_dump(exclude=APART)),
        "data": flat(report.run.data.model_dump(include={"train": COMPARED, "eval": COMPARED}) if report.run.data else {}),
        "environment": flat(report.environment.model_dump(exclude=UNLIKE)),
        "result": flat(report.result.model_dump(include=NUMBERS)),
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "-" if value is None else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _change(one: Any, two: Any) -> str:
    """The difference of two numbers, absolute and relative."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, two))
    return f"{two - one:+.4g}" + (f" ({two / one - 1:+.1%})" if one else "") if numbers else ""
