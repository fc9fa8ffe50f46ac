"""How far a measurement is and how long it takes still: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from typing import Any

from rich import progress
from rich.console import Console

from hfstrat.console import LINE_EVERY, clock_text


class Progress:
    """Counts work, in any unit that takes about the same time each.

    Args:
        total: of it; longest rows come first, so the time left is rather too long than too short.
    """

    def __init__(self, screen: Console, words: str, total: int) -> None:
        self.screen, self.words, self.total, self.done = screen, words, max(1, total), 0.0
        self._bar: progress.Progress | None = None

    def __enter__(self) -> Progress:
        self._started = self._last = time.monotonic()
        if self.screen.is_terminal and not self.screen.quiet:
            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=self.screen, transient=True)
            self._task = self._bar.add_task(self.words, total=self.total)
            self._bar.start()
        return self

    def advance(self, work: float) -> None:
        self.done += work
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif now - self._last > LINE_EVERY and self.done < self.total:
            self._last = now
            left = (now - self._started) * (self.total - self.done) / self.done
            self.screen.print(f"{self.words}: {self.done / self.total:.0%}, {clock_text(left)} left")

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
