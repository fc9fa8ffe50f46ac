"""What fits: a measured worst-case step on a GPU, and the peak of a process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

HEADROOM = 0.92  # share of the device's memory that a measured step may take


def peak_bytes() -> int:
    """Peak memory of this process: of its GPU where it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at the size of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fits_on_gpu(
    model: nn.Module,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    row: dict[str, Any],
    dtype: torch.dtype,
    distributed: bool,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
) -> Callable[[int], bool]:
    """A test whether so many copies of `row` go through forward, backward and an optimiser's state.

    The optimiser's two moments, and the gradient buckets of a distributed run, are stood in for by a tensor of their
    size. Gradients, mode, peak and random state are put back, so that the measurement leaves no trace in the run.
    """
    import torch

    device = torch.device("cuda", torch.cuda.current_device())

    def fits(micro: int) -> bool:
        state, was_training = torch.cuda.get_rng_state(), model.training
        model.train()  # activations are checkpointed in training only
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
            moments = torch.empty((3 if distributed else 2) * learning, device=device)
            batch = {name: tensor.to(device) for name, tensor in collate([row] * micro).items()}
            labels = batch.pop("labels")
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                outputs = model(**batch)
            loss(outputs, labels).backward()  # type: ignore[no-untyped-call]
            del moments
            return torch.cuda.max_memory_reserved() < HEADROOM * torch.cuda.get_device_properties(device).total_memory
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_rng_state(state)

    return fits
