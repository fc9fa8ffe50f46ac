"""The processes of a run: joined, checked against what was asked for, and let go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

ASKED = "HFSTRAT_PROCESSES"  # set by `hfstrat train`: how many processes were asked for


def join_world() -> PartialState:
    """Start or join the process group.

    Raises:
        UserError: another number of processes than was asked for, or one process that would drive several GPUs.
    """
    import torch
    from accelerate import PartialState

    world = PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    asked = int(os.environ.get(ASKED) or os.environ.get("WORLD_SIZE") or 1)
    if world.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, but this one is alone in a world of {world.num_processes}: the launcher "
            "started separate runs. On CPUs use `--accelerate-config cpu_ddp`, which says multi_gpu with use_cpu"
        )
    if world.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"one process sees {torch.cuda.device_count()} GPUs and would fall back to DataParallel; use "
            f"`hfstrat train RECIPE --num-processes {torch.cuda.device_count()}`, or CUDA_VISIBLE_DEVICES=0 for one"
        )
    return world


def leave_world() -> None:
    """Let the other processes go: what follows is the first one's alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
