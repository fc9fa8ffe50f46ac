"""A model that is measured, and the loss bound to it: the one that training minimises, through supervised rows only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hfstrat import fused
from hfstrat.model import Base, main_dtype
from hfstrat.tasks import Task


@dataclass
class Subject:
    """A model with its tokenizer, for inference.

    Args:
        model: what is called; `inner` is the transformers model in it (itself, where there is no adapter).
    """

    model: Any
    inner: Any
    tokenizer: Any
    task: Task

    @classmethod
    def of(cls, model: Any, tokenizer: Any, task: Task) -> Subject:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return cls(model, inner, tokenizer, task)

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    def base(self) -> Base:
        """As tasks want it."""
        dtype = main_dtype(self.inner)
        return Base(self.inner, "", None, [], dtype, dtype, task=self.task)

    @property
    def context(self) -> int | None:
        """Positions that it has, where it says so."""
        config = self.inner.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """In evaluation mode, with the plain loss bound (not a student's), and afterwards as it was."""
        drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
        on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        was_training, kept = self.model.training, vars(self.inner).get("forward")
        self.model.eval()
        fused.unbind_head_loss(self.inner)
        try:
            if isinstance(self.inner, nn.Module) and hasattr(self.inner, "get_output_embeddings"):
                self.task.own_the_loss(self.base())
            yield
        finally:
            fused.unbind_head_loss(self.inner)
            if kept is not None:
                self.inner.forward = kept
            self.model.train(was_training)
            random.setstate(drawn[0])  # the harness seeds them all, and training has to go on as if nothing had been measured
            np.random.set_state(drawn[1])
            torch.set_rng_state(drawn[2])
            for index, state in enumerate(on_gpus):
                torch.cuda.set_rng_state(state, index)
