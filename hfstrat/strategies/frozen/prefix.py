"""The frozen prefix of a model: where it ends, and whether its outputs are the same in every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfstrat.models.quantization import is_quantized, keeps_outliers
from hfstrat.strategies.frozen.boundary import (
    Batch,
    Boundary,
    evaluating,
    final_norm,
    frozen_depth,
    modules_before,
    named_blocks,
)
from hfstrat.strategies.frozen.states import RAW

if TYPE_CHECKING:
    from torch import nn


class Refused(Exception):
    """The frozen part cannot be cached; the message gives the reason."""


@dataclass
class Prefix:
    """The frozen part of a model: its end, the number of its blocks and of all blocks, and all modules that run in it."""

    boundary: Boundary
    frozen: int
    blocks: int
    modules: dict[str, nn.Module]


def find_prefix(model: nn.Module, batch: Batch) -> Prefix:
    """The longest frozen prefix of a model, with its boundary bound.

    Args:
        batch: collated examples, without labels, on the model's device.

    Raises:
        Refused: no block is frozen, or the blocks cannot be identified.
    """
    if not (blocks := named_blocks(model)):
        raise Refused(f"the transformer blocks of {type(model).__name__} cannot be identified")
    try:
        frozen = frozen_depth(model, blocks, batch)
    except Exception as error:  # an unknown structure can fail in any way
        raise Refused(f"its blocks cannot be run one by one ({type(error).__name__}: {error})") from error
    if not frozen:
        raise Refused(_why_nothing_is_frozen(model))
    if any(getattr(block.module, "_compiled_call_impl", None) for block in blocks):
        raise Refused("its blocks are compiled, and a compiled block cannot be skipped")
    skipped = blocks[:frozen]
    norm = final_norm(model, blocks)
    if frozen == len(blocks) and norm and not any(p.requires_grad for p in norm.module.parameters()):
        skipped = [*skipped, norm]
    boundary = Boundary(model, skipped)
    boundary.bind()
    try:
        return Prefix(boundary, frozen, len(blocks), modules_before(boundary, batch))
    except Exception:
        boundary.unbind()
        raise


def _why_nothing_is_frozen(model: Any) -> str:
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any("lora_" in name for name in learning):
        return "adapters are trained in the first block, or before it"
    embeddings = model.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embeddings.parameters()):
        head = model.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is embeddings.weight
        return f"the input embeddings are trained{', since they are tied to the LM head' if tied else ''}"
    return f"parameters are trained in the first block, or before it ({learning[0] if learning else 'nothing is frozen'})"


def can_precompute(prefix: Prefix, batch: Batch) -> str | None:
    """The reason why the outputs of the prefix differ between epochs, or None."""
    config, boundary = prefix.boundary.model.config, prefix.boundary
    if dropped := [name for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop") if getattr(config, name, 0)]:
        return f"layers are skipped at random ({dropped[0]} in the model's config)"
    if mixed := [name for name, module in prefix.modules.items() if is_quantized(module) and keeps_outliers(module)]:
        return f"the output of an int8 layer depends on outliers of the other examples in the batch ({mixed[0]})"
    with torch.no_grad(), torch.random.fork_rng(), evaluating(boundary.model):
        calm = boundary.take(batch)
        boundary.model.train()
        torch.manual_seed(0)
        trained = boundary.take(batch)
    if calm.dtype not in RAW:
        return f"its hidden states are {str(calm.dtype).removeprefix('torch.')}"
    if not torch.equal(calm, trained):
        active = [(name, value) for name, module in prefix.modules.items() if (value := _dropout_rate(module))]
        if active:
            name, value = active[0]
            return f"dropout is active in the frozen part ({name}: {value:g}); set strategy.frozen_dropout: false"
        return "the frozen part computes different outputs in training and in evaluation"
    return None


def _dropout_rate(module: nn.Module) -> float:
    """The rate of a dropout module, or of an attention with dropout of its own."""
    values = [module.p] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else []
    values += [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return float(max(values, default=0.0))
