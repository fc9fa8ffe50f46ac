"""A head that is trained on standardized targets and predicts in the units of the targets, and how it becomes a plain layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

CONSTANT_RIDGE = 1e-4  # of the mean squared feature norm, for the direction that stands for a missing bias


class Units(NamedTuple):
    """Mean and standard deviation of each target on the training examples, `[targets]` in float64."""

    mean: torch.Tensor
    std: torch.Tensor

    def standardize(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[..., targets]` in the units of the targets as standardized ones."""
        return (values - self.mean.to(values)) / self.std.to(values)

    def to_original(
        self, weight: torch.Tensor, bias: torch.Tensor | None, constant: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight `[targets, H]` and bias of a layer for standardized targets as those of a layer in the original units.

        Args:
            constant: `[H]`, a direction on which features are about 1: it takes the place of a bias where there is none.
        """
        scaled = self.std[:, None] * weight.double().cpu()
        if bias is None:
            return scaled + self._shift(constant), None
        return scaled, self.std * bias.double().cpu() + self.mean

    def to_standardized(
        self, weight: torch.Tensor, bias: torch.Tensor | None, constant: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inverse of `to_original`."""
        wide, std = weight.double().cpu(), self.std[:, None]
        if bias is None:
            return (wide - self._shift(constant)) / std, None
        return wide / std, (bias.double().cpu() - self.mean) / self.std

    def _shift(self, constant: torch.Tensor | None) -> torch.Tensor:
        assert constant is not None
        return self.mean[:, None] * constant.double().cpu()


class ScaledLinear(nn.Linear):
    """`std * (W x + b) + mean` in float32; without a bias, `std * W x + mean * (constant x)`. Both are linear, so that they
    fold exactly. The buffers are not saved: they are a function of the training data and the model at the start."""

    mean: torch.Tensor
    std: torch.Tensor
    constant: torch.Tensor | None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        standardized = functional.linear(features, self.weight, self.bias).float()
        with torch.autocast(features.device.type, enabled=False):
            shift = 1.0 if self.constant is None else (features.float() @ self.constant)[..., None]
            return self.std * standardized + self.mean * shift

    @property
    def units(self) -> Units:
        return Units(self.mean.double().cpu(), self.std.double().cpu())


@torch.no_grad()
def scale(layer: nn.Linear, units: Units, constant: torch.Tensor | None, keep: bool) -> None:
    """Make a linear layer one that is trained on standardized targets, in place.

    Args:
        keep: whether its outputs stay as they are, because it was trained in the units of the targets; else its weights are
            random and are taken as those for standardized targets.
    """
    if layer.bias is None and constant is None:
        raise ValueError("a layer without a bias needs a constant direction")
    if keep:
        write(layer, *units.to_standardized(layer.weight, layer.bias, constant))
    layer.__class__ = ScaledLinear
    place = layer.weight.device
    layer.register_buffer("mean", units.mean.float().to(place), persistent=False)
    layer.register_buffer("std", units.std.float().to(place), persistent=False)
    layer.register_buffer("constant", None if constant is None else constant.float().to(place), persistent=False)


@torch.no_grad()
def standardize(model: nn.Module, order: list[int]) -> None:
    """Take the weights that were loaded into every `ScaledLinear` of a model as those of a layer in the original units, whose
    outputs `order` are those of the model; in place."""
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            bias = None if module.bias is None else module.bias[order]
            write(module, *module.units.to_standardized(module.weight[order], bias, module.constant))


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Make every `ScaledLinear` of a model a plain layer with the same outputs, in place."""
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            write(module, *module.units.to_original(module.weight, module.bias, module.constant))
            for name in ("mean", "std", "constant"):
                delattr(module, name)
            module.__class__ = nn.Linear  # type: ignore[assignment]


@torch.no_grad()
def write(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Copy these values into a layer, in its own precision."""
    layer.weight.copy_(weight)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)


def constant_direction(features: torch.Tensor) -> torch.Tensor:
    """A direction `[H]` on which features `[n, H]` are about 1: ridge regression of the constant 1, without an intercept."""
    wide = features.double()
    return wide.T @ _inverse(wide).sum(1)


def constant_error(features: torch.Tensor) -> float:
    """How far from 1 each example is on the direction that is found from the others; root mean square."""
    inverse = _inverse(features.double())
    return float((inverse.sum(1) / inverse.diagonal()).square().mean().sqrt())


def _inverse(features: torch.Tensor) -> torch.Tensor:
    """Of the penalized inner products of features `[n, H]`."""
    gram = features @ features.T
    return torch.linalg.inv(gram + CONSTANT_RIDGE * gram.diagonal().mean() * torch.eye(len(features), dtype=gram.dtype))
