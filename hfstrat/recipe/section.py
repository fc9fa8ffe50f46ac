"""The base class of recipe sections, and the units that their values are written in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: frozen, typed, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Default(NamedTuple):
    """A default for a `training:` key that depends on the strategy, and where it comes from.

    A mapping (of `extra`) is merged with what is given, which wins.
    """

    value: Any
    source: str


Shapes = dict[str, tuple[int, ...]]
"""Parameter name to shape, each tied weight once, as in the safetensors headers."""


_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """'90s', '10min' or '1.5h' in seconds. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)", text.strip())
    if not match or float(match.group(1)) <= 0:
        raise ValueError("a time such as 90s, 10min or 1.5h is expected")
    return float(match.group(1)) * _UNITS[match.group(2)]


UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse(text: str | int) -> int:
    """10M, 1.5B, 300k or a plain number. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(text).strip().lower())
    if not match or float(match.group(1)) <= 0:
        raise ValueError("a number of parameters such as 300k, 10M or 1.5B is expected")
    return round(float(match.group(1)) * UNITS[match.group(2)])


def split_class(text: str) -> tuple[Path, str]:
    """`file.py:Class`. Raises ValueError for anything else."""
    file, sign, name = text.rpartition(":")
    if not sign or not file.endswith(".py") or not name.isidentifier():
        raise ValueError("model_class: expected a local file and a class in it, such as my_model.py:TinyModel")
    return Path(file).expanduser(), name
