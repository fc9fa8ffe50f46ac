"""What LoRA adapts in special families, by names: routed experts, routers, layers that PEFT refuses. No torch.

transformers fuses the weights of all experts of a layer: gate and up projection into one parameter, down projections into
another. In some families PEFT maps the projections' names to these parameters, also for linear layers outside of the routed
experts; and it gives gate and up together twice the rank.
"""

from __future__ import annotations

import re

# those whose experts PEFT adapts (peft.utils.transformers_weight_conversion, 0.21), by the names of their projections
PROJECTIONS = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}
LIKE_MIXTRAL = ("minimax", "minimax_m2", "mixtral")
LIKE_QWEN = (
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum"),
    *("olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open"),
)
EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.weight$")
ROUTER = re.compile(r"(^|\.)(gate|router|router\.layer|shared_expert_gate)$")
READ_BY_KERNELS = ("out_proj", "conv1d")
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # peft.tuners.tuners_utils, 0.21
GATE_AND_UP, DOWN = ("w1", "w3", "gate_proj", "up_proj"), ("w2", "down_proj")  # what transformers fuses


def not_adaptable(family: str, module: str) -> bool:
    """Whether PEFT refuses to adapt this layer, since kernels of the family read its weight directly."""
    return family in MAMBA and module.rsplit(".", 1)[-1] in READ_BY_KERNELS


def projections_of(family: str) -> tuple[str, ...]:
    """The names of the projections that PEFT takes for those of routed experts; empty where it does not know the family."""
    if family in LIKE_MIXTRAL:
        return PROJECTIONS["mixtral"]
    return PROJECTIONS["qwen2_moe"] if family in LIKE_QWEN else ()


def adapter_weights(name: str, shape: tuple[int, ...], r: int, family: str, parameters: list[str]) -> int | None:
    """Parameters of an adapter of rank `r` on a weight of routed experts in a checkpoint's file; None if it is none.

    Args:
        family: whose experts PEFT may adapt by itself.
        parameters: names of fused parameters that are adapted too (`target_parameters`).
    """
    if len(shape) == 3 and ".experts." in f".{name}.":  # fused in the file
        return r * shape[0] * (shape[1] + shape[2]) * _is_named(name, parameters)
    if (found := EXPERT.search(name)) is None:
        return None
    by_itself = found[1] in projections_of(family)
    if found[1] in DOWN:
        return r * sum(shape) * (by_itself or _is_named("down_proj", parameters))
    if found[1] in GATE_AND_UP and (by_itself or _is_named("gate_up_proj", parameters)):
        return (2 if by_itself else 1) * r * (shape[1] + 2 * shape[0]) // 2  # half of the adapter that both share
    return 0


def _is_named(name: str, parameters: list[str]) -> bool:
    return any(name == each or name.endswith(f".{each}") or each.endswith(f".{name}") for each in parameters)
