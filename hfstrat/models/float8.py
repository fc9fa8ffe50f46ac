"""Products of a training step in float8: torchao's linear layers take the place of the trained ones while the step runs.

Weights, gradients and the optimizer are what they are without it; a product quantizes both factors to 8 bits with one scale
each (Micikevicius et al. 2022, arXiv 2209.05433). Evaluations, checkpoints and the verified result use the model's own layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import nn

from hfstrat.errors import UserError

KEY = "training.float8"
CAPABILITY = (8, 9)  # of GPUs that multiply in float8: Ada, Hopper and newer
MULTIPLE = 16  # of both widths of a layer


class Place(NamedTuple):
    """Where a layer is in the model, itself, and its counterpart with the same parameters."""

    parent: nn.Module
    name: str
    plain: nn.Linear
    in_float8: nn.Module


class Float8Layers:
    """The trained linear layers of a model; as a context manager they compute in float8.

    Args:
        model: whose parameters are on their device, and are not wrapped.
        config: a `Float8LinearConfig`.

    Raises:
        UserError: no layer can compute in float8.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        from torchao.float8.float8_linear import Float8Linear

        output: Any = getattr(model, "get_output_embeddings", None)
        head = None if output is None else output()
        found: list[tuple[nn.Module, str, nn.Linear]] = [
            (parent, name, child)
            for parent in model.modules()
            if not isinstance(parent, nn.ModuleDict)  # PEFT keeps the matrices of an adapter in one
            for name, child in parent.named_children()
            if type(child) is nn.Linear and child is not head and can_compute(child)
        ]
        self.places = [Place(*place, Float8Linear.from_float(place[2], config)) for place in found]
        if not self.places:
            raise UserError(
                f"{KEY}: true, but besides the output layer no torch.nn.Linear is trained whose widths are multiples of "
                f"{MULTIPLE}; set false"
            )

    def __enter__(self) -> Self:
        for place in self.places:
            place.parent._modules[place.name] = place.in_float8
        return self

    def __exit__(self, *error: object) -> None:
        for place in self.places:
            place.parent._modules[place.name] = place.plain


def can_compute(layer: nn.Linear) -> bool:
    """Whether a layer is trained and has widths that products in float8 take."""
    return layer.weight.requires_grad and all(width % MULTIPLE == 0 for width in layer.weight.shape)


def layers_of(model: nn.Module, device: torch.device) -> Float8Layers:
    """The layers of a model that is trained on a device. Raises UserError if the device or no layer computes in float8."""
    return Float8Layers(model, config_for(device))


def config_for(device: torch.device) -> Any:
    """How a device computes. Raises UserError if it cannot."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"{KEY}: true needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher, such as an H100 or an "
            f"L40S; this run is on {name}: set false"
        )
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig(pad_inner_dim=True)  # gradients of weights are products over the tokens, however many
