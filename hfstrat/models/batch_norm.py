"""Batch norms on a CPU, whose backward pass is wrong in torch 2.13 for one image whose gradient is not contiguous.

`BatchNorm2d` reads a gradient `[1, C, H, W]` with the strides of channels-last as if it were contiguous: after
`flatten(2).transpose(1, 2)`, as in RT-DETR and D-FINE, a pass of one image would get a wrong gradient, and a pass of two not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def contiguous_gradients(model: nn.Module) -> Callable[[], None]:
    """Give the batch norms of a model contiguous gradients, by hooks; returns what removes them."""
    handles = [module.register_forward_hook(_on_output) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _on_output(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if output.requires_grad and output.shape[0] == 1:
        output.register_hook(_contiguous)  # type: ignore[no-untyped-call]


def _contiguous(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous()
