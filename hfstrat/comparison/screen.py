"""The output of a comparison: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hfstrat.comparison import sheet
from hfstrat.comparison.entries import Lineup, Request
from hfstrat.comparison.runs import Ending, Run
from hfstrat.recipe import format

TAIL = 4096  # bytes of a log that are read
NARROWEST = 18  # characters of a column that holds a sentence
PLAIN_WIDTH = 160


class Screen:
    """All output of a comparison. It uses no thread and is redrawn on request."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=PLAIN_WIDTH, file=self.console.file)
        self.live: Live | None = None
        self.planned: list[Run] = []
        self.endings: dict[Run, Ending | None] = {}
        self.metric = "loss"
        self.qualities: dict[tuple[str, int], float | None] = {}
        self.predicted: dict[str, float] = {}
        self.running: Run | None = None
        self.since = 0.0

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def remarks(self, request: Request, lineup: Lineup) -> None:
        names, seeds = ", ".join(entry.label for entry in lineup.entries), format.plural(request.seeds, "seed")
        self.say(f"comparing {names}: {seeds} each, budget per run {request.budget.text}, output {request.output}")
        for remark in (*lineup.remarks, *(f"{name} is excluded: {reason}" for name, reason in lineup.excluded.items())):
            self.say(remark)

    def begin(self, table: dict[str, Any]) -> None:
        data = table["rows"]
        self.metric = table["quality"]["metric"]
        self.predicted = {row["label"]: row["predicted"].get("seconds") or 0.0 for row in table["entries"]}
        self._read(table)
        self.say(
            f"{data['train_rows']:,} training examples ({data['train_tokens']:,} tokens per epoch); all are evaluated on the "
            f"same {data['eval_rows']:,} examples by {sheet.metric_name(self.metric)}"
        )

    @contextmanager
    def watching(self, planned: list[Run], endings: dict[Run, Ending | None]) -> Iterator[None]:
        """Show progress from the first run to the last."""
        self.planned, self.endings = planned, endings
        if ended := sum(ending is not None for ending in endings.values()):
            self.say(f"{ended} of {len(planned)} runs have ended already and are not repeated")
        if not self.console.is_terminal or ended == len(planned):
            yield
            return
        with Live(self._drawn(), console=self.console, auto_refresh=False, transient=True) as self.live:
            yield
        self.live = None

    def starts(self, run: Run) -> None:
        self.running, self.since = run, time.monotonic()
        if self.live is None:
            self.say(f"[{self._number(run)}] {run.label}, seed {run.seed}: running; log: {run.log}")
        self.look()

    def look(self) -> None:
        if self.live is not None:
            self.live.update(self._drawn(), refresh=True)

    def ended(self, run: Run, ending: Ending | None, table: dict[str, Any]) -> None:
        self.running = None
        self._read(table)
        if self.live is None and ending is not None:
            left = self._left()
            self.say(f"[{self._number(run)}] {run.label}, seed {run.seed}: {self._outcome(run, ending, table)}{left}")
        self.look()

    def result(self, table: dict[str, Any], page: Path) -> None:
        """The table, the summary, failures, and where the page is."""
        print_sheet(self.console, table)
        for line in (*sheet.summary(table), *sheet.failures(table), *sheet.remarks(table), f"report: {page}"):
            self.say(line)

    def _read(self, table: dict[str, Any]) -> None:
        self.qualities = {(row["label"], run["seed"]): run.get("quality") for row in table["entries"] for run in row["runs"]}

    def _number(self, run: Run) -> str:
        return f"{self.planned.index(run) + 1}/{len(self.planned)}"

    def _outcome(self, run: Run, ending: Ending, table: dict[str, Any]) -> str:
        if not ending.is_done:
            return f"{sheet.status_name(ending.status)}: {ending.sentence}"
        row = next(row for row in table["entries"] if row["label"] == run.label)
        its = next(each for each in row["runs"] if each["seed"] == run.seed)
        name = sheet.metric_name(self.metric).removesuffix(" (nats/token)")
        quality = f"{name} {format.metric(self.metric, its['quality'])}"
        return ", ".join([quality, format.duration(its["seconds"]), format.memory(its["peak_memory_bytes"])])

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
        seeds = list(dict.fromkeys(run.seed for run in self.planned))
        table = Table("", *(f"seed {seed}" for seed in seeds), title_justify="left")
        for label in dict.fromkeys(run.label for run in self.planned):
            table.add_row(escape(label), *(self._cell(run) for run in self.planned if run.label == label))
        done = sum(ending is not None for ending in self.endings.values())
        lines = [Text(f"{done} of {len(self.planned)} runs{self._left()}")]
        if self.running is not None:
            took = format.duration(time.monotonic() - self.since)
            current = f"{self.running.label}, seed {self.running.seed} ({took}): {last_line(self.running.log)}"
            lines.append(Text(current, no_wrap=True, overflow="ellipsis"))
        return Group(table, *lines)

    def _cell(self, run: Run) -> Text:
        ending = self.endings.get(run)
        if run is self.running:
            return Text("running", style="bold")
        if ending is None:
            return Text("waiting", style="dim")
        if not ending.is_done:
            return Text(sheet.status_name(ending.status), style="red")
        return Text(format.metric(self.metric, self.qualities.get((run.label, run.seed))), style="green")


def last_line(log: Path) -> str:
    """The last line of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")


def print_sheet(console: Console, table: dict[str, Any]) -> None:
    """The table; if its columns are too narrow for sentences, the factors are printed below."""
    lines, labels = sheet.sheet(table), [row["label"] for row in table["entries"]]
    shown = Table("", *(escape(label) for label in labels), title=f"{table['task']}, budget per run: {table['budget']['text']}")
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
