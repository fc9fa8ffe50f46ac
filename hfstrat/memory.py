"""What fits: a measured worst-case step on a GPU, and the peak of a process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

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


def fits_on_gpu(attempt: Callable[[int], None]) -> Callable[[int], bool]:
    """A test whether `attempt(n)` stays within this process's GPU. Peak and random state are put back afterwards."""
    import torch

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
