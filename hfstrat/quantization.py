"""Layers of which the weights are in 8 or 4 bits: which they are, how large, that they stay so, and back. See `quantizing`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfstrat.errors import CRASH, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a layer of bitsandbytes'; its classes are imported nowhere, since it may not be installed."""
    return type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


def keeps_outliers(layer: Any) -> bool:
    """Whether columns in which any row of the batch has an outlier are left out of the quantized product (LLM.int8)."""
    return bool(getattr(getattr(layer, "state", None), "threshold", 0.0))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def elements(parameter: torch.Tensor) -> int:
    """How many weights a parameter stands for: two of 4 bits are one byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def companions(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales and the like of the quantized weights, which are neither parameters nor buffers."""
    for name, layer in layers(model):
        for key, tensor in layer.state_dict().items():
            if key not in ("weight", "bias"):
                yield f"{name}.{key}", tensor


def bytes_in_memory(model: nn.Module) -> int:
    """Of all weights, scales included, each tied one once."""
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    return sum(weights.values()) + sum(tensor.numel() * tensor.element_size() for _, tensor in companions(model))


def steady(model: nn.Module) -> None:
    """Keep each layer's bits as they are.

    On a CPU with AVX512_BF16 bitsandbytes packs the weights anew, in place, in the first forward pass of an evaluation. What
    is trained or merged after that has wrong gradients, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def same_scales(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint's scales have to be those of the base that was quantized anew; the layers have no place to load them to."""
    for name, tensor in companions(module):
        given = state.pop(f"{prefix}{name}", None)
        if given is not None and not torch.equal(given.cpu(), tensor.cpu()):
            raise RunError(f"the checkpoint was made on another base: the scales of {name} are other ones", CRASH)


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that a layer's bits stand for, `[out, in]`."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)


@torch.no_grad()
def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace each quantized layer, in place, by an ordinary one with the weights that its bits stand for."""
    from transformers.pytorch_utils import Conv1D

    found = list(layers(model))
    for name, layer in found:
        weight = weight_of(layer, dtype)
        plain: Any = nn.Linear(1, 1, device="meta")
        if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):  # which keeps its weight the other way round
            with torch.device("meta"):
                plain = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            plain.in_features, plain.out_features = layer.in_features, layer.out_features
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain)
    if found and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
