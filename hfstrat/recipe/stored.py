"""Recipes of earlier runs, as reports and checkpoints hold them: old names of keys, and what may change on resuming.

A recipe that an earlier version wrote is read through `upgraded`, so that its run can be resumed, compared and pushed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from hfstrat.recipe.section import seconds

RENAMED: dict[str, dict[str, str]] = {  # a section or a strategy: its old names and those of today
    "lora": {"alpha": "lora_alpha", "dropout": "lora_dropout"},
    "partial": {"thaw": "gradual_unfreezing"},
    "scratch": {"architecture": "model_type"},
    "distill": {
        "loss": "divergence",
        "alpha": "teacher_weight",
        "level": "seq_kd",
        "hidden": "hidden_states",
        "cache": "teacher_cache",
    },
    "training": {"resume": "resume_from_checkpoint"},
    "evaluation": {"before": "eval_on_start"},
    "hub": {"push": "push_to_hub", "repo": "repo_id"},
    "quantization": {"double_quant": "use_double_quant"},
}
SWITCH = {"on": True, "off": False}
VALUES: dict[tuple[str, str], dict[Any, Any]] = {  # a section and today's name: its old values and those of today
    ("lora", "init_lora_weights"): {"default": True},
    ("partial", "precompute"): SWITCH,
    ("distill", "seq_kd"): {"sequence": True, "token": False},
    ("training", "packing"): SWITCH,
}
NESTED = ("strategy", "student", "then")  # keys whose sections are strategies


def new_name(section: str, key: str, value: Any) -> tuple[str, Any] | None:
    """Today's name and value of an old key or value; None where neither has changed."""
    name = RENAMED.get(section, {}).get(key, key)
    values = VALUES.get((section, name), {})
    new = values[value] if isinstance(value, str) and value in values else value
    return (name, new) if (name, new) != (key, value) else None


def section_of(key: str, section: dict[str, Any]) -> str:
    """The name that a section has in `RENAMED`: its key, or that of the strategy in it."""
    return str(section.get("name")) if key in NESTED else key


def upgraded(stored: dict[str, Any], section: str = "") -> dict[str, Any]:
    """A stored recipe with today's names and values."""
    found: dict[str, Any] = {}
    for key, value in stored.items():
        key, value = new_name(section, key, value) or (key, value)
        found[key] = upgraded(value, section_of(key, value)) if isinstance(value, dict) and key not in FREE else value
    return found


FREE = ("columns", "extra", "config", "chat_template_kwargs")  # mappings whose keys are the user's


OPTIONS = "data.chat_template_kwargs."  # an option that is false is not an absent one

LENGTH = ("training.num_train_epochs", "training.max_steps", "training.max_time")
EVALUATED_ON = ("evaluation.max_rows",)  # evaluation losses before and after a change are not comparable
_TRAINING = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "activation_checkpointing", "torch_compile"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "load_best_model_at_end", "early_stopping_patience"),
    *("resume_from_checkpoint", "report_to"),
)
_EXTRA = (  # of TrainingArguments: data loading and logging
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("logging_dir", "logging_first_step", "logging_strategy", "report_to", "run_name", "project", "trackio_space_id"),
    *("skip_memory_metrics", "include_num_input_tokens_seen", "torch_empty_cache_steps", "log_level", "log_level_replica"),
    *("save_safetensors", "save_on_each_node"),
)
MAY_CHANGE = {  # keys; those that end with a dot are sections
    *("evaluation.", "hub.", "output_dir", "strategy.baseline", "strategy.precompute", "data.bad_rows"),
    *LENGTH,
    *(f"training.{key}" for key in _TRAINING),
    *(f"training.extra.{key}" for key in _EXTRA),
}
ABSENT = {"objective.name": "sft"}  # what earlier versions did, which did not have these keys
SILENT = ("output_dir", "hub.", "training.resume_from_checkpoint")  # changes that are not reported


def compare(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The allowed and the refused changes between two recipes (as `model_dump` returns them), each as `key was x, is y`."""
    old, new, options = flat(before), flat(now), option_defaults(before) | option_defaults(now)
    old, new = ({**options, **each} if options else each for each in (old, new))
    allowed, refused, unchanged = [], [], defaults(now)
    for key in sorted(old.keys() | new.keys()):
        was, is_now = old.get(key, ABSENT.get(key)), new.get(key)
        is_empty = not is_now and not key.startswith(OPTIONS)
        is_new = key not in old and (is_empty or key in unchanged)  # the older version did not have this key
        if was == is_now or is_new:
            continue
        if not _is_in(key, MAY_CHANGE):
            refused.append(f"{key} was {was!r}, is {is_now!r}")
        elif not _is_in(key, SILENT):
            allowed.append(f"{key} was {was!r}, is {is_now!r}")
    return allowed, refused


def defaults(recipe: dict[str, Any]) -> set[str]:
    """The dotted keys of a recipe whose values are those that the schema gives by itself."""
    from hfstrat.recipe.schema import Recipe

    try:
        whole = Recipe.model_validate(recipe)
    except ValidationError:
        return set()
    return set(_defaults(whole, ""))


def option_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The defaults of keys that a stored recipe has only where they are given, by their dotted keys."""
    from hfstrat.recipe.schema import UNIONS, Recipe

    try:
        whole = Recipe.model_validate(recipe)
    except ValidationError:
        return {}
    return {f"{key}.{name}": value for key in UNIONS for name, value in getattr(whole, key).option_defaults.items()}


def _defaults(section: BaseModel, prefix: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _defaults(value, f"{prefix}{name}.")
        elif not field.is_required() and value == field.get_default(call_default_factory=True):
            yield f"{prefix}{name}"


def is_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a recipe trains for longer than another, which is otherwise the same run."""
    old, new = flat(before), flat(now)
    raised = [_amount(key, new.get(key)) - _amount(key, old.get(key)) for key in LENGTH]
    return max(raised) > 0 <= min(raised)


def evaluates_on_others(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the evaluation losses of two recipes are not comparable."""
    old, new = flat(before), flat(now)
    return any(old.get(key) != new.get(key) for key in EVALUATED_ON)


def _amount(key: str, value: Any) -> float:
    """A length as a number; an unset one is no limit."""
    if value is None:
        return 0.0 if key == "training.num_train_epochs" else float(10**9)
    if isinstance(value, str):
        return seconds(value)
    return float(value)


def _is_in(key: str, names: Any) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys, without empty sections."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def without_unset(tree: Any) -> Any:
    """The recipe without keys whose value is None, as a file would give it."""
    if isinstance(tree, dict):
        return {key: without_unset(value) for key, value in tree.items() if value is not None}
    return [without_unset(value) for value in tree] if isinstance(tree, list) else tree
