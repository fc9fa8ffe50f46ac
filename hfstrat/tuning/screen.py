"""The progress of a search: a leaderboard that is redrawn on a terminal, lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hfstrat.recipe import format, screen
from hfstrat.tasks.base import Quality
from hfstrat.tuning import results
from hfstrat.tuning.schedule import Candidates, Next, Trial

if TYPE_CHECKING:
    from hfstrat.tuning.options import Setting

PLAIN_WIDTH = 160
SHOWN = 10  # trials of the leaderboard
LOSS = 4  # the column of the loss, left out where it is the metric


class Screen:
    """All output of a search. It uses no thread and is redrawn on request."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or screen.console(soft_wrap=False)
        if not self.console.is_terminal:
            self.console = screen.console(width=PLAIN_WIDTH, file=self.console.file)
        self.live: Live | None = None
        self.time = 0.0
        self.quality: Quality | None = None
        self.trials: list[Trial] = []
        self.names: dict[int, str] = {}
        self.current = ""

    def lines(self, lines: list[str]) -> None:
        for line in lines:
            self.console.print(line, markup=False, soft_wrap=True)

    def begin(self, setting: Setting, candidates: Candidates, elapsed: float) -> None:
        self.time = setting.options.time
        names = ", ".join((*candidates.at_once, *candidates.others))
        self.lines(
            [
                f"tuning {results.about(setting)}: {names}; searched: {', '.join(setting.options.search)}; "
                f"ready in {format.duration(self.time - elapsed)}, output {setting.options.folder}",
                *setting.lineup.remarks,
                *(f"{name} is excluded: {reason}" for name, reason in setting.lineup.excluded.items()),
            ]
        )
        if self.console.is_terminal:
            self.live = Live(self._drawn(elapsed), console=self.console, auto_refresh=False, transient=True)
            self.live.start()

    def starts(self, trial: Trial, params: dict[str, Any], action: Next, elapsed: float) -> None:
        self.names[trial.number] = name_of(trial, params)
        what = "measured" if action.bracket == 0 else f"rung {action.rung + 1}, trained for {format.duration(action.seconds)}"
        if action.is_direct:
            what = "the only candidate that the time allows, trained as the final run"
        self._says(f"#{trial.number} {self.names[trial.number]}: {what}", elapsed)

    def measured(self, trials: list[Trial], number: int, quality: Quality, elapsed: float) -> None:
        self.trials, self.quality = trials, quality
        trial = next(each for each in trials if each.number == number)
        rung = trial.rungs[-1]
        best, best_rung = results.leaderboard(trials)[0]
        now = f"{quality.metric} {format.metric(quality.metric, rung.info['quality'])}"
        now += "" if quality.metric == "loss" else f", loss {rung.loss:.4f}"
        leads = (
            "the best so far"
            if best.number == number
            else f"best so far: #{best.number} {best.label} " + format.metric(quality.metric, best_rung.info["quality"])
        )
        steps = f", {format.plural(rung.trunk + rung.cooldown, 'step')}" if rung.cooldown else ""
        self._says(f"#{number} {self.names.get(number, trial.label)}: {now}{steps}; {leads}", elapsed)

    def failed(self, trial: Trial, sentence: str) -> None:
        self.lines([f"#{trial.number} {self.names.get(trial.number, trial.label)} failed: {sentence}"])

    def finishing(self, trial: Trial, params: dict[str, Any], elapsed: float) -> None:
        self._says(f"finishing #{trial.number} {name_of(trial, params)}: evaluation, saving, verification", elapsed)

    def look(self, elapsed: float) -> None:
        if self.live is not None:
            self.live.update(self._drawn(elapsed), refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def result(self, table: results.Table, folder: Path) -> None:
        """The leaderboard, the result in words, and where everything is."""
        self.close()
        metric = table["quality"]["metric"]
        names = ["", "candidate", metric.replace("_", " "), "95% CI", "loss", "steps", "time", "memory"]
        shown = Table(*(name for at, name in enumerate(names) if at != LOSS or metric != "loss"))
        for each in [each for each in table["trials"] if "quality" in each][:SHOWN]:
            cells = [
                f"#{each['number']}",
                escape(f"{each['label']} {each['settings']}".strip()),
                *results.figures(each, metric),
            ]
            shown.add_row(*(cell for at, cell in enumerate(cells) if at != LOSS or metric != "loss"))
        self.console.print(shown)
        self.lines(
            [*results.sentences(table), *results.notes(table), f"model: {folder / 'final'}", f"report: {folder / results.PAGE}"]
        )

    def _says(self, line: str, elapsed: float) -> None:
        self.current = line
        left = format.duration(max(0.0, self.time - elapsed))
        if self.live is None:
            self.lines([f"[{left} left] {line}"])
        self.look(elapsed)

    def _drawn(self, elapsed: float) -> Group:
        table = Table("", "candidate", "quality", "loss", "rungs", "trained", title_justify="left")
        metric = self.quality.metric if self.quality else ""
        for trial, rung in results.leaderboard(self.trials)[:SHOWN]:
            table.add_row(
                f"#{trial.number}",
                escape(self.names.get(trial.number, trial.label)),
                format.metric(metric, rung.info["quality"]),
                f"{rung.loss:.4f}",
                str(len(trial.rungs)),
                format.duration(trial.trained),
            )
        left = f"{format.duration(max(0.0, self.time - elapsed))} left"
        return Group(table, Text(f"{left}; {self.current}", no_wrap=True, overflow="ellipsis"))


def name_of(trial: Trial, params: dict[str, Any]) -> str:
    """'lora (learning_rate 0.0003)'."""
    found = results.settings(params)
    return f"{trial.label} ({found})" if found else trial.label
