"""What the Trainer is fed with: rows and how they become batches. A strategy may compute something once and add it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfstrat.data.render import IGNORED
from hfstrat.data.splits import distinct
from hfstrat.trainer.collective import SINGLE, ProcessGroup
from hfstrat.trainer.plan import ENDLESS, Plan

if TYPE_CHECKING:
    from rich.console import Console

SAMPLED = 200  # rows from which the share of supervised tokens is told


@dataclass(frozen=True)
class TrainData:
    """Rows, how they become batches, and the run they are for.

    `facts` go into the report; `undo` is called before the model is saved for good, and takes off what was bound to it.
    """

    train: Any
    eval: Any
    collate: Any
    plan: Plan
    dtype: torch.dtype
    device: torch.device
    processes: int
    screen: Console
    facts: dict[str, Any] = field(default_factory=dict)
    undo: tuple[Callable[[], None], ...] = ()
    group: ProcessGroup = SINGLE  # who computes what is computed once

    @property
    def epochs(self) -> float:
        return self.plan.epochs

    @property
    def is_endless(self) -> bool:
        return self.plan.steps >= ENDLESS

    @property
    def unpacked(self) -> TrainData:
        """The same rows, none of them packed, in batches of `micro_batch`."""
        if not self.plan.bins:
            return self
        return replace(self, train=self.train.rows, collate=self.collate.plain, plan=replace(self.plan, bins=None))

    def with_rows(self, collate: Any, train: Any, evaluated: Any = None) -> TrainData:
        """The feed with these rows, which have a column more (packed, if its rows are), and a collator for them."""
        train = self.train.with_rows(train) if self.plan.bins else train
        return replace(self, train=train, eval=self.eval if evaluated is None else evaluated, collate=collate)

    @property
    def distinct_rows(self) -> int:
        """Training rows, each once, however often it stands there."""
        return len(distinct(self.train).first)

    @property
    def supervised_share(self) -> float:
        """The share of tokens that carry loss, from a sample of rows."""
        step = max(1, len(self.train) // SAMPLED)
        labels = [self.train[index].get("labels") for index in range(0, len(self.train), step)]
        counted = np.concatenate([np.atleast_1d(row) for row in labels if row is not None] or [np.zeros(1)])
        return float((counted != IGNORED).mean())

    def say(self, line: str) -> None:
        self.screen.print(line)

    def with_undo(self, undo: Callable[[], None]) -> TrainData:
        return replace(self, undo=(*self.undo, undo))

    def batch(self, places: list[int], rows: Any = None) -> dict[str, torch.Tensor]:
        """A collated batch of evaluation (or the given) rows on the device, without what only the loss needs."""
        rows = self.eval if rows is None else rows
        batch = self.collate([rows[place] for place in places])
        return {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """As the Trainer computes: in its precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def each(self, items: list[Any], compute: Callable[[Any], Any], words: str, for_all: bool = False) -> Iterator[Any]:
        """`ProcessGroup.each`, with a progress bar where there is a terminal."""
        with self._progress(len(items), words) as advance:
            yield from self.group.each(items, lambda item: advance(compute(item)), for_all)

    @contextmanager
    def _progress(self, count: int, words: str) -> Iterator[Callable[[Any], Any]]:
        from rich.progress import Progress

        if not self.screen.is_terminal:
            yield lambda result: result
            return
        with Progress(console=self.screen, transient=True) as bar:
            task = bar.add_task(words, total=-(-count // self.group.size))

            def advance(result: Any) -> Any:
                bar.advance(task)
                return result

            yield advance

    def track(self, items: list[Any], words: str) -> Any:
        """The items, with a progress bar where there is a terminal."""
        from rich.progress import track

        if not self.screen.is_terminal:
            return items
        return track(items, words, console=self.screen, transient=True)
