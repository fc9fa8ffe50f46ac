"""Gradual unfreezing, from the top down (ULMFiT: Howard and Ruder 2018, arXiv 1801.06146, section 3.3)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback


class Thawing(TrainerCallback):
    """What learns is a function of the step alone, so a resumed run is the uninterrupted one.

    The optimiser knows all parameters from the start. Those still frozen get no gradient, and without one there is no
    state, no weight decay, and no backward pass below the lowest thawed block.

    Args:
        stages: the parameters' names; the first ones learn from the start, the others follow one by one.
        every: optimiser steps from one to the next.
    """

    def __init__(self, stages: list[set[str]], every: int) -> None:
        self.stages, self.every = stages, every
        self._of = {name: stage for stage, names in enumerate(stages) for name in names}

    def learning(self, step: int) -> int:
        """How many stages learn in the step after `step`."""
        return min(len(self.stages), 1 + step // self.every)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.set(model, self.learning(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.set(model, len(self.stages))  # what was declared to learn is what is counted

    def set(self, model: nn.Module | None, learning: int) -> None:
        for name, parameter in model.named_parameters() if model is not None else ():
            if name in self._of:
                parameter.requires_grad_(self._of[name] < learning)
