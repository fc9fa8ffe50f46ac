"""`hfstrat runs`: a table of the runs below a folder, and the differences of two runs. Reads reports; no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.tasks import report as reports
from hfstrat.tasks.report import Report, Result

SORTS = ("name", "loss", "time", "cost")
APART = {"output_dir", "hub"}  # of a recipe: where things go, not what is done
UNLIKE = {"data_sha256"}  # of an environment: named by file, and compared with the data
COMPARED = {"rows_kept", "tokens", "supervised", "sha256"}  # of the statistics of the data
METRICS = {"accuracy": "accuracy", "mae": "MAE", "bits_per_byte": "bits/byte", "perplexity": "perplexity"}


def find(folder: Path) -> list[tuple[Path, Report]]:
    """The runs below a folder (or in it) with their reports.

    Raises:
        UserError: the folder does not exist, or contains no run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that contains your output_dir")
    runs = list(reports.find(folder))
    if not runs:
        raise UserError(f"{folder}: no run below this folder (no report.json of hfstrat)")
    return runs


class Line(NamedTuple):
    """A run as a line of the table; numbers are None where the run did not finish."""

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

    @property
    def written(self) -> float:
        """When the report was written, in seconds since 1970."""
        return (self.run / reports.FILE).stat().st_mtime


def line_of(run: Path, report: Report) -> Line:
    """The line of one run."""
    recipe, result = report.run.recipe, report.result
    names = [Path(source.path).name for source in recipe.data.train]
    data = names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
    model = Path(recipe.model.name_or_path).name or format.MISSING
    known = Line(run, result.status, report.run.strategy, model, data)
    if not isinstance(result, Result):
        return known
    return known._replace(
        before=(result.metrics_before or {}).get("loss"),
        after=result.metrics_after["loss"],
        metric=_metric(result.metrics_after),
        trainable=result.trainable_parameters / result.total_parameters,
        seconds=result.total_seconds,
        memory=result.peak_memory_bytes,
    )


def _metric(after: dict[str, float]) -> str:
    """The most informative metric besides the loss."""
    key = next((key for key in METRICS if key in after), None)
    return f"{METRICS[key]} {format.metric(key, after[key])}" if key else format.MISSING


def table(folder: Path, sort: str) -> list[str]:
    """The lines of a table of the runs below a folder.

    Raises:
        UserError: an unknown order, or no runs.
    """
    if sort not in SORTS:
        raise UserError(f"--sort: {sort}; expected one of {', '.join(SORTS)}")
    lines = [line_of(run, report) for run, report in find(folder)]
    keys: dict[str, Callable[[Line], Any]] = {
        "name": lambda line: str(line.run),
        "loss": lambda line: (line.after is None, line.after or 0.0),
        "time": lambda line: -line.written,
        "cost": lambda line: (line.seconds is None, line.seconds or 0.0),
    }
    cells = [["run", "strategy", "model", "data", "loss before", "after", "metric", "trainable", "time", "memory"]]
    for line in sorted(lines, key=keys[sort]):
        name = str(line.run.relative_to(folder)) if line.run != folder else folder.name
        cells.append(
            [
                name + ("" if line.status == "done" else f" ({line.status})"),
                line.strategy,
                line.model,
                line.data,
                format.metric("loss", line.before),
                format.metric("loss", line.after),
                line.metric,
                format.percent(line.trainable, digits=2),
                format.duration(line.seconds),
                format.memory(line.memory),
            ]
        )
    return _aligned(cells)


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def diff(one: Path, two: Path) -> list[str]:
    """The differences of two runs in recipe, data, environment and result.

    Raises:
        UserError: one of the folders is not a run.
    """
    found = []
    for run in (one, two):
        report = reports.read(run)
        if report is None:
            raise UserError(f"{run}: not a run (no report.json of hfstrat in this folder)")
        found.append(report)
    lines: list[str] = []
    for title, parts in (
        ("recipe", [_recipe(report) for report in found]),
        ("data", [_data(report) for report in found]),
        ("environment", [_environment(report) for report in found]),
        ("result", [_result(report) for report in found]),
    ):
        left, right = parts
        keys = [key for key in [*left, *(key for key in right if key not in left)] if left.get(key) != right.get(key)]
        if keys:
            cells = [
                [f"  {key}", _text(left.get(key)), _text(right.get(key)), _change(left.get(key), right.get(key))]
                for key in keys
            ]
            lines += [title, *_aligned(cells)]
    same = ["recipe, data, environment and result are identical"]
    return [f"a: {one}", f"b: {two}", *(lines or same)]


def _recipe(report: Report) -> dict[str, Any]:
    return _flat(report.run.recipe.model_dump(exclude=APART))


def _data(report: Report) -> dict[str, Any]:
    """Fingerprints and counts: a file of the same name may hold other examples."""
    parts = report.run.data.model_dump(include={"train": COMPARED, "eval": COMPARED}) if report.run.data else {}
    return _flat(parts)


def _environment(report: Report) -> dict[str, Any]:
    return _flat(report.environment.model_dump(exclude=UNLIKE))


def _result(report: Report) -> dict[str, Any]:
    """The numbers of a result that people compare."""
    names = {
        *("status", "steps", "best_step", "train_seconds", "total_seconds", "tokens", "tokens_per_second"),
        *("peak_memory_bytes", "trainable_parameters", "total_parameters", "artifact_bytes"),
        *("metrics_before", "metrics_after"),
    }
    return _flat(report.result.model_dump(include=names))


def _flat(tree: dict[str, Any], under: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{under}{key}.") if isinstance(value, dict) and value else {f"{under}{key}": value}
    return flat


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
