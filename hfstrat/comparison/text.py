"""A comparison as text: the table and its sentences, which the page shares, and the progress on the terminal.

The table has one column per recipe and one line per measure or factor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hfstrat.comparison.processes import Ending, Run
from hfstrat.engine.entries import Lineup, Request
from hfstrat.recipe import format, screen
from hfstrat.recipe.format import MISSING, plural
from hfstrat.strategies import defaults
from hfstrat.tasks import TASKS, CausalLM

TAIL = 4096  # bytes of a log that are read
NARROWEST = 18  # characters of a column that holds a sentence
PLAIN_WIDTH = 160
Row = dict[str, Any]
COSTS = {"seconds": "time", "memory": "memory"}  # with the keys of a measurement and of its prediction:
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


def metric_name(metric: str, task: str) -> str:
    """A metric in words, with the unit of the task's loss."""
    return f"loss ({TASKS[task].text.loss_unit})" if metric == "loss" else metric.replace("_", " ")


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
        line(metric_name(metric, table["task"]), lambda row: format.metric(metric, row["quality"])),
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
    given = f"{plural(facts['train_rows'], 'example')}, {format.count(facts['train_tokens'])} tokens"
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


def predicted(row: Row, what: str, shown: Callable[[float | None], str]) -> str:
    """'34s (30s to 41s)', with the error if the measurement is outside; empty if nothing was predicted."""
    value, band = row["predicted"].get(PREDICTED[what]), row["predicted"].get(f"{what}_band")
    if value is None:
        return MISSING
    missed = f", off by {abs(row[MEASURED[what]] / value - 1):.0%}" if is_within(row, what) is False else ""
    return shown(value) + (f" ({shown(band[0])} to {shown(band[1])})" if band else "") + missed


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
    lines = [f"best: {best['label']}, {metric_name(metric, table['task'])} {format.metric(metric, best['quality'])}{tied}"]
    for cost, name in COSTS.items():
        if optimal := [row["label"] for row in rows if row.get("front", {}).get(cost)]:
            lines.append(f"Pareto-optimal in quality and {name}: {', '.join(optimal)}")
    return lines + baselines(table) + _advisor(table, best)


def baselines(table: Row) -> list[str]:
    """What a recipe has to beat, and those that are not better beyond chance; none in comparisons of earlier versions."""
    metric, found = table["quality"]["metric"], table.get("baselines", [])
    sign = 1 if table["quality"]["higher_is_better"] else -1
    lines = []
    for one in found:
        value = f"{metric_name(metric, table['task'])} {format.metric(metric, one['quality'])}"
        bounds = f"95% CI {interval(one['over_rows'], metric)}"
        behind = [
            label
            for label, difference in one["differences"].items()
            if not (difference["significant"] and sign * difference["difference"] > 0)
        ]
        remark = f"; not significantly better: {', '.join(behind)}" if behind else ""
        lines.append(f"baseline {one['name']}: {value} ({bounds}){remark}")
    return lines


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


# on the terminal


class Screen:
    """All output of a comparison: a live table on a terminal, lines elsewhere. It uses no thread and is redrawn on request."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or screen.console(soft_wrap=False)
        if not self.console.is_terminal:
            self.console = screen.console(width=PLAIN_WIDTH, file=self.console.file)
        self.live: Live | None = None
        self.endings: dict[Run, Ending | None] = {}  # of all runs, in their order
        self.rows: dict[tuple[str, int], Row] = {}  # of the table, by recipe and seed
        self.metric, self.task = "loss", CausalLM.name
        self.predicted: dict[str, float] = {}
        self.running: Run | None = None
        self.since = 0.0

    def show(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def remarks(self, request: Request, lineup: Lineup) -> None:
        names, seeds = ", ".join(entry.label for entry in lineup.entries), format.plural(request.seeds, "seed")
        self.show(f"comparing {names}: {seeds} each, budget per run {request.budget.text}, output {request.output}")
        for remark in (*lineup.remarks, *(f"{name} is excluded: {reason}" for name, reason in lineup.excluded.items())):
            self.show(remark)

    def begin(self, table: Row, endings: dict[Run, Ending | None]) -> None:
        data, self.endings = table["rows"], endings
        self.metric, self.task = table["quality"]["metric"], table["task"]
        self.predicted = {row["label"]: row["predicted"].get("seconds") or 0.0 for row in table["entries"]}
        self._read(table)
        self.show(
            f"{data['train_rows']:,} training examples ({data['train_tokens']:,} tokens per epoch); all are evaluated on the "
            f"same {data['eval_rows']:,} examples by {metric_name(self.metric, self.task)}"
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show progress from the first run to the last."""
        if ended := self._ended():
            self.show(f"{ended} of {len(self.endings)} runs have ended already and are not repeated")
        if not self.console.is_terminal or ended == len(self.endings):
            yield
            return
        with Live(self._drawn(), console=self.console, auto_refresh=False, transient=True) as self.live:
            yield
        self.live = None

    def starts(self, run: Run) -> None:
        self.running, self.since = run, time.monotonic()
        if self.live is None:
            self.show(f"{self._name(run)}: running; log: {run.log}")
        self.look()

    def look(self) -> None:
        if self.live is not None:
            self.live.update(self._drawn(), refresh=True)

    def ended(self, run: Run, ending: Ending, table: Row) -> None:
        self.running = None
        self._read(table)
        if self.live is None:
            self.show(f"{self._name(run)}: {self._outcome(run, ending)}{self._left()}")
        self.look()

    def result(self, table: Row, page: Path) -> None:
        """The table, the summary, failures, and where the page is."""
        print_sheet(self.console, table)
        for line in (*summary(table), *failures(table), *remarks(table), f"report: {page}"):
            self.show(line)

    def _read(self, table: Row) -> None:
        self.rows = {(row["label"], run["seed"]): run for row in table["entries"] for run in row["runs"]}

    def _ended(self) -> int:
        return sum(ending is not None for ending in self.endings.values())

    def _name(self, run: Run) -> str:
        return f"[{list(self.endings).index(run) + 1}/{len(self.endings)}] {run.label}, seed {run.seed}"

    def _outcome(self, run: Run, ending: Ending) -> str:
        if not ending.is_done:
            return f"{status_name(ending.status)}: {ending.sentence}"
        row, name = self.rows[run.label, run.seed], metric_name(self.metric, self.task).partition(" (")[0]
        quality = f"{name} {format.metric(self.metric, row['quality'])}"
        return ", ".join([quality, format.duration(row["seconds"]), format.memory(row["peak_memory_bytes"])])

    def _left(self) -> str:
        """The time that the other runs will take, estimated from finished runs and predictions."""
        took: dict[str, list[float]] = {}
        for run, ending in self.endings.items():
            if ending is not None:
                took.setdefault(run.label, []).append(ending.wall_seconds)
        waiting = [run for run, ending in self.endings.items() if ending is None]
        if not waiting or not (took or all(self.predicted.get(run.label) for run in waiting)):
            return ""
        each = {run.label: self._takes(run.label, took) for run in waiting}
        left = sum(each[run.label] for run in waiting)
        if self.running is not None:
            left -= min(time.monotonic() - self.since, each.get(self.running.label, left))
        return f"; about {format.duration(max(left, 0))} left{'' if took else ' (predicted)'}"

    def _takes(self, label: str, took: dict[str, list[float]]) -> float:
        """Seconds of a run: the mean of its recipe, otherwise its prediction, scaled by the error of the predictions so far."""
        if label in took:
            return mean(took[label])
        predicted = {other: self.predicted.get(other, 0.0) for other in (label, *took)}
        if not all(predicted.values()):
            return mean([seconds for several in took.values() for seconds in several])
        return predicted[label] * (mean([mean(several) / predicted[other] for other, several in took.items()]) if took else 1.0)

    def _drawn(self) -> Group:
        """The ending of each run, and the last log line of the current one."""
        table = Table("", *(f"seed {seed}" for seed in dict.fromkeys(run.seed for run in self.endings)), title_justify="left")
        for label in dict.fromkeys(run.label for run in self.endings):
            table.add_row(escape(label), *(self._cell(run) for run in self.endings if run.label == label))
        lines = [Text(f"{self._ended()} of {len(self.endings)} runs{self._left()}")]
        if self.running is not None:
            took = format.duration(time.monotonic() - self.since)
            current = f"{self.running.label}, seed {self.running.seed} ({took}): {last_line(self.running.log)}"
            lines.append(Text(current, no_wrap=True, overflow="ellipsis"))
        return Group(table, *lines)

    def _cell(self, run: Run) -> Text:
        ending = self.endings[run]
        if run is self.running:
            return Text("running", style="bold")
        if ending is None:
            return Text("waiting", style="dim")
        if not ending.is_done:
            return Text(status_name(ending.status), style="red")
        return Text(format.metric(self.metric, self.rows[run.label, run.seed].get("quality")), style="green")


def last_line(log: Path) -> str:
    """The last line of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")


def title(table: Row) -> str:
    about = f": {table['about']}" if table.get("about") else ""
    return f"{table['task']}{about}, budget per run: {table['budget']['text']}"


def print_sheet(console: Console, table: Row) -> None:
    """The table; if its columns are too narrow for sentences, the factors are printed below."""
    lines, labels = sheet(table), [row["label"] for row in table["entries"]]
    shown = Table("", *(escape(label) for label in labels), title=title(table))
    shown.title_justify = "left"
    wide = (console.width - 26) / len(labels) >= NARROWEST
    for line in lines:
        if not line.is_empty and line.group != "sources" and (wide or line.group != "factors"):
            shown.add_row(escape(line.name), *(Text(cell, overflow="fold") for cell in line.cells))
    console.print(shown)
    if not wide:
        for at, label in enumerate(labels):
            factors = "; ".join(
                f"{line.name}: {line.cells[at]}" for line in lines if line.group == "factors" and line.cells[at]
            )
            console.print(f"{label}: {'; '.join(factors)}", markup=False, soft_wrap=True)
