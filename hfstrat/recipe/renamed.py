"""The keys of a recipe that had another name before: answers to old recipes, and stored recipes in today's names.

Reports and checkpoints hold the recipe of their run. One that was written by an earlier version is read through `upgraded`,
so that such a run can be resumed, compared and pushed.
"""

from __future__ import annotations

from typing import Any

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


FREE = ("columns", "extra", "config")  # mappings whose keys are the user's
