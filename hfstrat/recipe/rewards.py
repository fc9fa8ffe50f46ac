"""The rewards of `objective: grpo`: which functions score an answer, and their arguments. Configuration only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hfstrat.recipe.section import Section

KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # the keys that a reward needs, and those that it also takes
    "exact_match": ((), ("pattern", "ignore_case")),
    "regex": (("pattern",), ("ignore_case",)),
    "json_valid": ((), ()),
    "json_schema": (("json_schema",), ()),
    "length": ((), ("min_length", "max_length", "unit")),
    "numeric": ((), ("tolerance",)),
}
WITH_REFERENCE = ("exact_match", "numeric")  # they compare an answer with that of the row


class Reward(Section):
    """A function from an answer to a number.

    Either one of those in KEYS, whose values are between 0 and 1, or `file.py:function`, which is called as TRL calls a reward
    function: `function(prompts, completions, completion_ids, **columns)` returns a number, or None, for each completion.
    """

    name: str = Field(
        min_length=1,
        description="exact_match (the answer is that of the row), numeric (its last number is), regex, json_valid (an object "
        "or a list), json_schema, length; or file.py:function",
    )
    weight: float = Field(1.0, description="Factor of the reward in the sum of all")
    pattern: str | None = Field(
        None,
        description="regex: what is searched for (Python's re); exact_match: compare only what its first group, or all of it, "
        "last matches",
    )
    ignore_case: bool = Field(False, description="exact_match and regex: ignore upper and lower case")
    json_schema: dict[str, Any] | None = Field(None, description="json_schema: the schema (draft 2020-12)")
    min_length: int | None = Field(None, ge=1, description="length: below it the reward falls to 0 in proportion")
    max_length: int | None = Field(None, ge=1, description="length: above it the reward falls to 0 at twice this length")
    unit: Literal["tokens", "words", "characters"] = Field("tokens", description="length: what is counted")
    tolerance: float = Field(1e-6, ge=0, description="numeric: the largest relative difference between equal numbers")
    kwargs: dict[str, Any] = Field({}, description="file.py:function: further keyword arguments of the function")

    @field_validator("weight")
    @classmethod
    def _weighs(cls, value: float) -> float:
        if value == 0:
            raise ValueError("expected a number other than 0; remove the reward instead")
        return value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _fits_the_function(self) -> Reward:
        if self.function is None and self.name not in KEYS:
            raise ValueError(f"name: there is no reward '{self.name}'; expected {', '.join(KEYS)}, or file.py:function")
        needed, taken = KEYS.get(self.name, ((), ("kwargs",)))
        fields = type(self).model_fields
        given = [key for key in fields if key not in ("name", "weight") and getattr(self, key) != fields[key].default]
        if missing := next((key for key in needed if key not in given), None):
            raise ValueError(f"{missing}: the reward {self.name} needs it")
        if unread := next((key for key in given if key not in (*needed, *taken)), None):
            raise ValueError(f"{unread}: the reward {self.name} does not read it; remove it")
        self._check_lengths()
        return self

    def _check_lengths(self) -> None:
        if self.name != "length":
            return
        if self.min_length is None and self.max_length is None:
            raise ValueError("min_length: the reward length needs min_length, max_length, or both")
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ValueError(f"min_length: {self.min_length} is more than max_length: {self.max_length}")

    @property
    def function(self) -> tuple[Path, str] | None:
        """The file and the name of a function of one's own; None for the others."""
        file, sign, name = self.name.rpartition(":")
        return (Path(file).expanduser(), name) if sign and file.endswith(".py") and name.isidentifier() else None

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.function[1] if self.function else self.name


def labels(rewards: list[Reward]) -> list[str]:
    """The names of all rewards in metrics; a repeated one is numbered."""
    found = list[str]()
    for reward in rewards:
        count = sum(each.label == reward.label for each in rewards[: len(found)])
        found.append(f"{reward.label}_{count + 1}" if count else reward.label)
    return found
