"""The parts of a vision-language model by role: the vision tower, the projector behind it, and the language model.

One table for all families: a prefix of parameter names for each role, relative to the body. The longest prefix that fits
decides, since some families have the projector inside of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hfstrat.errors import UserError

VISION, PROJECTOR, LANGUAGE = "vision", "projector", "language"
ROLES = (VISION, PROJECTOR, LANGUAGE)
Prefixes = dict[str, tuple[str, ...]]

LLAVA: Prefixes = {
    VISION: ("vision_tower",),
    PROJECTOR: ("multi_modal_projector", "image_newline"),
    LANGUAGE: ("language_model", "lm_head"),
}
IDEFICS: Prefixes = {VISION: ("vision_model",), PROJECTOR: ("connector",), LANGUAGE: ("text_model", "lm_head")}
QWEN: Prefixes = {
    VISION: ("visual",),
    PROJECTOR: ("visual.merger", "visual.deepstack_merger_list"),
    LANGUAGE: ("language_model", "lm_head"),
}
FAMILIES: dict[str, Prefixes] = {
    **dict.fromkeys(
        (
            *("llava", "llava_next", "llava_onevision", "vipllava", "gemma3", "internvl", "aya_vision", "mistral3"),
            *("paligemma", "cohere2_vision", "got_ocr2", "lfm2_vl", "fast_vlm", "perception_lm"),
        ),
        LLAVA,
    ),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), IDEFICS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"), QWEN),
}
CASTING = ("smolvlm",)  # families that give the features of images the type of their first weight


def prefixes_of(model: Any) -> Prefixes:
    """The prefixes of each role of a model of transformers. Raises UserError: a family that is not known."""
    family = str(model.config.model_type)
    if family not in FAMILIES:
        raise UserError(
            f"strategy.freeze: the vision tower of the family {family} is not known; known are {', '.join(sorted(FAMILIES))}. "
            "Set freeze: [] to train all of it"
        )
    return FAMILIES[family]


def role_of(name: str, prefixes: Prefixes) -> str:
    """The role of a parameter or module, by its name in the model or in its adapter; empty where it has none."""
    parts = name.split(".")
    while parts and parts[0] in ("model", "base_model"):
        parts = parts[1:]
    inner = ".".join(parts)
    found = [(len(prefix), role) for role, some in prefixes.items() for prefix in some if f"{inner}.".startswith(f"{prefix}.")]
    return max(found)[1] if found else ""


def freeze(model: Any, roles: Iterable[str]) -> None:
    """Freeze the parameters of these roles, in place. Raises UserError: an unknown family, or a role without parameters."""
    wanted = set(roles)
    if not wanted:
        return
    prefixes, done = prefixes_of(model), set[str]()
    for name, parameter in model.named_parameters():
        if (role := role_of(name, prefixes)) in wanted:
            parameter.requires_grad_(False)
            done.add(role)
    if missing := wanted - done:
        raise UserError(
            f"strategy.freeze: this {model.config.model_type} model has no part {', '.join(sorted(missing))}; remove it"
        )


def use_all(model: Any) -> Callable[[], None]:
    """Give every trainable parameter behind images a gradient in each training pass, by a hook; returns what removes it.

    A batch without images does not use them: their gradient is then zero, as that of images without loss. Nor are the last
    blocks of a tower used of which an earlier layer is read.
    """
    from hfstrat.models import unused_parameters

    prefixes = FAMILIES.get(str(model.config.model_type))

    def is_behind_images(name: str) -> bool:
        return prefixes is None or role_of(name, prefixes) != LANGUAGE

    return unused_parameters.use_all(model, is_behind_images, lambda inputs: inputs.get("pixel_values") is None)


def of_one_type(model: Any) -> list[Any]:
    """The modules of a vision-language model whose weights need one type: the input embeddings, and that of the first weight.

    The features of images get the type of the first weight, which is in the tower, and are put among the embeddings. This fails
    if these have another one.
    """
    if getattr(getattr(model, "config", None), "model_type", "") not in CASTING:
        return []
    first = next((module for module in model.modules() if any(True for _ in module.parameters(recurse=False))), None)
    return [*model.get_input_embeddings().modules(), first]  # PEFT may have wrapped the embeddings


def module_of(model: Any, role: str) -> tuple[str, Any] | None:
    """The name and the module that is this part, inside of `model`; None where the family is not known."""
    prefixes = FAMILIES.get(str(model.config.model_type))
    body = model.base_model
    for prefix in prefixes[role] if prefixes else ():
        try:
            return prefix, body.get_submodule(prefix)
        except AttributeError:
            continue
    return None


def sizes(model: Any) -> str:
    """The parameters of each part, and whether it is frozen, in words."""
    from hfstrat.models.quantization import elements

    prefixes = FAMILIES.get(str(model.config.model_type))
    if prefixes is None:
        return ""
    counts = {role: [0, 0] for role in ROLES}
    for name, parameter in model.named_parameters():
        if role := role_of(name, prefixes):
            counts[role][0] += elements(parameter)
            counts[role][1] += elements(parameter) * parameter.requires_grad
    words = [f"{role} {total:,}" + ("" if trained else " (frozen)") for role, (total, trained) in counts.items()]
    return ", ".join(words)
