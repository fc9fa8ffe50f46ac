"""Progress of a run on the main process: a bar on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from transformers import TrainerCallback

from hfstrat.data.collate import BatchOrder
from hfstrat.data.dense import DenseOrder
from hfstrat.recipe import screen
from hfstrat.recipe.format import clock, rate
from hfstrat.trainer.streamed import StreamOrder

LINE_EVERY = 10.0  # seconds between progress lines without a terminal
LIVE_EVERY = 0.5  # seconds between updates of a notebook's progress


def make_console(main: bool) -> Console:
    found = screen.console(quiet=not main, soft_wrap=True)
    if not found.is_terminal:
        found = screen.console(quiet=not main, soft_wrap=True, width=120 if screen.in_notebook() else 200)
    return found


class ProgressReport(TrainerCallback):
    """Steps, loss, tokens per second (without padding), time left; evaluations, formatted by `describe`."""

    def __init__(
        self,
        console: Console,
        order: BatchOrder | DenseOrder | StreamOrder,
        time_limit: float | None,
        describe: Callable[[dict[str, float]], str],
    ) -> None:
        self.console, self.order, self.time_limit, self.describe = console, order, time_limit, describe
        self.tokens = 0
        self.trainer_counts = False  # whether the trainer counts tokens, because it generates examples itself
        self.seconds = 0.0  # of training with data loading, without evaluations and checkpoints
        self.loss: float | None = None
        self._bar: Progress | None = None
        self._live: screen.LiveText | None = None
        self.first_step = 0  # of this session
        self.curve: list[dict[str, float]] = []  # evaluations during training, with step, tokens and seconds since its start
        self._started = self._since = self._last_line = 0.0
        self._seen = 0  # tokens, if the trainer counts them
        self.speeds: list[dict[str, float]] = []  # tokens per second between logs; a resumed run has those of its start too
        self._logged = (0, 0.0)  # tokens and seconds at the last log

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._since = self._last_line = time.monotonic()
        self.first_step, self._seen = state.global_step, state.num_input_tokens_seen
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=self.console, transient=False)
            total = None if self.time_limit else state.max_steps
            self._task = self._bar.add_task("", total=total, completed=state.global_step, status="")
            self._bar.start()
        elif state.is_world_process_zero and not self.console.quiet and screen.in_notebook():
            self._live = screen.LiveText()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        seen = state.num_input_tokens_seen
        self.tokens += seen - self._seen if self.trainer_counts else self.order.tokens(state.global_step - 1)
        self._seen = seen
        if not control.should_log:  # else in on_log, with the loss of this step
            self._show(state, now)

    def _show(self, state: Any, now: float) -> None:
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, status=self._status(state, now))
        elif self._live is not None:
            if now - self._last_line > LIVE_EVERY or state.global_step == state.max_steps:
                self._last_line = now
                self._live.show(self._line(state, now))
        elif now - self._last_line > LINE_EVERY or state.global_step == state.max_steps:
            self._last_line = now
            total = "" if self.time_limit else f"/{state.max_steps}"
            self.console.print(f"step {state.global_step}{total}  {self._status(state, now)}")

    def _line(self, state: Any, now: float) -> str:
        """The progress of a notebook's run."""
        if self.time_limit:
            share, steps = (now - self._started) / self.time_limit, f"step {state.global_step}"
        else:
            share, steps = state.global_step / max(1, state.max_steps), f"step {state.global_step}/{state.max_steps}"
        return f"training {screen.bar(share)} {steps}  {self._status(state, now)}"

    def _status(self, state: Any, now: float) -> str:
        done = state.global_step - self.first_step
        if self.time_limit:
            left = max(0.0, self.time_limit - (now - self._started))
        else:
            left = self.seconds / max(done, 1) * (state.max_steps - state.global_step)
        loss = f"{self.measured} {self.loss:.3f}  " if self.loss is not None else ""
        speed = f"{rate(self.tokens_per_second)}  " if self.tokens else ""  # a solved head sees features, and no tokens
        return f"{loss}{speed}{clock(left)} left"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.measured = "reward" if "reward" in logs else "loss"  # the loss of a policy gradient says nothing
            self.loss = logs[self.measured]
            self._note_speed(state.global_step)
            self._show(state, self._since)

    def _note_speed(self, step: int) -> None:
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        if tokens > 0 and seconds > 0:
            self.speeds.append({"step": step, "tokens_per_second": tokens / seconds})
        self._logged = (self.tokens, self.seconds)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._since = time.monotonic()
        if metrics:
            self._started = self._started or self._since  # a solved head has no start of training
            at = {"step": state.global_step, "seconds": self._since - self._started, "tokens": self.tokens}
            self.curve.append({**at, **{name: value for name, value in metrics.items() if name.startswith("eval_")}})
        if metrics and state.is_world_process_zero:
            text = self.describe({name.removeprefix("eval_"): value for name, value in metrics.items()})
            self.console.print(f"evaluation at step {state.global_step}: {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._live = None


def show_answers(console: Console, answers: list[dict[str, str]]) -> None:
    """Print the answers to prompts before and after training, side by side."""
    if not answers:
        return
    table = Table(show_lines=True, width=min(console.width, 160))
    for name in ("prompt", "before", "after", "reference"):
        if name in ("prompt", "after") or any(answer.get(name) for answer in answers):
            table.add_column(name, ratio=3 if name == "prompt" else 2, overflow="fold")
    names = [str(column.header) for column in table.columns]
    for answer in answers:
        table.add_row(*(escape(_short(answer.get(name, ""))) for name in names))
    console.print(table)


def _short(text: str, limit: int = 420) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
