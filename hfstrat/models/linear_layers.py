"""Which layers `target_modules: all-linear` adapts, where PEFT's own choice does not train or surprises.

PEFT takes every `nn.Linear` but the head. In a mixture of experts that includes routers, which are left alone here, since a
changed router sends tokens to other experts; and the routed experts are no `nn.Linear` but fused parameters, which PEFT adapts
only in the families that it knows. In Mamba-like families PEFT refuses layers whose weights their kernels read directly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from hfstrat.models.blocks import body_name
from hfstrat.models.experts import ROUTER, not_adaptable, projections_of

NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class Targets(NamedTuple):
    """The arguments of `LoraConfig` that stand for all-linear in one model, and the reason why layers are left out."""

    target_modules: str | list[str]
    exclude_modules: list[str] | None
    left_out: str | None
    target_parameters: list[str]


def expert_parameters(model: Any) -> list[str]:
    """The names of fused weights of routed experts: `[experts, ., .]` each. Empty for a model without them."""
    config = model.config.get_text_config()
    counts = {getattr(config, name, None) for name in NUMBERS_OF_EXPERTS} - {None, 1}
    return [name for name, p in model.named_parameters() if p.dim() == 3 and p.shape[0] in counts]


def all_linear(model: Any) -> Targets:
    """What all-linear means in this model. `model` is one of transformers, without an adapter."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    has_experts = bool(expert_parameters(model))
    routers = [name for name in names if has_experts and ROUTER.search(name)]
    kernels = [name for name in names if not_adaptable(model.config.model_type, name)]
    excluded = [*routers, *kernels]
    if experts := _expert_modules(model):
        kept = {_leaf(name) for name in names if name not in excluded and model.get_submodule(name) is not _head(model)}
        targets: str | list[str] = sorted(kept | experts)
        renamed = [name for name in names if name not in excluded and _leaf(name) in projections_of(model.config.model_type)]
        parameters = sorted({_weight_of(name) for name in renamed if hasattr(model.get_submodule(name), "weight")})
    else:
        targets, parameters = "all-linear", []
    if not parameters and targets == "all-linear" and all(model.get_submodule(name) in heads_of(model) for name in names):
        targets = convolutions(model)
    reasons = [
        f"{', '.join(sorted({_leaf(name) for name in some}))} ({why})"
        for some, why in ((routers, "routers"), (kernels, "PEFT cannot adapt it in this family"))
        if some
    ]
    return Targets(
        targets, sorted({_shortest(name, excluded, names) for name in excluded}) or None, "; ".join(reasons) or None, parameters
    )


def linear_names(model: Any) -> list[str]:
    """The names of all linear layers but the head."""
    from transformers.pytorch_utils import Conv1D

    head = _head(model)
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def heads_of(model: Any) -> list[nn.Module]:
    """The modules beside the body: the head of a classifier."""
    body = f"{body_name(model)}."
    return [module for name, module in model.named_modules() if name and not name.startswith(body) and name != body[:-1]]


def convolutions(model: Any) -> str | list[str]:
    """The names of the convolutions of a body without linear layers, which PEFT adapts as it does linear layers.

    Grouped ones are left out: their kernels see single channels, and an adapter of a rank would be larger than they are.
    """
    heads = {id(module) for module in heads_of(model)}
    found = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and id(m) not in heads]
    return found or "all-linear"


def not_adapted(model: Any, base: Any, left_out: list[str]) -> list[str]:
    """The names of linear layers of `base` that got no adapter in `model`, but for the head and what was left out."""
    adapted = {id(module.base_layer) for module in model.modules() if hasattr(module, "lora_A")}
    return sorted(
        {
            _leaf(name)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear)
            and "lora_" not in name
            and id(module) not in adapted
            and module is not _head(base)
            and not any(name == other or name.endswith(f".{other}") for other in left_out)
        }
    )


def _expert_modules(model: Any) -> set[str]:
    """The names that the projections of routed experts had before transformers fused them, such as w1; PEFT knows these."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return {
        pattern.removesuffix(".weight").rsplit(".", 1)[-1]
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(conversion, WeightConverter)
        for pattern in conversion.source_patterns
        if ".experts.*." in pattern
    }


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _weight_of(name: str) -> str:
    """The name of a layer's weight, without the model's and the block's."""
    parts = name.split(".")
    within = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join([*parts[within + 1 :], "weight"])


def _shortest(name: str, excluded: list[str], names: list[str]) -> str:
    """The last part of a name, if it names only layers that are excluded; else the whole name."""
    same = [other for other in names if _leaf(other) == _leaf(name)]
    return _leaf(name) if all(other in excluded for other in same) else name
