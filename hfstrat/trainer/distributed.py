"""The processes of a run: start, checks against the request, end.

State outside of objects, all of it. Environment variables, set by `hfstrat train` for the processes that it launches:

- `HFSTRAT_PROCESSES`: the requested number of processes (`REQUESTED`)
- `HFSTRAT_WRAPPING`: how they share the model: alone, ddp, fsdp, deepspeed (`WRAPPING`)
- `HFSTRAT_OUTCOME`: the file for exit code and message (`heartbeat.FILE`); next to it, `.pid<rank>` holds a process id, and
  `.stop` exists once the parent requested a stop (`signals`)

Variables for users: `HFSTRAT_CACHE` and `HFSTRAT_CACHE_MAX` (`data.cache`). Module state, since signals and the process group
belong to a process: `signals._received` and `heartbeat._heartbeat`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.trainer import heartbeat

if TYPE_CHECKING:
    from accelerate import PartialState

REQUESTED = "HFSTRAT_PROCESSES"
WRAPPING = "HFSTRAT_WRAPPING"
ALONE, DDP, FSDP, DEEPSPEED = "alone", "ddp", "fsdp", "deepspeed"
WRAPPINGS = {"FSDP": FSDP, "DEEPSPEED": DEEPSPEED}  # by accelerate's distributed_type
CLASSES = {DDP: "DistributedDataParallel", FSDP: "FSDPModule", DEEPSPEED: "DeepSpeedEngine"}


def wrapping() -> str:
    """How the processes are to share the model, as set by `hfstrat train` or by `accelerate launch`."""
    if requested := os.environ.get(WRAPPING):
        return requested
    for name, kind in (("ACCELERATE_USE_DEEPSPEED", DEEPSPEED), ("ACCELERATE_USE_FSDP", FSDP)):
        if os.environ.get(name, "false").lower() == "true":
            return kind
    return DDP if int(os.environ.get("WORLD_SIZE") or 1) > 1 else ALONE


def is_sharded() -> bool:
    """Whether a process holds only its shard of the model or of the optimizer states."""
    return wrapping() in (FSDP, DEEPSPEED)


def on_cpu() -> bool:
    """Whether accelerate needs to be set to the CPU; DeepSpeed detects it (`DS_ACCELERATOR`)."""
    import torch

    return not (torch.cuda.is_available() or torch.backends.mps.is_available()) and wrapping() != DEEPSPEED


def backend() -> str | None:
    """The backend of the process group where accelerate's default is wrong: gloo for DeepSpeed without a GPU."""
    import torch

    return "gloo" if wrapping() == DEEPSPEED and not torch.cuda.is_available() else None


def join_world() -> PartialState:
    """Start or join the process group.

    Raises:
        UserError: the number of processes is not the requested one, or one process would use several GPUs.
    """
    import torch
    from accelerate import PartialState

    world = PartialState(cpu=on_cpu(), **({"backend": named} if (named := backend()) else {}))
    requested = int(os.environ.get(REQUESTED) or os.environ.get("WORLD_SIZE") or 1)
    if world.num_processes != requested:
        raise UserError(
            f"{requested} processes were requested, but the world size is {world.num_processes}: the launcher started separate "
            "runs. On CPUs use `--accelerate-config cpu_ddp` (distributed_type: MULTI_GPU with use_cpu: true)"
        )
    if world.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"one process sees {torch.cuda.device_count()} GPUs and would fall back to DataParallel; use "
            f"`hfstrat train RECIPE --num-processes {torch.cuda.device_count()}`, or CUDA_VISIBLE_DEVICES=0 for one"
        )
    heartbeat.begin(world.process_index, world.num_processes)
    return world


def check_wrapped(wrapped: Any, processes: int) -> None:
    """Raise UserError if the Trainer's model is not wrapped as requested: it would be trained, but not as one run."""
    kinds = [cls.__name__ for cls in type(wrapped).__mro__]
    if "DataParallel" in kinds:
        raise UserError(
            "the model is wrapped in DataParallel, which changes loss and gradients; use `hfstrat train RECIPE "
            "--num-processes N` with as many processes as GPUs, or CUDA_VISIBLE_DEVICES=0 for one"
        )
    requested = wrapping()
    wanted = CLASSES.get(requested)
    if wanted is None or wanted in kinds or (requested == DDP and processes == 1):
        return
    cure = {
        DDP: "start it with `hfstrat train RECIPE --num-processes N`, or with torchrun",
        FSDP: "FSDP needs GPUs and an Accelerate config with distributed_type: FSDP (fsdp2); on CPUs use cpu_ddp",
        DEEPSPEED: "an Accelerate config with distributed_type: DEEPSPEED (deepspeed_zero2 or deepspeed_zero3) starts it",
    }[requested]
    raise UserError(f"the model should be wrapped in {wanted}, but it is a {kinds[0]}: {cure}")


def leave_world() -> None:
    """End the process group: only the main process continues."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        heartbeat.end()
        dist.destroy_process_group()
