"""Layers of which the weights are in 8 or 4 bits: which they are, how large, that they stay so, and back. See `quantizing`.

Loading a model with its frozen weights in 8 or 4 bits, by bitsandbytes, and making sure that it happened.

A quantized layer keeps its matrix in a few bits and multiplies by what these stand for; it never learns. What learns (an
adapter, a head, the blocks above a frozen prefix) is left in floating point.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfstrat.errors import CRASH, RunError, UserError
from hfstrat.models.parameter_names import is_named
from hfstrat.recipe.quantization import Quantization
from hfstrat.recipe.section import Shapes

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


Learns = Callable[[Shapes, bool], frozenset[str]]


MISSED = 0.05  # share of the weights to be quantized that may be left without being named


SHOWN = 6  # names that a message lists


@dataclass
class Wanted:
    """How a model is to be loaded: keywords for `from_pretrained`, and what a later reload needs."""

    section: Quantization
    key: str  # of the recipe
    options: dict[str, Any]
    record: dict[str, Any]


def wanted(
    section: Quantization, key: str, auto: Any, config: Any, remote: bool, compute: torch.dtype, learns: Learns | None = None
) -> Wanted:
    """What to load, from the model's structure alone.

    Args:
        auto: the Auto class, `config` its config, `remote` whether code that comes with the model may run.
        compute: of the forward pass.
        learns: tells from the parameters' shapes, and whether the head is tied, which of them will learn.

    Raises:
        UserError: `skip_modules` names nothing; FSDP or ZeRO-3, which shard what bitsandbytes cannot.
    """
    from transformers import BitsAndBytesConfig

    check_world(key)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of its casts at every call
    with torch.device("meta"):
        skeleton = auto.from_config(config, trust_remote_code=remote)
    modules = {name for name, _ in skeleton.named_modules() if name}
    check_names(section, key, modules)
    head, embeddings = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    tied = head is not None and (head.weight is embeddings.weight or bool(config.get_text_config().tie_word_embeddings))
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if not (tied and name == "lm_head.weight")}
    learning = learns(shapes, tied) if learns else frozenset()
    whole = {name.rpartition(".")[0] for name in learning} | heads(skeleton)
    skipped = sorted(
        name
        for name, module in skeleton.named_modules()
        if is_matrix(module) and (name in whole or is_named(name, [*section.skip_modules, *heads(skeleton)]))
    )
    arguments = section.as_bitsandbytes(str(compute).removeprefix("torch."), skipped)
    # what learns begins as the checkpoint has it; where nothing of the model's own does, plain peft gets the same with `dtype`
    dtype: Any = "auto" if learning else compute
    record = {"quantization": arguments, "dtype": str(dtype).removeprefix("torch.")}
    return Wanted(section, key, {"quantization_config": BitsAndBytesConfig(**arguments), "dtype": dtype}, record)


def is_matrix(module: nn.Module) -> bool:
    """Whether bitsandbytes replaces it."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def heads(model: Any) -> set[str]:
    """The modules that answer: the LM head, or what stands beside a classifier's body."""
    from hfstrat.models.classifier_heads import head_modules

    if (head := model.get_output_embeddings()) is not None:
        return {name for name, module in model.named_modules() if module is head}
    return set(head_modules(model))


def check_names(section: Quantization, key: str, modules: set[str]) -> None:
    for name in section.skip_modules:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            known = sorted({module.rsplit(".", 1)[-1] for module in modules if not module.rsplit(".", 1)[-1].isdigit()})
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{key}.skip_modules: '{name}' matches no module of this model; {hint}")


def check_world(key: str) -> None:
    """Raises UserError where weights are sharded: packed bits cannot be."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    sharding = "FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") else ""
    if sharding := sharding or ("ZeRO-3" if is_deepspeed_zero3_enabled() else ""):
        raise UserError(
            f"{key}: {sharding} shards weights, and quantized ones stay whole on each process; take --accelerate-config ddp "
            "(or deepspeed_zero2), where each process has them all, or remove quantization"
        )


def settle(model: PreTrainedModel, how: Wanted, trains_itself: bool) -> dict[str, Any]:
    """Bring a model that was just loaded into the state that it keeps, and check that it is what was wanted.

    Args:
        trains_itself: whether some of its own weights, which are not quantized, will learn.

    Returns:
        Facts for the report; `line` is for the screen.

    Raises:
        UserError: layers that should have been quantized are not.
    """
    steady(model)
    if trains_itself:
        model.is_quantized = False  # Trainer refuses models of which all is quantized, and takes this one for such
    model.register_load_state_dict_pre_hook(same_scales)
    facts = account(model, how)
    facts["weight_bytes"] = bytes_in_memory(model)
    left = f"; left as they are: {', '.join(facts['left_out'])}" if facts["left_out"] else ""
    facts["line"] = (
        f"{'quantized':<9} {facts['quantized_parameters']:,} of {facts['parameters']:,} parameters to {how.section.name} "
        f"({facts['share']:.1%}), {facts['weight_bytes'] / 1e6:,.1f} MB in all{left}"
    )
    return facts


def account(model: nn.Module, how: Wanted) -> dict[str, Any]:
    """What is quantized and what is not. Raises UserError where more than a little is not that nobody left out."""
    skipped = how.record["quantization"]["llm_int8_skip_modules"]
    quantized, seen = 0, set[int]()
    left, missed = dict[str, int](), dict[str, int]()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count, whole = elements(parameter), f"{name}.{own}"
            if is_quantized(module) and own == "weight":
                quantized += count
            elif parameter.ndim >= 2:
                left[whole] = count
                if not (isinstance(module, nn.Embedding) or name in skipped or is_named(name, how.section.skip_modules)):
                    missed[whole] = count
    total = sum({id(p): elements(p) for p in model.parameters()}.values())
    if not quantized or sum(missed.values()) > MISSED * (quantized + sum(missed.values())):
        raise UserError(_not_quantized(how, quantized, missed))
    return {
        "name": how.section.name,
        "parameters": total,
        "quantized_parameters": quantized,
        "share": quantized / total,
        "left_out": grouped(left),
    }


def _not_quantized(how: Wanted, quantized: int, missed: dict[str, int]) -> str:
    if not missed:
        return f"{how.key}: no layer of this model would be quantized (skip_modules, or all of it learns); remove it"
    share = quantized / (quantized + sum(missed.values()))
    largest = grouped(dict(sorted(missed.items(), key=lambda item: -item[1])))
    more = f" and {len(largest) - SHOWN} more" if len(largest) > SHOWN else ""
    return (
        f"{how.key}: {how.section.name} would quantize only {share:.0%} of what it should: bitsandbytes knows linear layers, "
        f"and {', '.join(largest[:SHOWN])}{more} are none (experts in one piece?). Name them in skip_modules to leave them as "
        "they are, or remove quantization"
    )


def grouped(parts: dict[str, int]) -> list[str]:
    """Parameter names, those of different blocks together."""
    counts: dict[str, int] = {}
    for name in parts:
        key = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        counts[key] = counts.get(key, 0) + 1
    return [f"{name} x{count}" if count > 1 else name for name, count in counts.items()]
