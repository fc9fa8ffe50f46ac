"""Micro-batch, evaluation batch and activation checkpointing from a measured worst-case step; peak memory of a process.

Not accelerate's find_executable_batch_size: it fails at the first long batch of a run, and here the worst batch is tried first.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch import nn

from hfstrat.data.prepare import PreparedData
from hfstrat.errors import UserError
from hfstrat.models.blocks import checkpoint_activations
from hfstrat.models.load import Base
from hfstrat.recipe.schema import Training
from hfstrat.trainer.plan import HEADROOM, Plan, largest_that_fits
from hfstrat.trainer.train_data import TrainData


def peak_bytes() -> int:
    """Peak memory of this process in bytes: of its GPU if it has one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the size of the parent process
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fits_on_gpu(attempt: Callable[[int], None]) -> Callable[[int], bool]:
    """A test whether `attempt(n)` fits into this process's GPU memory. Peak and random state are restored afterwards."""

    def fits(count: int) -> bool:
        state = torch.cuda.get_rng_state()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            attempt(count)
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            return torch.cuda.max_memory_reserved() < HEADROOM * total
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_rng_state(state)

    return fits


Fits = Callable[[Callable[[int], None]], Callable[[int], bool]]


def fit_to_memory(
    training: Training,
    rows: TrainData,
    trained: nn.Module,
    base: Base,
    data: PreparedData,
    loss: Callable[..., torch.Tensor],
    worst_row: Callable[[PreparedData, int], dict[str, Any]],
    fits: Fits = fits_on_gpu,
) -> Plan:
    """The plan with the largest micro-batch whose worst step fits, then the largest evaluation batch; set values are kept.

    The worst step has copies of the longest example with loss on all tokens: forward and backward pass, with tensors of the
    size of the optimizer's moments (and of the gradient buckets of a distributed run). Activations are recomputed if
    `activation_checkpointing` is auto and a single example does not fit otherwise. The process with the least memory decides.

    Args:
        loss: of a micro-batch, from outputs and labels.
        worst_row: an example of a given length that costs as much as any.

    Raises:
        UserError: a single example does not fit.
    """
    plan = rows.plan
    trained.to(rows.device)
    longest, longest_eval = int(data.lengths.max()), int(data.eval_lengths.max())
    if training.per_device_train_batch_size == "auto":
        share, run = plan.per_step // plan.processes, worst_step(trained, rows, worst_row(data, longest), loss)

        def step(count: int) -> None:
            run(rows.plan.examples_of(count, longest))

        micro = _largest(share, fits(step))
        if micro == 0 and training.activation_checkpointing == "auto":
            checkpoint_activations(base.model, True)
            plan = replace(plan, checkpointing=True)
            micro = _largest(share, fits(step))
        micro = _least(micro, rows)
        if micro == 0:
            largest_that_fits(1, lambda _: False)  # raises with advice
        plan = plan.with_rows_at_once(micro, longest)
    if training.per_device_eval_batch_size == "auto":
        wanted = 1 << (4 * plan.micro_batch * longest // longest_eval).bit_length()
        evaluation = evaluation_pass(trained, rows, worst_row(data, longest_eval))
        while wanted > 1 and not fits(evaluation)(wanted):
            wanted //= 2
        plan = replace(plan, eval_batch=_least(wanted, rows))
    return plan


def _largest(share: int, fits: Callable[[int], bool]) -> int:
    try:
        return largest_that_fits(share, fits)
    except UserError:
        return 0


def _least(number: int, rows: TrainData) -> int:
    """The smallest number of all processes."""
    return int(gather(torch.tensor([number], device=rows.device)).min()) if rows.plan.processes > 1 else number


def worst_step(
    trained: nn.Module, rows: TrainData, row: dict[str, Any], loss: Callable[..., torch.Tensor]
) -> Callable[[int], None]:
    """A training step on copies of an example; gradients and mode are restored."""

    def step(micro: int) -> None:
        was_training = trained.training
        trained.train()  # activations are checkpointed in training only
        try:
            trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
            moments = torch.empty((3 if rows.plan.processes > 1 else 2) * trainable, device=rows.device)
            batch = {name: tensor.to(rows.device) for name, tensor in rows.collate([row] * micro).items()}
            labels = batch.pop("labels")
            with rows.autocast():
                outputs = trained(**batch)
            loss(outputs, labels).backward()  # type: ignore[no-untyped-call]
            del moments
        finally:
            trained.zero_grad(set_to_none=True)
            trained.train(was_training)

    return step


def evaluation_pass(trained: nn.Module, rows: TrainData, row: dict[str, Any]) -> Callable[[int], None]:
    """The forward pass of an evaluation on copies of its longest example."""

    def forward(count: int) -> None:
        was_training = trained.training
        trained.eval()
        try:
            with torch.no_grad(), rows.autocast():
                trained(**rows.batch([0] * count, [row]))
        finally:
            trained.train(was_training)

    return forward
