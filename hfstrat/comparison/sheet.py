"""The table of a comparison as text, one column per recipe and one line per measure or factor; terminal and page share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hfstrat.recipe import format
from hfstrat.recipe.format import MISSING
from hfstrat.strategies import defaults

Row = dict[str, Any]
METRICS = {"loss": "loss (nats/token)", "bits_per_byte": "bits per byte"}
COSTS = {"seconds": "time", "memory": "memory"}
MEASURED = {"seconds": "seconds", "memory": "peak_memory_bytes"}
PREDICTED = {"seconds": "seconds", "memory": "memory_bytes"}
STATUS = {"out-of-memory": "out of memory", "timed-out": "timed out"}


class Line(NamedTuple):
    """One line of the table: its name, a cell per recipe, and its group."""

    name: str
    cells: list[str]
    group: str = "measured"

    @property
    def is_empty(self) -> bool:
        return all(cell == MISSING for cell in self.cells)


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def status_name(status: str) -> str:
    return STATUS.get(status, status)


def sheet(table: Row) -> list[Line]:
    """All lines from top to bottom."""
    rows, metric = table["entries"], table["quality"]["metric"]
    several = any(row["label"] != row["strategy"] for row in rows)

    def line(name: str, cell: Callable[[Row], str], group: str = "measured") -> Line:
        return Line(name, [cell(row) for row in rows], group)

    lines = [line("strategy", lambda row: row["strategy"])] if several else []
    lines += [
        line("runs", finished_runs),
        line(metric_name(metric), lambda row: format.metric(metric, row["quality"])),
        line("  95% CI, seeds", lambda row: interval(row["over_seeds"], metric)),
        line("  95% CI, examples", lambda row: interval(row.get("over_rows"), metric)),
        line("  versus the best", lambda row: versus_best(row, table)),
        line("  before training", lambda row: format.metric(metric, row["before"])),
        line("time", lambda row: format.duration(row["seconds"])),
        line("  predicted", lambda row: predicted(row, "seconds", format.duration), "predicted"),
        line("tokens/s", lambda row: format.count(row["tokens_per_second"] or None)),
        line("peak memory", lambda row: format.memory(row["peak_memory_bytes"])),
        line("  predicted", lambda row: predicted(row, "memory", format.memory), "predicted"),
        line("trainable params", lambda row: format.count(row["trainable_parameters"])),
        line("  all params", lambda row: format.count(row["total_parameters"])),
        line("artifact size", lambda row: format.file_size(row["artifact_bytes"])),
        line("Pareto-optimal in", pareto_costs),
        line("advisor's rank", lambda row: str(row["predicted"].get("rank", MISSING)), "predicted"),
        line("advisor's reasons", lambda row: row["predicted"].get("verdict") or MISSING, "predicted"),
        line("  sources", lambda row: row["predicted"].get("source") or MISSING, "sources"),
        line("data given", lambda row: data_given(row, table), "factors"),
    ]
    if several:
        lines.append(line("model", lambda row: row["model"], "factors"))
    return lines + [
        line(name, lambda row, key=key: row["factors"][key], "factors")  # type: ignore[misc]
        for key, name in zip(defaults.Factors._fields, defaults.FACTOR_NAMES, strict=True)
    ]


def interval(bounds: Any, metric: str) -> str:
    return format.interval(metric, *bounds) if bounds else MISSING


def data_given(row: Row, table: Row) -> str:
    """'4,758 examples, 394k tokens: 1.5 per trainable parameter'."""
    facts, trainable = table["rows"], row["trainable_parameters"]
    given = f"{facts['train_rows']:,} examples, {format.count(facts['train_tokens'])} tokens"
    if not trainable:
        return given
    ratio = facts["train_tokens"] / trainable
    return f"{given}: {f'{ratio:.2g}' if ratio >= 0.01 else 'under 0.01'} per trainable parameter"


def finished_runs(row: Row) -> str:
    """'3 of 3', or '2 of 3: out of memory'."""
    finished = f"{row['finished']} of {len(row['runs'])}"
    return finished if row["status"] == "done" else f"{finished}: {status_name(row['status'])}"


def versus_best(row: Row, table: Row) -> str:
    """'-1.2 pp (-2.4 to +0.1), not significant'."""
    if row["label"] == table["best"]:
        return "best"
    found, metric = row.get("against_best"), table["quality"]["metric"]
    if not found:
        return MISSING
    difference, low, high = (format.difference(metric, found[key]) for key in ("difference", "low", "high"))
    return f"{difference} ({low.removesuffix(' pp')} to {high}){'' if found['significant'] else ', not significant'}"


def predicted(row: Row, what: str, say: Callable[[float | None], str]) -> str:
    """'34s (30s to 41s)', with the error if the measurement is outside; empty if nothing was predicted."""
    value, band = row["predicted"].get(PREDICTED[what]), row["predicted"].get(f"{what}_band")
    if value is None:
        return MISSING
    missed = f", off by {abs(row[MEASURED[what]] / value - 1):.0%}" if is_within(row, what) is False else ""
    return say(value) + (f" ({say(band[0])} to {say(band[1])})" if band else "") + missed


def is_within(row: Row, what: str) -> bool | None:
    """Whether the measurement is within the predicted band; None if one of them is missing."""
    band, measured = row["predicted"].get(f"{what}_band"), row[MEASURED[what]]
    return None if not band or measured is None else bool(band[0] <= measured <= band[1])


def pareto_costs(row: Row) -> str:
    """The costs for which no other recipe is better at no higher cost."""
    return ", ".join(COSTS[cost] for cost, is_on in row.get("front", {}).items() if is_on) or MISSING


def summary(table: Row) -> list[str]:
    """The results in sentences."""
    rows, metric = table["entries"], table["quality"]["metric"]
    best = next((row for row in rows if row["label"] == table["best"]), None)
    if best is None:
        return []
    close = [row["label"] for row in rows if (found := row.get("against_best")) and not found["significant"]]
    tied = f"; not significantly worse: {', '.join(close)}" if close else ""
    lines = [f"best: {best['label']}, {metric_name(metric)} {format.metric(metric, best['quality'])}{tied}"]
    for cost, name in COSTS.items():
        if optimal := [row["label"] for row in rows if row.get("front", {}).get(cost)]:
            lines.append(f"Pareto-optimal in quality and {name}: {', '.join(optimal)}")
    return lines + _advisor(table, best)


def _advisor(table: Row, best: Row) -> list[str]:
    """How the advisor's first choice did, and how many measurements are within its predictions."""
    rows = table["entries"]
    first = next((row for row in rows if row["predicted"].get("rank") == 1), None)
    if first is None or len(rows) < 2:
        return []
    if first is best:
        result = "which is best"
    elif first["quality"] is None:
        result = "which did not finish" if first["status"] not in ("waiting", "running") else "which has not run yet"
    else:
        result = f"versus the best: {versus_best(first, table)}"
    lines = [f"the advisor's first choice was {first['label']}, {result}"]
    for what, name in COSTS.items():
        within = [found for row in rows if (found := is_within(row, what)) is not None]
        if within:
            lines.append(f"{name} was within the predicted range for {sum(within)} of {len(within)}")
    return lines


def failures(table: Row) -> list[str]:
    """A sentence for each failed run and each excluded strategy."""
    failed = [
        f"{row['label']}, seed {run['seed']}: {status_name(run['status'])}: {run['sentence']}"
        for row in table["entries"]
        for run in row["runs"]
        if run["status"] not in ("done", "waiting", "running")
    ]
    return failed + [f"{name} is excluded: {reason}" for name, reason in table["excluded"].items()]


def remarks(table: Row) -> list[str]:
    """What has to be known to interpret the numbers."""
    lines = []
    if len(table["seeds"]) < 2:
        lines.append("one seed only: the variation over seeds is unknown (--seeds 3)")
    if (few := table["rows"]["eval_rows"]) < 100:
        lines.append(f"only {format.plural(few, 'evaluation example')}: only large differences are significant")
    if table["budget"]["kind"] == "time":
        limit = table["budget"]["amount"]
        for row in table["entries"]:
            if any(run.get("steps") == 1 and run.get("train_seconds", 0) > limit and run["tokens"] for run in row["runs"]):
                lines.append(f"{row['label']}: its only step took longer than the budget")
    return lines
