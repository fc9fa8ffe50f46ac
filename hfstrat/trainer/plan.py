"""How many steps, how many sequences at a time: the recipe's wishes as numbers for this machine and these data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.recipe.schema import Training
from hfstrat.recipe.section import seconds

CPU_TOKENS = 512  # per forward pass: more only grows the activations past the caches (benchmarks/micro_batch.py)
CPU_MULTIPLE = 16  # widths of batches, few since kernels are compiled for each
MOST_TOKENS = 16_384  # of the longest rows in one forward pass, where memory is not measured
ENDLESS = 10**7


@dataclass(frozen=True)
class Plan:
    """Numbers of a run. `rows_at_once` x `accumulation` x `processes` = `global_batch_size` (or `bins`, if packed), always."""

    steps: int
    global_batch_size: int
    processes: int
    micro_batch: int
    eval_batch: int
    eval_every: int
    save_every: int
    rows: int
    time_limit: float | None = None
    eval_share: float | None = None  # of the time limit between evaluations, where the clock decides
    checkpointing: bool = False  # activations are recomputed
    packed: bool | None = None  # what an interrupted run did
    bins: int | None = None  # rows of a step after packing; None: not packed
    bins_at_once: int = 1  # of them in one forward pass

    @property
    def accumulation(self) -> int:
        return (self.bins or self.global_batch_size) // (self.processes * self.rows_at_once)

    @property
    def rows_at_once(self) -> int:
        """Batch rows of one forward pass: sequences, or bins of them."""
        return self.bins_at_once if self.bins else self.micro_batch

    @property
    def epochs(self) -> float:
        return self.steps * self.global_batch_size / self.rows

    @property
    def length(self) -> str:
        """The length of the run in words: '120 steps (3.00 epochs)', 'at most 10m 00s', or both."""
        parts = [f"{self.steps:,} steps ({self.epochs:.2f} epochs)"] if self.steps < ENDLESS else []
        parts += [f"at most {format.duration(self.time_limit)}"] if self.time_limit else []
        return ", ".join(parts)


def make_plan(
    training: Training,
    lengths: Sequence[int] | np.ndarray,
    eval_lengths: Sequence[int] | np.ndarray,
    processes: int,
    stored: dict[str, Any] | None = None,
) -> Plan:
    """Turn the recipe's `training:` into numbers.

    Args:
        lengths: tokens of each training row.
        eval_lengths: tokens of each evaluation row, longest first.
        processes: how many share a global batch.
        stored: what an interrupted run chose (its checkpoint's marker); it is kept, so that the resumed run is the same run.

    Raises:
        UserError: a global batch that these processes and this micro-batch cannot make, or step counts that do not fit.
    """
    stored, ask = stored or {}, training.activation_checkpointing
    share = share_of(training.global_batch_size, processes)
    steps = steps_of(training, len(lengths))
    by_clock = training.max_time is not None and isinstance(training.eval_steps, float)
    eval_every = steps if by_clock else _every(training.eval_steps, steps)
    save_every = eval_every if training.save_steps is None else _every(training.save_steps, steps)
    if by_clock and isinstance(training.save_steps, float):
        raise UserError(
            f"training.save_steps: {training.save_steps:g} is a share of all steps, and with training.max_time the number of "
            "steps is unknown; give a whole number of steps, or remove it: a checkpoint is saved at each evaluation"
        )
    micro = training.per_device_train_batch_size
    if micro == "auto":
        kept = stored.get("micro_batch")
        micro = kept if kept and share % kept == 0 else modest_micro_batch(share, lengths)
    elif share % micro:
        raise UserError(
            f"training.per_device_train_batch_size: {micro} does not divide the {share} sequences that each of {processes} "
            f"process(es) has in a global batch of {training.global_batch_size}; expected one of {_listed(divisors(share))}"
        )
    wish, longest = training.per_device_eval_batch_size, int(np.max(eval_lengths, initial=1))
    eval_batch = (stored.get("eval_batch") or modest_eval_batch(micro, longest)) if wish == "auto" else wish
    return Plan(
        steps=steps,
        global_batch_size=training.global_batch_size,
        processes=processes,
        micro_batch=micro,
        eval_batch=eval_batch,
        eval_every=eval_every,
        save_every=save_every,
        rows=len(lengths),
        time_limit=seconds(training.max_time) if training.max_time else None,
        checkpointing=bool(stored.get("checkpointing")) if ask == "auto" else bool(ask),
        packed=stored.get("packed"),
        eval_share=float(training.eval_steps) if by_clock else None,
    )


def share_of(global_batch_size: int, processes: int) -> int:
    """Sequences of a global batch that one process has. Raises UserError with the nearest sizes that can be split."""
    if global_batch_size % processes:
        below = global_batch_size // processes * processes
        near = [str(size) for size in (below, below + processes) if size]
        raise UserError(
            f"training.global_batch_size: {global_batch_size} sequences cannot be split over {processes} processes; "
            f"the nearest sizes are {' and '.join(near)}"
        )
    return global_batch_size // processes


def steps_of(training: Training, rows: int) -> int:
    """Optimiser steps at most: the least that the recipe says; `ENDLESS` where only the clock ends it."""
    wishes = [ENDLESS] if training.max_time else []
    if training.max_steps is not None:
        wishes.append(training.max_steps)
    if training.num_train_epochs is not None:
        wishes.append(max(1, math.ceil(training.num_train_epochs * rows / training.global_batch_size)))
    return min(wishes)


def _every(wish: int | float, steps: int) -> int:
    return max(1, min(steps, round(wish * steps) if isinstance(wish, float) and wish <= 1 else int(wish)))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def modest_micro_batch(share: int, lengths: Sequence[int] | np.ndarray) -> int:
    """A divisor of `share` that keeps the typical forward pass near CPU_TOKENS and the longest within MOST_TOKENS."""
    wanted = min(CPU_TOKENS / float(np.mean(lengths)), MOST_TOKENS / float(np.max(lengths)))
    return max(d for d in divisors(share) if d <= max(1.0, wanted))


def modest_eval_batch(micro: int, longest: int) -> int:
    """Twice as many rows as in training, as far as the longest stay within MOST_TOKENS."""
    return max(1, min(2 * micro, MOST_TOKENS // longest))


def largest_that_fits(share: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `share` for which a measured worst-case step fits into memory.

    Raises:
        UserError: not even one sequence fits.
    """
    for micro in reversed(divisors(share)):
        if fits(micro):
            return micro
    raise UserError(
        "training.per_device_train_batch_size: not even one sequence of the longest length fits into memory; "
        "set training.activation_checkpointing: true, lower data.max_length, or take strategy lora"
    )
