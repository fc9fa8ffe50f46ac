"""A time limit that the schedule, the evaluations and the end of training follow."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Ends training after `limit` seconds of wall-clock time, evaluations and checkpoints included.

    Args:
        limit: seconds, counted over all sessions of a run that is resumed.
        interval: share of the limit between two evaluations with a checkpoint; None leaves them to the steps.
    """

    def __init__(self, limit: float, interval: float | None = None) -> None:
        self.limit, self.interval = limit, interval
        self.spent = 0.0
        self.is_over = False
        self._marks = 0
        self._last: float | None = None
        self._begun = self._step = 0.0

    def follow(self, given: Clock) -> None:
        """Take the settings of the recipe as it is now."""
        self.limit, self.interval = given.limit, given.interval
        self._marks = int(self.share / self.interval) if self.interval else 0

    @property
    def share(self) -> float:
        """Share of the time that is used, the same on every process."""
        return min(1.0, self.spent / self.limit)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step and self.spent + self._step > self.limit:  # it was over when it was cut off
            control.should_training_stop = self.is_over = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.monotonic()
        if self._last is None:  # the evaluation before training is not training
            self._last = self._begun

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        step = now - self._begun  # what the next one will take: an evaluation in between is no part of it
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
