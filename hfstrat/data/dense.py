"""Dense packing: the batch of a step is counted in tokens, and its rows are those that fill packed rows best.

Rows of several steps are packed together by best fit (Johnson 1973), so that packed rows of one width are nearly full. No row
is cut, each is seen once per epoch, and a step has at most the given number of tokens. Which rows share a step is a function of
seed and epoch, as in `BatchOrder`, but the number of rows per step varies with their lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from hfstrat.data.collate import rounded
from hfstrat.data.packing import PackedRows, balance
from hfstrat.errors import UserError

WINDOW_STEPS = 16  # steps whose rows are packed together


class Shape(NamedTuple):
    """Packed rows of a step, and the tokens that each holds at most."""

    bins: int
    capacity: int


def shape_of(tokens: int, longest: int, processes: int) -> Shape:
    """The packed rows of steps of at most `tokens` tokens, each as long as the longest row, and less than twice as long.

    Their number is a power of two where the processes divide it, so that most numbers of processes have the same steps.

    Raises:
        UserError: a process would have fewer tokens than the longest row.
    """
    most = tokens // longest
    bins = 1 << max(0, most.bit_length() - 1)
    bins = bins if bins % processes == 0 else most // processes * processes
    if most < 1 or bins < 1:
        raise UserError(
            f"training.global_batch_tokens: {tokens:,} tokens over {processes} process(es) are fewer than the longest example "
            f"({longest:,} tokens) on each; set at least {longest * processes:,}, or lower data.max_length"
        )
    return Shape(bins, tokens // bins)


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Positions of the rows in each bin of `capacity`: longest first, each into the fullest bin that has room for it."""
    room: list[tuple[int, int]] = []  # of each bin, with its number, sorted
    content: list[list[int]] = []
    for position in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[position])
        place = bisect_left(room, (length, 0))
        left, number = room.pop(place) if place < len(room) else (capacity, len(content))
        if number == len(content):
            content.append([])
        content[number].append(position)
        if left > length:
            insort(room, (left - length, number))
    return content


class DenseOrder:
    """The packed rows of every step, a function of seed and position only.

    Each epoch is a seeded permutation, packed in windows of `WINDOW_STEPS` steps: the fullest packed rows form steps, and the
    rows of the others go to the next window. The last steps of an epoch share its remaining rows evenly.

    Args:
        lengths: tokens of each row.
        shape: of a step.
        steps: of the run.

    Raises:
        UserError: there are fewer rows than packed rows in a step.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, shape: Shape, steps: int, seed: int) -> None:
        self.lengths, self.shape, self.steps, self.seed = np.asarray(lengths), shape, steps, seed
        self.first_steps = [0]  # of the epochs that were packed so far
        self._epoch = lru_cache(maxsize=2)(self._flat)
        if len(self.lengths) < shape.bins:
            raise UserError(
                f"training.global_batch_tokens: a step has {shape.bins:,} packed rows, more than there are examples "
                f"({len(self.lengths):,}); lower it to at most {len(self.lengths) * shape.capacity:,}"
            )

    def _flat(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in their order, and the place of the first row of each packed row, and the end."""
        bins = [rows for step in self._pack(epoch) for rows in step]
        kind = np.int32 if len(self.lengths) < 2**31 else np.int64  # those of two epochs are cached
        return np.concatenate([np.array(rows, dtype=kind) for rows in bins]), np.cumsum([0, *map(len, bins)])

    def _pack(self, epoch: int) -> list[list[list[int]]]:
        """The rows of an epoch: of each packed row of each step."""
        generator = np.random.default_rng((self.seed, epoch))
        order, window = generator.permutation(len(self.lengths)), WINDOW_STEPS * self.shape.bins * self.shape.capacity
        ends = np.cumsum(self.lengths[order])
        steps: list[list[list[int]]] = []
        start, kept, before = 0, list[int](), 0  # rows of the epoch that are taken, those not yet in a step, tokens taken
        while start < len(order):
            wanted = before + window - int(self.lengths[kept].sum())
            stop = int(np.searchsorted(ends, wanted)) + 1
            is_last = int(ends[-1]) - wanted < window
            stop = len(order) if is_last else stop
            rows = np.array([*kept, *order[start:stop].tolist()])
            bins = [rows[each].tolist() for each in best_fit(self.lengths[rows], self.shape.capacity)]
            bins.sort(key=self._filled, reverse=True)
            if is_last:
                steps += self._share(bins)
                break
            full = len(bins) // self.shape.bins * self.shape.bins
            kept = [row for each in bins[full:] for row in each]
            chosen = [bins[place] for place in generator.permutation(full)]
            steps += [chosen[place : place + self.shape.bins] for place in range(0, full, self.shape.bins)]
            start, before = stop, int(ends[stop - 1])
        return [steps[place] for place in generator.permutation(len(steps))]

    def _filled(self, rows: list[int]) -> int:
        return int(self.lengths[rows].sum())

    def _share(self, bins: list[list[int]]) -> list[list[list[int]]]:
        """The last steps of an epoch, with equally many packed rows; these are split, and empty if there are too few rows."""
        count = -(-len(bins) // self.shape.bins)
        while len(bins) < count * self.shape.bins:
            several = [place for place, each in enumerate(bins) if len(each) > 1]
            if not several:
                bins.append([])
                continue
            rows = bins.pop(max(several, key=lambda place: self._filled(bins[place])))
            bins += [[rows[place] for place in half] for half in balance(self.lengths[rows].tolist(), 2)]
        bins.sort(key=self._filled, reverse=True)
        return [bins[place::count] for place in range(count)]

    def steps_of(self, epoch: int) -> int:
        """The number of steps of an epoch."""
        while len(self.first_steps) <= epoch + 1:
            _, ends = self._epoch(len(self.first_steps) - 1)
            self.first_steps.append(self.first_steps[-1] + (len(ends) - 1) // self.shape.bins)
        return self.first_steps[epoch + 1] - self.first_steps[epoch]

    def steps_in(self, epochs: float) -> int:
        """The number of steps of some epochs, at least 1."""
        whole = int(epochs)
        rest = epochs - whole
        steps = sum(self.steps_of(epoch) for epoch in range(whole))
        return max(1, steps + (int(np.ceil(rest * self.steps_of(whole))) if rest > 0 else 0))

    def bins_of(self, step: int) -> list[np.ndarray]:
        """Row indices of each packed row of a step."""
        while self.first_steps[-1] <= step:
            self.steps_of(len(self.first_steps) - 1)
        epoch = int(np.searchsorted(self.first_steps, step, side="right")) - 1
        rows, ends = self._epoch(epoch)
        first = (step - self.first_steps[epoch]) * self.shape.bins
        return [rows[ends[place] : ends[place + 1]] for place in range(first, first + self.shape.bins)]

    def batch(self, step: int) -> np.ndarray:
        """Row indices of one optimizer step."""
        return np.concatenate(self.bins_of(step))

    def tokens(self, step: int) -> int:
        """Tokens of one optimizer step without padding, over all processes."""
        return int(self.lengths[self.batch(step)].sum())


class DenseRows(PackedRows):
    """The packed rows of every step of a `DenseOrder`, one after another."""

    def __init__(self, rows: Any, order: DenseOrder, bins: int, multiple: int) -> None:
        super().__init__(rows, order, bins, multiple)
        self.bins_of = order.bins_of

    def _step(self, step: int) -> tuple[list[np.ndarray], int]:
        packed = self.bins_of(step)
        return packed, rounded(max(int(self.order.lengths[each].sum()) for each in packed), self.multiple)
