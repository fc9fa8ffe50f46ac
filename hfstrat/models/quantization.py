"""Models whose frozen weights are in 8 or 4 bits (bitsandbytes): loading them, checking them, and dequantizing them.

A quantized layer is never trained. Trainable parameters (an adapter, a head, the blocks above a frozen prefix) stay in floating
point.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfstrat.errors import CRASH, RunError, UserError
from hfstrat.models.blocks import head_modules
from hfstrat.models.parameter_names import check_modules, is_named
from hfstrat.recipe.format import file_size, percent
from hfstrat.recipe.section import Quantization, Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a layer of bitsandbytes, by its module name: the library may not be installed."""
    return type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


def keeps_outliers(layer: Any) -> bool:
    """Whether columns with outliers are excluded from the quantized product (LLM.int8)."""
    return bool(getattr(getattr(layer, "state", None), "threshold", 0.0))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def elements(parameter: torch.Tensor) -> int:
    """The number of weights of a parameter: with 4 bits, a byte holds two."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def scale_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of quantization scales, which are neither parameters nor buffers."""
    for name, layer in layers(model):
        for key, tensor in layer.state_dict().items():
            if key not in ("weight", "bias"):
                yield f"{name}.{key}", tensor


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all weights, with scales; tied weights count once."""
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    return sum(weights.values()) + sum(tensor.numel() * tensor.element_size() for _, tensor in scale_tensors(model))


def prevent_repacking(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking weights.

    On a CPU with AVX512_BF16 it repacks them in place in the first forward pass in evaluation mode. Training or merging after
    that would silently use wrong gradients or weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_scales(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Check that a checkpoint's scales equal those of the model, which was quantized again; layers cannot load scales."""
    for name, tensor in scale_tensors(module):
        given = state.pop(f"{prefix}{name}", None)
        if given is not None and not torch.equal(given.cpu(), tensor.cpu()):
            raise RunError(f"the checkpoint belongs to another base model: the scales of {name} differ", CRASH)


def dequantized_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized weight of a layer, `[out, in]`."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)


@torch.no_grad()
def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace each quantized layer, in place, by an ordinary one with the dequantized weights."""
    from transformers.pytorch_utils import Conv1D

    found = list(layers(model))
    for name, layer in found:
        weight = dequantized_weight(layer, dtype)
        plain: Any = nn.Linear(1, 1, device="meta")
        if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):  # whose weight is transposed
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


Trainable = Callable[[Shapes, bool], frozenset[str]]

MAX_MISSED = 0.05  # share of the weights to be quantized that may stay unquantized without being named in skip_modules
SHOWN = 6  # names that a message lists


@dataclass
class Loading:
    """The options for loading a quantized model: keywords of `from_pretrained`, and the record for reloading it."""

    section: Quantization
    key: str  # of the recipe
    options: dict[str, Any]
    record: dict[str, Any]


def loading_options(
    section: Quantization,
    key: str,
    auto: Any,
    config: Any,
    remote: bool,
    compute: torch.dtype,
    trainable: Trainable | None = None,
) -> Loading:
    """The options for loading, from the model's structure alone.

    Args:
        auto: the Auto class, `config` its config, `remote` whether code of the model's repository may run.
        compute: the dtype of the forward pass.
        trainable: returns the names of the trainable parameters, from all shapes and whether the head is tied.

    Raises:
        UserError: `skip_modules` matches no module; FSDP or ZeRO-3, since quantized weights cannot be sharded.
    """
    from transformers import BitsAndBytesConfig

    check_world(key)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs its casts at every call
    with torch.device("meta"):
        skeleton = auto.from_config(config, trust_remote_code=remote)
    check_modules(f"{key}.skip_modules", section.skip_modules, (name for name, _ in skeleton.named_modules() if name))
    head, embeddings = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    tied = head is not None and (head.weight is embeddings.weight or bool(config.get_text_config().tie_word_embeddings))
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if not (tied and name == "lm_head.weight")}
    trained = trainable(shapes, tied) if trainable else frozenset()
    unquantized = {name.rpartition(".")[0] for name in trained} | heads(skeleton)
    skipped = sorted(
        name
        for name, module in skeleton.named_modules()
        if is_matrix(module) and (name in unquantized or is_named(name, [*section.skip_modules, *heads(skeleton)]))
    )
    arguments = section.as_bitsandbytes(str(compute).removeprefix("torch."), skipped)
    # trainable weights keep the checkpoint's precision; without any, the model is the one that plain peft loads with `dtype`
    dtype: Any = "auto" if trained else compute
    record = {"quantization": arguments, "dtype": str(dtype).removeprefix("torch.")}
    return Loading(section, key, {"quantization_config": BitsAndBytesConfig(**arguments), "dtype": dtype}, record)


def is_matrix(module: nn.Module) -> bool:
    """Whether bitsandbytes quantizes this module."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def heads(model: Any) -> set[str]:
    """The names of the output modules: the LM head, or the head of a classifier."""
    if (head := model.get_output_embeddings()) is not None:
        return {name for name, module in model.named_modules() if module is head}
    return set(head_modules(model))


def check_world(key: str) -> None:
    """Refuse quantization if weights are sharded. Raises UserError: the alternatives."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    sharding = "FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") else ""
    if sharding := sharding or ("ZeRO-3" if is_deepspeed_zero3_enabled() else ""):
        raise UserError(
            f"{key}: quantized weights cannot be sharded, and {sharding} shards weights; use --accelerate-config ddp or "
            "deepspeed_zero2, or remove quantization"
        )


def finalize(model: PreTrainedModel, loading: Loading, trains_itself: bool) -> dict[str, Any]:
    """Prepare a loaded model for use, and check that it is quantized as requested.

    Args:
        trains_itself: whether some of its own, unquantized weights are trainable.

    Returns:
        Facts for the report; `line` is printed.

    Raises:
        UserError: layers that should have been quantized are not.
    """
    prevent_repacking(model)
    if trains_itself:
        model.is_quantized = False  # Trainer refuses fully quantized models, and takes this model for one
    model.register_load_state_dict_pre_hook(check_scales)
    facts = count_quantized(model, loading)
    facts["weight_bytes"] = bytes_in_memory(model)
    left = f"; not quantized: {', '.join(facts['left_out'])}" if facts["left_out"] else ""
    facts["line"] = (
        f"{'quantized':<9} {facts['quantized_parameters']:,} of {facts['parameters']:,} parameters to {loading.section.name} "
        f"({percent(facts['share'])}), {file_size(facts['weight_bytes'])} in total{left}"
    )
    return facts


def count_quantized(model: nn.Module, loading: Loading) -> dict[str, Any]:
    """Parameters that are quantized and that are not, for the report.

    Raises UserError: more than `MAX_MISSED` of the weights stayed unquantized without being named.
    """
    skipped = loading.record["quantization"]["llm_int8_skip_modules"]
    quantized, sizes = 0, dict[int, int]()
    left, missed = dict[str, int](), dict[str, int]()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in sizes:
                continue
            count, path = elements(parameter), f"{name}.{own}"
            sizes[id(parameter)] = count
            if is_quantized(module) and own == "weight":
                quantized += count
            elif parameter.ndim >= 2:
                left[path] = count
                if not (isinstance(module, nn.Embedding) or name in skipped or is_named(name, loading.section.skip_modules)):
                    missed[path] = count
    total = sum(sizes.values())
    if not quantized or sum(missed.values()) > MAX_MISSED * (quantized + sum(missed.values())):
        raise UserError(_not_quantized(loading, quantized, missed))
    return {
        "name": loading.section.name,
        "parameters": total,
        "quantized_parameters": quantized,
        "share": quantized / total,
        "left_out": grouped(left),
    }


def _not_quantized(loading: Loading, quantized: int, missed: dict[str, int]) -> str:
    if not missed:
        return f"{loading.key}: no layer would be quantized, because of skip_modules or because all are trainable; remove it"
    share = quantized / (quantized + sum(missed.values()))
    largest = grouped(dict(sorted(missed.items(), key=lambda item: -item[1])))
    more = f" and {len(largest) - SHOWN} more" if len(largest) > SHOWN else ""
    return (
        f"{loading.key}: {loading.section.name} would quantize only {share:.0%} of the weights: bitsandbytes quantizes linear "
        f"layers, and {', '.join(largest[:SHOWN])}{more} are not (fused experts?). Name them in skip_modules to keep them "
        "unquantized, or remove quantization"
    )


def grouped(parts: dict[str, int]) -> list[str]:
    """Parameter names, with those of different blocks combined."""
    counts: dict[str, int] = {}
    for name in parts:
        key = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        counts[key] = counts.get(key, 0) + 1
    return [f"{name} x{count}" if count > 1 else name for name, count in counts.items()]
