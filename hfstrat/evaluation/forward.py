"""Forward passes over examples, and the model that they measure.

Examples are sorted by length, longest first, and batched with similar lengths in few widths. Each leaves a few numbers, which
stay on the device until all passes are done and are then put back into the order of the examples. A result depends neither on
the batch size nor on the number of processes, which take batches in turn.
"""

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
from hfstrat.recipe.format import clock
from hfstrat.recipe.screen import LiveText, bar, in_notebook
from hfstrat.tasks.artifact import inner_of
from hfstrat.tasks.base import Task
from hfstrat.trainer.progress import LINE_EVERY, LIVE_EVERY
from hfstrat.trainer.train_data import multiple_for


class Progress:
    """A progress bar on a terminal, else a line every few seconds.

    Args:
        total: the amount of work, in any unit. The longest examples come first, so the time left is rather over- than
            underestimated.
    """

    def __init__(self, screen: Console, title: str, total: int) -> None:
        self.screen, self.title, self.total, self.done = screen, title, max(1, total), 0.0
        self._bar: progress.Progress | None = None
        self._live: LiveText | None = None

    def __enter__(self) -> Progress:
        self._started = self._last = time.monotonic()
        if self.screen.is_terminal and not self.screen.quiet:
            self._bar = progress.Progress(console=self.screen, transient=True)
            self._task = self._bar.add_task(self.title, total=self.total)
            self._bar.start()
        elif in_notebook() and not self.screen.quiet:
            self._live = LiveText()
        return self

    def advance(self, work: float) -> None:
        self.done += work
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self._live is not None:
            if now - self._last > LIVE_EVERY or self.done >= self.total:
                self._last = now
                self._live.show(f"{self.title} {bar(self.done / self.total)}")
        elif now - self._last > LINE_EVERY and self.done < self.total:
            self._last = now
            left = (now - self._started) * (self.total - self.done) / self.done
            self.screen.print(f"{self.title}: {self.done / self.total:.0%}, {clock(left)} left")

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


CPU_TOKENS, GPU_TOKENS = 2048, 32_768  # of a forward pass, unless evaluation.batch_tokens is set

Step = Callable[[list[int]], tuple[torch.Tensor, ...]]
"""From indices of examples to the numbers of each: tensors whose first dimension is these examples."""


@dataclass
class Runner:
    """Runs forward passes.

    Args:
        dtype: of the forward pass; autocast is used unless it is float32.
        tokens: of one pass, padding included; "auto" depends on the device.
        processes, rank: of the processes that share the examples. All of them must make the same calls in the same order.
    """

    device: torch.device
    dtype: torch.dtype
    screen: Console
    tokens: int | str = "auto"
    processes: int = 1
    rank: int = 0
    rows: int | None = None  # in a pass, as the Trainer evaluates; None: as many as the tokens allow

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
        """Indices of examples, longest first, with as many in a batch as the token budget allows.

        Args:
            packed: width of the rows that hold several examples in sequence. Examples that fit are distributed evenly, so that
                passes are similar: long and short ones together need little padding, and kernels are compiled for one shape.
        """
        order, found, start = np.argsort(-lengths, kind="stable"), list[list[int]](), 0
        plain = order[lengths[order] > packed]
        while start < len(plain):
            width = rounded(max(1, int(lengths[plain[start]])), self.multiple)
            count = self.rows or max(1, self.budget // width)
            found.append(plain[start : start + count].tolist())
            start += count
        rest = order[len(plain) :]
        passes = -(-int(lengths[rest].sum()) // self.budget)
        return found + [rest[number::passes].tolist() for number in range(min(passes, len(rest)))]

    def share(self, batches: Sequence[Any]) -> list[tuple[Any, bool]]:
        """This process's batches, and whether each counts: all processes run equally many, since sharded models synchronize."""
        steps = -(-len(batches) // self.processes)
        places = [self.rank + self.processes * step for step in range(steps)]
        return [(batches[min(place, len(batches) - 1)], place < len(batches)) for place in places]

    def per_row(
        self,
        title: str,
        lengths: np.ndarray,
        step: Step,
        progress: Progress | None = None,
        work: float | None = None,
        packed: int = 0,
    ) -> tuple[np.ndarray, ...]:
        """The numbers that `step` returns for every example, in their order, on every process.

        Args:
            progress: advanced by `work`, if these examples are a part of more; by default a new one is shown.
            packed: see `batches`.
        """
        mine, results, places = self.share(self.batches(lengths, packed)), list[tuple[torch.Tensor, ...]](), list[int]()
        tokens = sum(int(lengths[batch].sum()) for batch, _ in mine)
        shown = nullcontext(progress) if progress is not None else Progress(self.screen, title, tokens)
        size = 1.0 if work is None else work / max(1, tokens)
        with shown as progress, self.computing():
            for batch, counts in mine:
                for part, numbers in self._run(batch, step):
                    if counts:
                        results.append(numbers)
                        places += part
                progress.advance(size * int(lengths[batch].sum()))
        arrays = [torch.cat(column).cpu().numpy() for column in zip(*results, strict=True)] if results else []
        return self._gather_rows(len(lengths), np.array(places, dtype=np.int64), arrays)

    def _run(self, batch: list[int], step: Step) -> list[tuple[list[int], tuple[torch.Tensor, ...]]]:
        """The results of a batch in one pass, or in halves if the device runs out of memory."""
        try:
            return [(batch, step(batch))]
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return [*self._run(batch[:half], step), *self._run(batch[half:], step)]

    def _gather_rows(self, rows: int, places: np.ndarray, arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        parts = [part for part in self.gather((places, arrays)) if part[1]]
        columns = [np.empty((rows, *array.shape[1:]), dtype=array.dtype) for array in (parts[0][1] if parts else [])]
        for indices, values in parts:
            for column, value in zip(columns, values, strict=True):
                column[indices] = value
        return tuple(columns)

    def gather(self, item: Any) -> list[Any]:
        """The item of each process, on all processes."""
        if self.processes == 1:
            return [item]
        from accelerate.utils import gather_object

        return list(gather_object([item]))


@dataclass
class Subject:
    """A model under evaluation, with its tokenizer."""

    model: Any  # the model that is called
    inner: Any  # the transformers model in it (the same one, if there is no adapter)
    tokenizer: Any
    task: Task

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, task: Task) -> Subject:
        return cls(model, inner_of(model), tokenizer, task)

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    def base(self) -> Base:
        """The model in the form that tasks take."""
        dtype = main_dtype(self.inner)
        return Base(self.inner, self.task, "", None, [], dtype, dtype)

    @property
    def context(self) -> int | None:
        """The maximum number of positions, if the config has it."""
        config = self.inner.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Evaluation mode with the plain loss bound (not that of a student); afterwards everything is restored."""
        states = random.getstate(), np.random.get_state()
        was_training, bound = self.model.training, vars(self.inner).get("forward")
        self.model.eval()
        fused_loss.unbind_head_loss(self.inner)
        try:
            if isinstance(self.inner, nn.Module) and hasattr(self.inner, "get_output_embeddings"):
                self.task.model.bind_loss(self.base())
            # the harness seeds all generators, and training must continue as if nothing had been measured
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                yield
        finally:
            fused_loss.unbind_head_loss(self.inner)
            if bound is not None:
                self.inner.forward = bound
            self.model.train(was_training)
            random.setstate(states[0])
            np.random.set_state(states[1])
