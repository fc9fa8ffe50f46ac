"""Batch and instance norms on a CPU, whose backward pass is wrong in torch 2.13 for one image whose gradient is not contiguous.

They read a gradient `[1, C, H, W]` with the strides of channels-last as if it were contiguous: after
`flatten(2).transpose(1, 2)`, as in hybrids of convolutions and attention, a pass of one image would get a wrong gradient, and a
pass of two not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

AFFECTED = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def contiguous_gradients(model: nn.Module) -> Callable[[], None]:
    """Give these norms of a model contiguous gradients, by hooks; returns what removes them."""
    handles = [module.register_forward_hook(_on_output) for module in model.modules() if isinstance(module, AFFECTED)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _on_output(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if output.requires_grad and output.shape[0] == 1 and output.device.type == "cpu":
        output.register_hook(_contiguous)  # type: ignore[no-untyped-call]


def _contiguous(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous()
