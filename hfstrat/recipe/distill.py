"""The sections within `strategy: {name: distill}`.

Which layer of a student stands beside which of its teacher. No torch: recipes are checked with it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hfstrat.errors import UserError
from hfstrat.recipe.quantization import FromName, Quantization
from hfstrat.recipe.section import Section

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class TeacherModel(Section):
    """The model that is learnt from. It is frozen, and no part of what is saved."""

    name_or_path: str = Field(min_length=1, description="Hub id or local folder of the teacher")
    revision: str | None = Field(None, description="Branch, tag or commit of the teacher on the Hub")
    quantization: Annotated[Quantization | None, FromName] = Field(
        None, description="The teacher's linear layers in 8 or 4 bits: int8, nf4 or fp4, or a mapping with name"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the teacher")


class Shrink(Section):
    """The student is `model:` with layers left out, narrower ones, or both."""

    layers: int | list[int] | None = Field(
        None, description="How many layers stay (evenly spaced, the first and the last among them), or their numbers from 0"
    )
    intermediate_size: int | None = Field(
        None, ge=1, description="How many inner channels of each feed-forward layer stay: the loudest on training rows"
    )

    @field_validator("layers")
    @classmethod
    def _some(cls, value: int | list[int] | None) -> int | list[int] | None:
        if value is not None and (not value or (isinstance(value, int) and value < 1)):
            raise ValueError("at least one layer has to stay")
        return value

    @model_validator(mode="after")
    def _anything(self) -> Shrink:
        if self.layers is None and self.intermediate_size is None:
            raise ValueError("what shall be smaller? Give layers, such as layers: 6, or intermediate_size")
        return self


class LayerPairs(Section):
    """Hidden states of the student's layers brought near to those of the teacher's (arXiv 1909.10351)."""

    loss: Literal["mse", "cosine"] = Field("mse", description="Mean squared distance, or 1 - cosine")
    weight: float = Field(1.0, gt=0, description="Factor of it beside the rest of the loss")
    layers: list[list[int]] | None = Field(
        None, description="Pairs of a student's and a teacher's layer, from 0; default: each of the student's, evenly spread"
    )

    @field_validator("layers")
    @classmethod
    def _pairs(cls, value: list[list[int]] | None) -> list[list[int]] | None:
        if value is not None and (not value or any(len(pair) != 2 for pair in value)):
            raise ValueError("a list of pairs is expected, such as [[0, 1], [1, 3]]: student's layer, teacher's layer")
        return value


class Cache(Section):
    """How the teacher's answers are kept, so that it runs once however many epochs there are."""

    form: Literal["auto", "off", "hidden", "sampled", "top_k"] = Field(
        "auto",
        description="hidden: exact, 2 bytes a unit of width; sampled: draws; top_k: likeliest and the rest; auto: what fits",
    )
    tokens: int = Field(50, ge=1, description="How many tokens a position sampled draws or top_k keeps")
    budget: str = Field("10GB", description="Disk that the answers may take, such as 500MB")

    @field_validator("budget", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        size_of(value if isinstance(value, str) else "")
        return value

    @property
    def bytes(self) -> float:
        return size_of(self.budget)


def size_of(text: str) -> float:
    """'500MB' in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", text.strip().upper())
    if match is None:
        raise ValueError("a size such as 500MB or 10GB is expected")
    return float(match[1]) * UNITS[match[2]]


def even_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Each layer of the student with the last layer of the part of the teacher that it stands for."""
    return [(layer, round((layer + 1) * teacher / student) - 1) for layer in range(student)]


def check_pairs(pairs: list[tuple[int, int]], student: int, teacher: int) -> None:
    """Raises UserError for a layer that is not there."""
    for given in pairs:
        for layer, count, who in zip(given, (student, teacher), ("student", "teacher"), strict=True):
            if not 0 <= layer < count:
                raise UserError(
                    f"strategy.hidden.layers: {list(given)}: the {who} has no layer {layer}; its {count} layers are "
                    f"counted from 0 to {count - 1}"
                )
