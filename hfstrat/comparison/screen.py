"""What a comparison says: a table that lives on a terminal, lines elsewhere."""

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
from hfstrat.comparison.entries import Asked, Line
from hfstrat.comparison.runs import Ending, Run

MARKS = {"done": "done", None: "waiting"}
TAIL = 4096  # bytes of a log that are looked at
NARROWEST = 18  # characters of a column that holds a sentence
PLAIN_WIDTH = 160


class Screen:
    """One voice for the whole comparison. Nothing runs beside it: it is redrawn when it is told to."""

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

    def remarks(self, asked: Asked, line: Line) -> None:
        what, seeds = ", ".join(entry.label for entry in line.entries), sheet.plural(asked.seeds, "seed")
        self.say(f"comparing {what}: {seeds} each, {asked.budget.text} a run, in {asked.output}")
        for remark in (*line.remarks, *(f"{name} is left out: {reason}" for name, reason in line.left_out.items())):
            self.say(remark)

    def begin(self, table: dict[str, Any], rows: Any) -> None:
        found = table["rows"]
        self.metric = table["quality"]["metric"]
        self.predicted = {row["label"]: row["predicted"].get("seconds") or 0.0 for row in table["entries"]}
        self._keep(table)
        self.say(
            f"{found['train_rows']:,} training rows ({found['train_tokens']:,} tokens an epoch); all are evaluated on the same "
            f"{found['eval_rows']:,} rows, by {sheet.metric_name(self.metric)}"
        )

    @contextmanager
    def watching(self, planned: list[Run], endings: dict[Run, Ending | None]) -> Iterator[None]:
        """Between the first run and the last."""
        self.planned, self.endings = planned, endings
        if kept := sum(ending is not None for ending in endings.values()):
            self.say(f"{kept} of {len(planned)} runs have ended already and are not run again")
        if not self.console.is_terminal or kept == len(planned):
            yield
            return
        with Live(self._drawn(), console=self.console, auto_refresh=False, transient=True) as self.live:
            yield
        self.live = None

    def starts(self, run: Run) -> None:
        self.running, self.since = run, time.monotonic()
        if self.live is None:
            self.say(f"[{self._number(run)}] {run.label}, seed {run.seed}: running; its log is {run.log}")
        self.look()

    def look(self) -> None:
        if self.live is not None:
            self.live.update(self._drawn(), refresh=True)

    def ended(self, run: Run, ending: Ending | None, table: dict[str, Any]) -> None:
        self.running = None
        self._keep(table)
        if self.live is None and ending is not None:
            left = self._left()
            self.say(f"[{self._number(run)}] {run.label}, seed {run.seed}: {self._outcome(run, ending, table)}{left}")
        self.look()

    def result(self, table: dict[str, Any], page: Path) -> None:
        """The whole table, what failed, and where more stands."""
        print_sheet(self.console, table)
        for line in (*sheet.summary(table), *sheet.failures(table), *sheet.remarks(table), f"report           {page}"):
            self.say(line)

    def _keep(self, table: dict[str, Any]) -> None:
        self.qualities = {(row["label"], run["seed"]): run.get("quality") for row in table["entries"] for run in row["runs"]}

    def _number(self, run: Run) -> str:
        return f"{self.planned.index(run) + 1}/{len(self.planned)}"

    def _outcome(self, run: Run, ending: Ending, table: dict[str, Any]) -> str:
        if not ending.is_done:
            return f"{sheet.STATUS.get(ending.status, ending.status)}: {ending.sentence}"
        row = next(row for row in table["entries"] if row["label"] == run.label)
        its = next(each for each in row["runs"] if each["seed"] == run.seed)
        name = sheet.metric_name(self.metric).removesuffix(" (nats/token)")
        said = [f"{name} {sheet.quality(its['quality'], self.metric)}", sheet.seconds(its["seconds"])]
        return ", ".join([*said, sheet.memory(its["peak_memory_bytes"])])

    def _left(self) -> str:
        """How long the others will take: told from those that have ended, by what was predicted of all."""
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
        return f"; about {sheet.seconds(max(left, 0))} left{'' if took else ', as predicted'}"

    def _takes(self, label: str, took: dict[str, list[float]]) -> float:
        """Seconds of a run: as others of its recipe, else as predicted, by as much as predictions were wrong so far."""
        if label in took:
            return mean(took[label])
        said = {other: self.predicted.get(other, 0.0) for other in (label, *took)}
        if not all(said.values()):
            return mean([seconds for several in took.values() for seconds in several])
        return said[label] * (mean([mean(several) / said[other] for other, several in took.items()]) if took else 1.0)

    def _drawn(self) -> Group:
        """What has ended and how, and the last line of the run that is going on."""
        seeds = list(dict.fromkeys(run.seed for run in self.planned))
        table = Table("", *(f"seed {seed}" for seed in seeds), title_justify="left")
        for label in dict.fromkeys(run.label for run in self.planned):
            table.add_row(escape(label), *(self._cell(run) for run in self.planned if run.label == label))
        done = sum(ending is not None for ending in self.endings.values())
        lines = [Text(f"{done} of {len(self.planned)} runs{self._left()}")]
        if self.running is not None:
            took = sheet.seconds(time.monotonic() - self.since)
            said = f"{self.running.label}, seed {self.running.seed} ({took}): {last_line(self.running.log)}"
            lines.append(Text(said, no_wrap=True, overflow="ellipsis"))
        return Group(table, *lines)

    def _cell(self, run: Run) -> Text:
        ending = self.endings.get(run)
        if run is self.running:
            return Text("running", style="bold")
        if ending is None:
            return Text("waiting", style="dim")
        if not ending.is_done:
            return Text(sheet.STATUS.get(ending.status, ending.status), style="red")
        return Text(sheet.quality(self.qualities.get((run.label, run.seed)), self.metric), style="green")


def last_line(log: Path) -> str:
    """The last thing that a run said."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")


def print_sheet(console: Console, table: dict[str, Any]) -> None:
    """The table; factors stand below it where its columns are too narrow for sentences."""
    lines, labels = sheet.sheet(table), [row["label"] for row in table["entries"]]
    shown = Table("", *(escape(label) for label in labels), title=f"{table['task']}, {table['budget']['text']} a run")
    shown.title_justify = "left"
    wide = (console.width - 26) / len(labels) >= NARROWEST
    for line in lines:
        if not line.is_empty and line.group != "sources" and (wide or line.group != "factors"):
            shown.add_row(escape(line.name), *(Text(cell, overflow="fold") for cell in line.cells))
    console.print(shown)
    if not wide:
        for at, label in enumerate(labels):
            said = "; ".join(f"{line.name}: {line.cells[at]}" for line in lines if line.group == "factors" and line.cells[at])
            console.print(f"{label}: {said}", markup=False, soft_wrap=True)
