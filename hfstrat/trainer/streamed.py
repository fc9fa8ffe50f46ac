"""Batches of examples that are read while training, and the position in the stream that a checkpoint holds.

The Trainer sees rows by number, as of a data set on the disk: step `s` has the numbers `s*G ... (s+1)*G`, of which accelerate
gives each process its batches. So every step has exactly `G` examples, the same ones for any number of processes, and a resumed
run skips the numbers before its first step without reading a row. Each process reads and tokenizes the complete stream: which
examples a step has is known only after rows without anything to train on were dropped and long ones split. (Rows of its own for
each process, as `datasets.distributed.split_dataset_by_node` gives them, would make steps depend on the number of processes.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from hfstrat.errors import RunError

KEPT_STEPS = 4  # whose examples and positions are kept: data loaders read a batch ahead, which may be of the next step
STREAM = "stream"  # in a checkpoint's marker


class StreamedSteps:
    """The examples of a run by their number. Steps are read in order, and only the last few are kept.

    Args:
        stream: `data.streaming.TokenStream`.
        global_batch_size: examples of a step.
        steps: of the run.
    """

    def __init__(self, stream: Any, global_batch_size: int, steps: int) -> None:
        self.stream, self.global_batch_size, self.steps = stream, global_batch_size, steps
        self._next = 0  # the step to read next
        self._read = dict[int, list[dict[str, Any]]]()
        self._positions: dict[int, dict[str, Any]] = {0: stream.state()}  # before a step

    def __len__(self) -> int:
        return self.steps * self.global_batch_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        step, place = divmod(number, self.global_batch_size)
        return self.step(step)[place]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [self[number] for number in numbers]

    def step(self, step: int) -> list[dict[str, Any]]:
        """The examples of a step, longest first, as `BatchOrder` sorts them."""
        while self._next <= step:
            rows = self.stream.take(self.global_batch_size)
            order = np.argsort([-row["length"] for row in rows], kind="stable")
            self._read[self._next] = [rows[place] for place in order]
            self._next += 1
            self._positions[self._next] = self.stream.state()
            for old in [one for one in self._read if one <= self._next - KEPT_STEPS]:
                del self._read[old], self._positions[old]
        return self._read[step]

    def tokens(self, step: int) -> int:
        """Tokens of a step without padding, over all processes."""
        return sum(row["length"] for row in self.step(step))

    def position(self, step: int) -> dict[str, Any]:
        """The position of the stream before a step that has been read, or after the last one."""
        return {"step": step, **self._positions[step]}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue with the step of a position."""
        self.stream.restore(position)
        self._next = position["step"]
        self._read, self._positions = {}, {self._next: {name: position[name] for name in position if name != "step"}}

    def count_until(self, step: int) -> None:
        """Let the statistics be those of the steps before this one, where a data loader has read further."""
        self.stream.set_statistics(self._positions[step]["statistics"])

    def has_position(self, step: int) -> bool:
        return step in self._positions


class StreamOrder(Sampler[int]):
    """The numbers of all examples in order."""

    def __init__(self, rows: StreamedSteps) -> None:
        self.rows, self.first = rows, 0

    def begin(self, step: int) -> None:
        """Start at this step; the numbers before it are skipped. Raises RunError without the position of this step."""
        if not self.rows.has_position(step):
            raise RunError(f"the checkpoint of step {step} has no position in the data; start again with --overwrite")
        self.first = step

    def tokens(self, step: int) -> int:
        return self.rows.tokens(step)

    def __iter__(self) -> Iterator[int]:
        size = self.rows.global_batch_size
        yield from repeat(0, self.first * size)
        yield from range(self.first * size, len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)
