"""Sharded models (FSDP2, ZeRO): an outline without weights is kept, and filled with the gathered weights after training.

Until it is wrapped, each process has the complete model on the CPU, as without sharding; then it has only its shard. After
training all weights are gathered into the outline, so that what is compared, printed and saved is an ordinary model.
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


def reshard(model: Any) -> None:
    """Shard parameters of FSDP2 again that an evaluation has left whole: weights cannot be loaded into them."""
    for module in model.modules():
        if callable(again := getattr(module, "reshard", None)):
            again()


def disable_sharded_loading() -> None:
    """Make transformers load complete models: accelerate enables ZeRO-3 loading even if `zero3_init_flag` is false."""
    if distributed.wrapping() == distributed.DEEPSPEED:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def outline(model: nn.Module) -> nn.Module | None:
    """A copy of the model without weights, which uses no memory; None if the model is not sharded."""
    if not distributed.is_sharded():
        return None
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def gather_model(trainer: Trainer, full: nn.Module, base: Base) -> None:
    """Give each process the complete trained model in `full`, its outline, and release the shards; a collective operation."""
    shards = trainer.accelerator.unwrap_model(trainer.model)
    fill(full, shards)
    for name, buffer in shards.named_buffers():
        parent, _, leaf = name.rpartition(".")
        full.get_submodule(parent)._buffers[leaf] = buffer.detach().cpu()
    name = next(name for name, module in shards.named_modules() if module is base.model)
    base.model = full.get_submodule(name)  # type: ignore[assignment]
    trainer.model = trainer.model_wrapped = full
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False  # from here on it is an ordinary model
    trainer.deepspeed = None
    disable_sharded_loading()
    move_if_it_fits(full, trainer.args.device)


@torch.no_grad()
def fill(full: nn.Module, shards: nn.Module) -> None:
    """Copy all weights of a sharded model into its outline, on the CPU."""
    here = dict(shards.named_parameters())
    for name, empty in full.named_parameters():
        value = nn.Parameter(gather_parameter(here[name]).cpu(), empty.requires_grad)
        torch.utils.swap_tensors(empty, value)  # type: ignore[no-untyped-call]  # keeps the object, for references to it


@torch.no_grad()
def gather_parameter(shard: Any) -> torch.Tensor:
    """The complete parameter, in the precision of training; a collective operation."""
    from torch.distributed.tensor import DTensor

    if isinstance(shard, DTensor):
        kind = shard.device_mesh.device_type
        on_mesh: Any = shard.detach() if shard.device.type == kind else shard.detach().to(kind)
        return on_mesh.full_tensor()
    if distributed.wrapping() != distributed.DEEPSPEED:
        return shard.detach().clone()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if shard.requires_grad and shard.dtype != torch.float32:
        master = safe_get_full_fp32_param(shard)
        if master is not None:
            return master.detach().clone()
    if not hasattr(shard, "ds_id"):
        return shard.detach().clone()
    with deepspeed.zero.GatheredParameters([shard]):
        return shard.detach().clone()


def move_if_it_fits(model: nn.Module, device: torch.device) -> bool:
    """Move a complete model to the device if its free memory is twice the model's size; returns whether it is there."""
    if device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if fits := 2 * size < torch.cuda.mem_get_info(device)[0]:
        model.to(device)
    return fits


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model to the device for the duration, if it fits: until it is sharded, a model is on the CPU, which is slow."""
    moved = (
        distributed.is_sharded()
        and next(model.parameters()).device.type == "cpu" != device.type
        and move_if_it_fits(model, device)
    )
    try:
        yield
    finally:
        if moved:
            model.to("cpu")
            torch.cuda.empty_cache()


def reduce_in_float32(trainer: Trainer) -> None:
    """Under FSDP2, sum gradients in float32, and do not round outputs (losses, logits) to 16 bits."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is None or policy is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)


def add_remark(base: Base) -> None:
    """Add a remark on what is different in a sharded run."""
    how = {distributed.FSDP: "FSDP2", distributed.DEEPSPEED: "DeepSpeed"}[distributed.wrapping()]
    base.say(
        f"{how}: automatic micro-batch sizing and packing are off, since the model is sharded; set "
        "training.per_device_train_batch_size"
    )
