"""A gradient for trainable parameters that a pass does not use, such as those behind images in a batch without any.

Each of several processes has to reduce all gradients: with one missing, DistributedDataParallel ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed, nn

OUTPUTS = ("total", "loss", "logits")  # what a loss is computed from


def several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def zero_of(parameters: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """A zero in float32 that depends on all of the trainable ones; None if there are none. Added to a loss it is their use."""
    firsts = [parameter.flatten()[0].float() for parameter in parameters if parameter.requires_grad and parameter.numel()]
    return torch.stack(firsts).sum() * 0 if firsts else None


def use_all(
    model: nn.Module, may_be_unused: Callable[[str], bool] | None = None, alone: Callable[[dict[str, Any]], bool] | None = None
) -> Callable[[], None]:
    """Give trainable parameters a gradient in each training pass of several processes, by a hook; returns what removes it.

    Args:
        may_be_unused: which of them, by name; by default all.
        alone: from the inputs of a pass, whether a single process does the same.
    """

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if not several_processes() and (alone is None or not alone(kwargs)):
            return
        named = module.named_parameters()
        zero = zero_of(p for name, p in named if may_be_unused is None or may_be_unused(name))
        for key in OUTPUTS:
            if zero is not None and isinstance(value := output.get(key), torch.Tensor):
                output[key] = value + zero.to(value)

    return model.register_forward_hook(hook, with_kwargs=True).remove
