"""Models in pieces (FSDP2, ZeRO): an outline is kept, and filled when the pieces are brought together at the end.

Until it is wrapped, each process has the whole model on the CPU, and everything is as it is elsewhere. From then on a process
has its piece. After training the outline gets the weights of all, and what is compared, shown and saved is an ordinary model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfstrat.trainer import distributed

if TYPE_CHECKING:
    from transformers import Trainer

    from hfstrat.models.load import Base


def load_whole() -> None:
    """Have models loaded whole: accelerate tells transformers of ZeRO-3 also where `zero3_init_flag` is false."""
    if distributed.wrapping() == distributed.DEEPSPEED:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def outline(model: nn.Module) -> nn.Module | None:
    """A copy of the model that has no weights and takes no memory; None where the model stays whole."""
    if not distributed.is_sharded():
        return None
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def bring_together(trainer: Trainer, whole: nn.Module, base: Base) -> None:
    """Give each process the complete trained model in `whole`, its outline, and release the shards; a collective operation."""
    pieces = trainer.accelerator.unwrap_model(trainer.model)
    fill(whole, pieces)
    for name, buffer in pieces.named_buffers():
        parent, _, leaf = name.rpartition(".")
        whole.get_submodule(parent)._buffers[leaf] = buffer.detach().cpu()
    name = next(name for name, module in pieces.named_modules() if module is base.model)
    base.model = whole.get_submodule(name)  # type: ignore[assignment]
    trainer.model = trainer.model_wrapped = whole
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False  # from here on it is like any other
    trainer.deepspeed = None
    load_whole()
    place(whole, trainer.args.device)


@torch.no_grad()
def fill(whole: nn.Module, pieces: nn.Module) -> None:
    """Copy all weights of a model in pieces into an outline of it, on the CPU."""
    here = dict(pieces.named_parameters())
    for name, empty in whole.named_parameters():
        value = nn.Parameter(gathered(here[name]).cpu(), empty.requires_grad)
        torch.utils.swap_tensors(empty, value)  # type: ignore[no-untyped-call]  # it stays the same object, for those who share it


@torch.no_grad()
def gathered(piece: Any) -> torch.Tensor:
    """A parameter with all its numbers, in the precision it learns in; a collective operation."""
    from torch.distributed.tensor import DTensor

    if isinstance(piece, DTensor):
        kind = piece.device_mesh.device_type
        there: Any = piece.detach() if piece.device.type == kind else piece.detach().to(kind)
        return there.full_tensor()
    if distributed.wrapping() != distributed.DEEPSPEED:
        return piece.detach().clone()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if piece.requires_grad and piece.dtype != torch.float32:
        master = safe_get_full_fp32_param(piece)
        if master is not None:
            return master.detach().clone()
    if not hasattr(piece, "ds_id"):
        return piece.detach().clone()
    with deepspeed.zero.GatheredParameters([piece]):
        return piece.detach().clone()


def place(model: nn.Module, device: torch.device) -> bool:
    """Move a whole model to the device where it has room for it twice; says whether it has."""
    if device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if fits := 2 * size < torch.cuda.mem_get_info(device)[0]:
        model.to(device)
    return fits


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """For a while on the device, where there is room: a model that will be shared out waits on the CPU, which is slow."""
    moved = distributed.is_sharded() and next(model.parameters()).device.type == "cpu" != device.type and place(model, device)
    try:
        yield
    finally:
        if moved:
            model.to("cpu")
            torch.cuda.empty_cache()


def reduce_in_float32(trainer: Trainer) -> None:
    """Under FSDP2: gradients are summed in float32, and what a forward gives is not rounded to 16 bits (losses, logits)."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is None or policy is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)


def remark(base: Base) -> None:
    """Say what is different about this run."""
    how = {distributed.FSDP: "FSDP2", distributed.DEEPSPEED: "DeepSpeed"}[distributed.wrapping()]
    base.say(
        f"{how}: the micro-batch is not measured and rows are not packed, since no process has the whole model on its device; "
        "training.per_device_train_batch_size sets it"
    )
