"""A recipe as YAML, with the origin of each value as a comment."""

from __future__ import annotations

import json
import re
from typing import Any

from hfstrat.recipe.migration.rules import Draft, Entry
from hfstrat.recipe.schema import Recipe

SHORT = {"model": "name_or_path", "strategy": "name", "objective": "name", "data": "train"}
COLUMN = 48  # of the comments
PLAIN = re.compile(r"[A-Za-z_./~][\w./:@+-]*")
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def text(draft: Draft, tool: str, source: str) -> str:
    """The draft as a recipe file, in the order of the schema."""
    lines = [f"# Converted from {source.rpartition('/')[2]} ({tool}) by `hfstrat migrate`"]
    for section in Recipe.model_fields:
        inner = {name.partition(".")[2]: entry for name, entry in draft.entries.items() if name.split(".")[0] == section}
        if not inner:
            continue
        if set(inner) == {""}:
            lines.append(_line(section, inner[""], 0, tool))
        elif set(inner) == {SHORT.get(section)}:
            lines.append(_line(section, _shortest(inner[SHORT[section]]), 0, tool))
        else:
            lines += [f"{section}:", *_mapping(inner, 1, tool)]
    return "\n".join(lines) + "\n"


def _mapping(inner: dict[str, Entry], depth: int, tool: str) -> list[str]:
    lines, done = [], set[str]()
    for name, entry in sorted(inner.items(), key=lambda item: item[0] not in SHORT.values()):
        first, _, rest = name.partition(".")
        if first in done:
            continue
        if not rest:
            lines.append(_line(first, _shortest(entry), depth, tool))
            continue
        done.add(first)
        below = {key.partition(".")[2]: one for key, one in inner.items() if key.startswith(f"{first}.")}
        lines += ["  " * depth + f"{first}:", *_mapping(below, depth + 1, tool)]
    return lines


def _shortest(entry: Entry) -> Entry:
    """One source with nothing but a path, as its path."""
    value = entry.value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and set(value[0]) == {"path"}:
        return Entry(value[0]["path"], entry.key)
    return entry


def _line(key: str, entry: Entry, depth: int, tool: str) -> str:
    if isinstance(entry.value, list) and any(isinstance(item, dict) for item in entry.value):
        items = ["  " * (depth + 1) + f"- {_value(item)}" for item in entry.value]
        return "\n".join([_line(key, Entry("", entry.key or key), depth, tool).replace(' ""', "   ", 1), *items])
    line = "  " * depth + f"{key}: {_value(entry.value)}"
    origin = entry.key or f"default of {tool}"
    return line if origin == key else f"{line:<{COLUMN}}  # {origin}"


def _value(value: Any) -> str:
    """A value in flow style: `lora`, `0.0002`, `[q_proj, v_proj]`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(str(key))}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS and not value.endswith(":"):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)
