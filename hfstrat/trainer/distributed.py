"""The processes of a run: joined, checked against what was asked for, and let go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.trainer import heartbeat

if TYPE_CHECKING:
    from accelerate import PartialState

ASKED = "HFSTRAT_PROCESSES"  # set by `hfstrat train`: how many processes were asked for,
WRAPPING = "HFSTRAT_WRAPPING"  # and how they share the model
ALONE, DDP, FSDP, DEEPSPEED = "alone", "ddp", "fsdp", "deepspeed"
WRAPPINGS = {"FSDP": FSDP, "DEEPSPEED": DEEPSPEED}  # by accelerate's distributed_type
CLASSES = {DDP: "DistributedDataParallel", FSDP: "FSDPModule", DEEPSPEED: "DeepSpeedEngine"}


def wrapping() -> str:
    """How the processes were asked to share the model: by `hfstrat train`, or by what `accelerate launch` leaves behind."""
    if asked := os.environ.get(WRAPPING):
        return asked
    for name, kind in (("ACCELERATE_USE_DEEPSPEED", DEEPSPEED), ("ACCELERATE_USE_FSDP", FSDP)):
        if os.environ.get(name, "false").lower() == "true":
            return kind
    return DDP if int(os.environ.get("WORLD_SIZE") or 1) > 1 else ALONE


def is_sharded() -> bool:
    """Whether a process trains only its part of the model or of its optimiser's states."""
    return wrapping() in (FSDP, DEEPSPEED)


def on_cpu() -> bool:
    """Whether accelerate has to be told to train on the CPU; DeepSpeed finds out for itself (`DS_ACCELERATOR`)."""
    import torch

    return not (torch.cuda.is_available() or torch.backends.mps.is_available()) and wrapping() != DEEPSPEED


def backend() -> str | None:
    """What accelerate does not find by itself: how DeepSpeed's processes talk where there is no GPU."""
    import torch

    return "gloo" if wrapping() == DEEPSPEED and not torch.cuda.is_available() else None


def join_world() -> PartialState:
    """Start or join the process group.

    Raises:
        UserError: another number of processes than was asked for, or one process that would drive several GPUs.
    """
    import torch
    from accelerate import PartialState

    world = PartialState(cpu=on_cpu(), **({"backend": named} if (named := backend()) else {}))
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
    heartbeat.begin(world.process_index, world.num_processes)
    return world


def check_wrapped(wrapped: Any, processes: int) -> None:
    """Refuse a model that is wrapped in another way than was asked for: it would train, but not as one run.

    Args:
        wrapped: the model as the Trainer trains it.

    Raises:
        UserError: the way out.
    """
    kinds = [cls.__name__ for cls in type(wrapped).__mro__]
    if "DataParallel" in kinds:
        raise UserError(
            "the model is wrapped in DataParallel, whose loss and gradients are other ones; use `hfstrat train RECIPE "
            "--num-processes N` with as many processes as GPUs, or CUDA_VISIBLE_DEVICES=0 for one"
        )
    asked = wrapping()
    wanted = CLASSES.get(asked)
    if wanted is None or wanted in kinds or (asked == DDP and processes == 1):
        return
    cure = {
        DDP: "start it with `hfstrat train RECIPE --num-processes N`, or with torchrun",
        FSDP: "FSDP needs GPUs and an Accelerate config with distributed_type: FSDP (fsdp2); on CPUs use cpu_ddp",
        DEEPSPEED: "an Accelerate config with distributed_type: DEEPSPEED (deepspeed_zero2 or deepspeed_zero3) starts it",
    }[asked]
    raise UserError(f"{wanted} was asked for, and the model is wrapped in {kinds[0]}: it would not be the same run; {cure}")


def leave_world() -> None:
    """Let the other processes go: what follows is the first one's alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        heartbeat.end()
        dist.destroy_process_group()
