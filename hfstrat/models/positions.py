"""Position embeddings of vision transformers for another image size than that of their training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfstrat.errors import UserError


@torch.no_grad()
def fit_size(model: Any, height: int, width: int) -> str:
    """Give a model position embeddings for images of this size, in place; returns a line about it, "" where nothing changes.

    They are interpolated by the model's own `interpolate_pos_encoding` and stored, since a pipeline does not ask for it in each
    call. Models that always interpolate (DINOv2) or have no absolute positions (Swin, ConvNeXt, ResNet) stay as they are.

    Raises:
        UserError: positions for which transformers has no interpolation.
    """
    if _size_of(model.config) in (None, (height, width)):
        return ""
    before = _size_of(model.config)
    found = [
        module for module in model.modules() if hasattr(module, "interpolate_pos_encoding") and _positions(module) is not None
    ]
    fixed = [module for module in found if _checks_size(module)]
    if not found and any("position" in name and p.dim() == 3 for name, p in model.named_parameters()):
        raise UserError(
            f"image.image_size: transformers cannot interpolate the position embeddings of {type(model).__name__}; remove it"
        )
    for module in fixed:
        _resize(module, height, width)
    if fixed or not found:
        model.config.image_size = height if height == width else (height, width)
    how = "interpolated" if fixed else "interpolated in each forward pass" if found else "not needed"
    return f"{'images':<9} {height} x {width} pixels instead of {before[0]} x {before[1]}: position embeddings are {how}"  # type: ignore[index]


def _size_of(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _positions(module: nn.Module) -> nn.Parameter | None:
    found = getattr(module, "position_embeddings", None)
    return found if isinstance(found, nn.Parameter) and found.dim() == 3 else None


def _checks_size(module: Any) -> bool:
    """Whether the embeddings take one size only, unless each call asks for interpolation."""
    import inspect

    return "interpolate_pos_encoding" in inspect.signature(module.forward).parameters


def _resize(module: Any, height: int, width: int) -> None:
    old, patches = module.position_embeddings, module.patch_embeddings
    high, wide = (patches.patch_size, patches.patch_size) if isinstance(patches.patch_size, int) else patches.patch_size
    count = (height // high) * (width // wide)
    extra = old.shape[1] - patches.num_patches  # tokens before the patches, such as CLS
    dummy = old.new_zeros(1, count + extra, old.shape[2])
    module.position_embeddings = nn.Parameter(module.interpolate_pos_encoding(dummy, height, width).clone())
    patches.image_size, patches.num_patches = (height, width), count
    if hasattr(module, "image_size"):
        module.image_size = (height, width)
