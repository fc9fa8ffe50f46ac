"""How far a measurement is and how long it takes still: a bar on a terminal, else a line now and then.

Forward passes over rows, longest first, in batches of like length and few widths; of each row a few numbers are kept.

They stay on the device until all rows are through, and are put back into the rows' own order: a result depends neither on the
size of the batches nor on the number of processes, of which each takes every so-manyth batch.


A model that is measured, and the loss bound to it: the one that training minimises, through supervised rows only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import progress
from rich.console import Console
from torch import nn

from hfstrat.data.collate import rounded
from hfstrat.models import fused_loss
from hfstrat.models.load import Base, main_dtype
from hfstrat.tasks.base import Task
from hfstrat.trainer.batching import multiple_for
from hfstrat.trainer.progress import LINE_EVERY, clock_text


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


CPU_TOKENS, GPU_TOKENS = 2048, 32_768  # of a forward pass, where nobody says it


Step = Callable[[list[int]], tuple[torch.Tensor, ...]]
"""From places of rows to what is kept of each: tensors whose first dimension is those rows."""


@dataclass
class Runner:
    """Where and how forward passes run.

    Args:
        dtype: of the forward pass: autocast where it is not float32.
        tokens: of one pass, padding included; "auto" by the device.
        processes, rank: of those that share the rows; all of them have to call the same things in the same order.
    """

    device: torch.device
    dtype: torch.dtype
    screen: Console
    tokens: int | str = "auto"
    processes: int = 1
    rank: int = 0

    @property
    def budget(self) -> int:
        if isinstance(self.tokens, int):
            return self.tokens
        return GPU_TOKENS if self.device.type == "cuda" else CPU_TOKENS

    @property
    def multiple(self) -> int:
        return multiple_for(self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def batches(self, lengths: np.ndarray, packed: int = 0) -> list[list[int]]:
        """Places of rows, longest first, as many together as the budget holds.

        Args:
            packed: width of what rows stand in one behind the other. Those that fit are dealt out, so that passes are alike:
                long and short ones together pad little, and there is one shape to compile kernels for.
        """
        order, found, start = np.argsort(-lengths, kind="stable"), list[list[int]](), 0
        plain = order[lengths[order] > packed]
        while start < len(plain):
            width = rounded(max(1, int(lengths[plain[start]])), self.multiple)
            count = max(1, self.budget // width)
            found.append(plain[start : start + count].tolist())
            start += count
        rest = order[len(plain) :]
        passes = -(-int(lengths[rest].sum()) // self.budget)
        return found + [rest[number::passes].tolist() for number in range(min(passes, len(rest)))]

    def share(self, batches: Sequence[Any]) -> list[tuple[Any, bool]]:
        """This process's batches, and whether each counts: all processes run as many (sharded models wait for each other)."""
        steps = -(-len(batches) // self.processes)
        places = [self.rank + self.processes * step for step in range(steps)]
        return [(batches[min(place, len(batches) - 1)], place < len(batches)) for place in places]

    def per_row(
        self,
        words: str,
        lengths: np.ndarray,
        step: Step,
        progress: Progress | None = None,
        work: float | None = None,
        packed: int = 0,
    ) -> tuple[np.ndarray, ...]:
        """What `step` says of every row, in their order, on every process.

        Args:
            progress: to be moved on by `work`, where these rows are a part of more; else there is one of its own.
            packed: see `batches`.
        """
        mine, kept, places = self.share(self.batches(lengths, packed)), list[tuple[torch.Tensor, ...]](), list[int]()
        tokens = sum(int(lengths[batch].sum()) for batch, _ in mine)
        shown = nullcontext(progress) if progress is not None else Progress(self.screen, words, tokens)
        size = 1.0 if work is None else work / max(1, tokens)
        with shown as progress, self.computing():
            for batch, counts in mine:
                for part, numbers in self._careful(batch, step):
                    if counts:
                        kept.append(numbers)
                        places += part
                progress.advance(size * int(lengths[batch].sum()))
        arrays = [torch.cat(column).cpu().numpy() for column in zip(*kept, strict=True)] if kept else []
        return self._gathered(len(lengths), np.array(places, dtype=np.int64), arrays)

    def _careful(self, batch: list[int], step: Step) -> list[tuple[list[int], tuple[torch.Tensor, ...]]]:
        """The batch in one pass, or in halves where the device's memory does not hold it."""
        try:
            return [(batch, step(batch))]
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return [*self._careful(batch[:half], step), *self._careful(batch[half:], step)]

    def _gathered(self, rows: int, places: np.ndarray, arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        parts = [part for part in self.gather((places, arrays)) if part[1]]
        whole = [np.empty((rows, *array.shape[1:]), dtype=array.dtype) for array in (parts[0][1] if parts else [])]
        for there, columns in parts:
            for target, column in zip(whole, columns, strict=True):
                target[there] = column
        return tuple(whole)

    def gather(self, item: Any) -> list[Any]:
        """What each process has, on all of them."""
        if self.processes == 1:
            return [item]
        from accelerate.utils import gather_object

        return list(gather_object([item]))


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
        fused_loss.unbind_head_loss(self.inner)
        try:
            if isinstance(self.inner, nn.Module) and hasattr(self.inner, "get_output_embeddings"):
                self.task.model.bind_loss(self.base())
            yield
        finally:
            fused_loss.unbind_head_loss(self.inner)
            if kept is not None:
                self.inner.forward = kept
            self.model.train(was_training)
            random.setstate(drawn[0])  # the harness seeds them all, and training has to go on as if nothing had been measured
            np.random.set_state(drawn[1])
            torch.set_rng_state(drawn[2])
            for index, state in enumerate(on_gpus):
                torch.cuda.set_rng_state(state, index)
