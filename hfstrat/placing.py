"""Where a loaded model answers: on a GPU that has room for it, on several together, or on the CPU."""

from __future__ import annotations

import os
import sys
from typing import Any

from hfstrat.errors import OUT_OF_MEMORY, RunError

SHARE = 0.9  # of the free memory that weights may take: a forward pass needs the rest


def choose(needed: int, free: int | None, spreads: bool) -> str:
    """One of cuda, spread (over the GPUs, and what is left on the CPU) and cpu.

    Args:
        needed: bytes of the weights.
        free: bytes of the GPU; None where there is none.
        spreads: whether the model may be in pieces.
    """
    if free is None:
        return "cpu"
    if needed <= SHARE * free:
        return "cuda"
    return "spread" if spreads else "cpu"


def placed(model: Any, spreads: bool = False, widened: bool = False) -> Any:
    """The model where there is room for it; says so where that is not one GPU, although there is one.

    Args:
        model: loaded, on the CPU; one that bitsandbytes quantized is on the GPU already, and stays there.
        spreads: whether forward passes are all that is wanted, which can be done in pieces.
        widened: whether it will be in float32, as for merging.
    """
    import torch

    from hfstrat.quantization import bytes_in_memory

    if not torch.cuda.is_available() or next(model.parameters()).device.type == "cuda":
        return model
    torch.cuda.empty_cache()  # of a model before this one
    needed = 4 * sum(p.numel() for p in model.parameters()) if widened else bytes_in_memory(model)
    free = torch.cuda.mem_get_info()[0]
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    where = choose(needed, free, spreads and alone and bool(getattr(inner_of(model), "_no_split_modules", None)))
    if where == "cuda":
        return model.to("cuda")
    kind = "its layers are shared out" if where == "spread" else "it runs on the CPU, which is slow"
    print(f"the weights take {needed / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB free: {kind}", file=sys.stderr, flush=True)
    return spread(model, needed) if where == "spread" else model


def spread(model: Any, needed: int) -> Any:
    """Layers on all GPUs, those that are left on the CPU, by accelerate; in place."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map

    inner = inner_of(model)
    room: dict[Any, Any] = {i: int(SHARE * torch.cuda.mem_get_info(i)[0]) for i in range(torch.cuda.device_count())}
    room["cpu"] = 2 * needed  # where it is now
    places = infer_auto_device_map(inner, max_memory=room, no_split_module_classes=list(inner._no_split_modules))
    dispatch_model(inner, places, skip_keys=getattr(inner, "_skip_keys_device_placement", None))
    return model


def inner_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def no_room(target: str) -> RunError:
    """What is said where a GPU's memory runs out although it seemed to be enough, or bitsandbytes had to put it there."""
    return RunError(
        f"{target}: the GPU has no room for it. What would work: --quantization nf4 (generate, chat, predict, evaluate), which "
        "takes a quarter of 16 bits; CUDA_VISIBLE_DEVICES= before the command, which runs it on the CPU",
        OUT_OF_MEMORY,
    )
