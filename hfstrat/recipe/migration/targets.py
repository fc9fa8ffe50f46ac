"""The modules that get an adapter, from a list of names or a regular expression."""

from __future__ import annotations

import itertools
import re
from typing import Any

from hfstrat.recipe.migration.rules import Gone, Look, Off, as_list


def target_modules(value: Any) -> Any:
    """The modules that get an adapter: a list of names; all linear layers are the default."""
    if value in ("all-linear", ["all-linear"]):
        return Off("all linear layers are the default")
    if isinstance(value, str) and any(sign in value for sign in "*|()[]^$\\"):
        found = _last_names(value)
        where = "a regular expression, of which the modules' own names were taken: compare the layers in `hfstrat check`"
        return Look(found, where) if found else Gone("a regular expression; strategy.target_modules is a list of module names")
    return as_list(value)


def _last_names(pattern: str) -> list[str]:
    """The names at the end of a regular expression, such as q_proj and v_proj of `layers.\\d+.self_attn.(q|v)_proj`."""
    last = re.search(r"(?:^|[.*)])\\?\.?((?:\w|\((?:\?:)?[\w|]+\))+)\$?$", pattern)
    if last is None or _alternatives(pattern) > 1:
        return []
    parts = [each.removeprefix("(").removeprefix("?:").removesuffix(")") for each in re.findall(r"\([^)]*\)|\w+", last[1])]
    return ["".join(names) for names in itertools.product(*(part.split("|") for part in parts))]


def _alternatives(pattern: str) -> int:
    """The number of alternatives of a regular expression outside of parentheses."""
    depth, found = 0, 1
    for sign in pattern:
        depth += (sign == "(") - (sign == ")")
        found += sign == "|" and depth == 0
    return found
