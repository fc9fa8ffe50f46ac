"""Callbacks: time limit, early stopping, gradual unfreezing, overfitting warning and experiment trackers.

Those that end or change training keep their state in checkpoints, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState

from hfstrat.errors import first_line
from hfstrat.trainer.streamed import STREAM, StreamedSteps

if TYPE_CHECKING:
    from rich.console import Console

PrintLine = Callable[[str], None]


class Clock(TrainerCallback, ExportableState):
    """Ends training after `limit` seconds of wall-clock time, evaluations and checkpoints included.

    Args:
        limit: seconds, counted over all sessions of a run that is resumed.
        interval: share of the limit between two evaluations with a checkpoint; None: evaluations follow the steps.
    """

    def __init__(self, limit: float, interval: float | None = None) -> None:
        self.limit, self.interval = limit, interval
        self.spent = 0.0
        self.is_over = False
        self._marks = 0
        self._last: float | None = None
        self._begun = self._step = 0.0

    def follow(self, given: Clock) -> None:
        """Take over the settings of the present recipe."""
        self.limit, self.interval = given.limit, given.interval
        self._marks = int(self.share / self.interval) if self.interval else 0

    @property
    def share(self) -> float:
        """Share of the time limit that is used up, the same on every process."""
        return min(1.0, self.spent / self.limit)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step and self.spent + self._step > self.limit:  # it was over before the interruption
            control.should_training_stop = self.is_over = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.monotonic()
        if self._last is None:  # the evaluation before training is not training
            self._last = self._begun

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        step = now - self._begun  # the expected duration of the next one, without an evaluation in between
        self.spent += now - (self._last if self._last is not None else now)
        self._last = now
        if args.world_size > 1:  # the clocks differ; the first process's decides
            shared = broadcast(torch.tensor([self.spent, step], dtype=torch.float64, device=args.device))
            self.spent, step = shared.tolist()
        self._step = step
        if self.spent + step > self.limit:
            control.should_training_stop = self.is_over = True
            control.should_evaluate = control.should_save = True
        elif self.interval is not None and self.share >= (self._marks + 1) * self.interval:
            self._marks = int(self.share / self.interval)
            control.should_evaluate = control.should_save = True
        return control

    def state(self) -> dict[str, Any]:
        return {
            "args": {"limit": self.limit, "interval": self.interval},
            "attributes": {"spent": self.spent, "_marks": self._marks, "_step": self._step},
        }


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Ends training after `early_stopping_patience` evaluations without an improvement; the one before training counts."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:  # it was over before the interruption
            control.should_training_stop = True

    def follow(self, given: Any) -> None:
        """Take over the settings of the present recipe."""
        self.early_stopping_patience = given.early_stopping_patience


class Thawing(TrainerCallback):  # type: ignore[misc]
    """Gradual unfreezing from the top down (ULMFiT: Howard and Ruder 2018, arXiv 1801.06146, section 3.3).

    The trainable parameters depend on the step only, so that a resumed run equals an uninterrupted one. The optimizer has all
    parameters from the start. Frozen ones get no gradient, hence no state and no weight decay, and there is no backward pass
    below the lowest trainable block.

    Args:
        stages: names of parameters; the first stage is trainable from the start, the others follow one by one.
        every: optimizer steps from one stage to the next.
    """

    def __init__(self, stages: list[set[str]], every: int) -> None:
        self.stages, self.every = stages, every
        self._stage = {name: stage for stage, names in enumerate(stages) for name in names}

    def trainable_stages(self, step: int) -> int:
        """The number of stages that are trainable in the step after `step`."""
        return min(len(self.stages), 1 + step // self.every)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.set(model, self.trainable_stages(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.set(model, len(self.stages))  # all of them count as trainable parameters

    def set(self, model: nn.Module | None, trainable: int) -> None:
        for name, parameter in model.named_parameters() if model is not None else ():
            if name in self._stage:
                parameter.requires_grad_(self._stage[name] < trainable)


def overfitting(history: list[dict[str, Any]], margins: Mapping[str, float] | None = None) -> list[dict[str, float]]:
    """The evaluations at which the evaluation loss rose, beyond what may be due to chance, while the training loss fell.

    Args:
        history: the Trainer's log; the training loss of an evaluation is the mean of those logged since the one before.
        margins: half of the interval of each change of the evaluation loss, by step.
    """
    found, losses, before = [], list[float](), None
    for entry in history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_loss" not in entry or not losses:
            continue
        now = {"step": entry["step"], "train_loss": sum(losses) / len(losses), "eval_loss": entry["eval_loss"]}
        margin = (margins or {}).get(str(entry["step"]), 0.0)
        if before and now["eval_loss"] - before["eval_loss"] > margin and now["train_loss"] < before["train_loss"]:
            found.append(now)
        before, losses = now, []
    return found


class OverfittingAlarm(TrainerCallback):
    """Prints a warning at the evaluation that shows overfitting."""

    def __init__(self, console: Console, margins: Mapping[str, float] | None = None) -> None:
        self.console, self.margins = console, margins or {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = overfitting(state.log_history, self.margins)
        if found and state.is_world_process_zero and state.log_history[-1].get("eval_loss") == found[-1]["eval_loss"]:
            last = found[-1]
            advice = "" if args.load_best_model_at_end else "; training.load_best_model_at_end: true keeps the best weights"
            self.console.print(
                f"warning: overfitting at step {state.global_step}: the evaluation loss rose to {last['eval_loss']:.4f} while "
                f"the training loss fell to {last['train_loss']:.4f}; training.early_stopping_patience would stop here{advice}"
            )


class Tracker(TrainerCallback):  # type: ignore[misc]
    """The Trainer's own callback for one tracker, until it fails: then the run continues without it, with a message.

    It is detached after training, since measuring the result would start a second run in the tracker.

    Args:
        name: as in `training.report_to`.
        print_line: shows a line to the user.
    """

    def __init__(self, name: str, print_line: PrintLine) -> None:
        self.name, self.print_line = name, print_line
        self.inner: Any = self.guard(lambda: get_reporting_integration_callbacks([name])[0]())

    def guard(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a call; None after a failure, which detaches the tracker."""
        try:
            return call(*args, **kwargs)
        except Exception as error:  # a service, a disk, a version: trackers fail in many ways
            self.inner = None
            self.print_line(f"{'tracker':<9} {self.name} failed, and the run continues without it: {first_line(error)}")
            return None


def _forward_event(event: str) -> Callable[..., Any]:
    def method(self: Tracker, *args: Any, **kwargs: Any) -> Any:
        given = self.guard(getattr(self.inner, event), *args, **kwargs) if self.inner is not None else None
        if event == "on_train_end":
            self.inner = None
        return given

    return method


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Tracker, _event, _forward_event(_event))


def tracker_callbacks(names: Sequence[str], print_line: PrintLine) -> list[Tracker]:
    """A callback for each tracker of `training.report_to`."""
    prepare_trackers(names)
    return [Tracker(name, print_line) for name in names]


def prepare_trackers(names: Sequence[str]) -> None:
    """Set trackers that would require a login to work offline."""
    if "wandb" in names and not os.environ.get("WANDB_API_KEY") and not _has_wandb_login():
        os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` uploads the run later


def _has_wandb_login() -> bool:
    """Whether `wandb login` stored a key."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "wandb" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False


class StreamPosition(TrainerCallback):
    """Keeps the position after the last step in the content of a checkpoint's marker."""

    def __init__(self, rows: StreamedSteps, marker: dict[str, Any]) -> None:
        self.rows, self.marker = rows, marker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marker[STREAM] = self.rows.position(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marker[STREAM] = self.rows.position(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.count_until(state.global_step)
