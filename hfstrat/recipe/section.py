"""The base class of recipe sections, and the units of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: frozen, typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Default(NamedTuple):
    """A default of a `training:` key that depends on the strategy, and its source.

    A mapping (of `extra`) is merged with the given one, which takes precedence.
    """

    value: Any
    source: str


Shapes = dict[str, tuple[int, ...]]
"""Shapes by parameter name, with each tied weight once, as in safetensors headers."""


_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """The seconds of '90s', '10min' or '1.5h'. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)", text.strip())
    if not match or float(match.group(1)) <= 0:
        raise ValueError("expected a time such as 90s, 10min or 1.5h")
    return float(match.group(1)) * _UNITS[match.group(2)]


UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse(text: str | int) -> int:
    """The number that 10M, 1.5B, 300k or a plain number stands for. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(text).strip().lower())
    if not match or float(match.group(1)) <= 0:
        raise ValueError("expected a number of parameters such as 300k, 10M or 1.5B")
    return round(float(match.group(1)) * UNITS[match.group(2)])


def split_class(text: str) -> tuple[Path, str]:
    """The file and the class of `file.py:Class`. Raises ValueError for anything else."""
    file, sign, name = text.rpartition(":")
    if not sign or not file.endswith(".py") or not name.isidentifier():
        raise ValueError("model_class: expected a local file and a class in it, such as my_model.py:TinyModel")
    return Path(file).expanduser(), name
