"""What several recipe sections share: their base class, the units of their values, and quantization."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A part of the recipe: frozen, typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
    variants: ClassVar[str] = ""  # the key whose value decides which further keys there are, if there is one

    @classmethod
    def fields_of(cls, variant: str | None) -> dict[str, FieldInfo]:
        """The keys of this section, where the key `variants` has this value."""
        return dict(cls.model_fields)

    @property
    def option_defaults(self) -> dict[str, Any]:
        """The defaults of further keys, which `model_dump` has only where they are given."""
        return {}


def from_text(key: str, either: Any) -> BeforeValidator:
    """A validator that reads text as the section with this key; `either` is the type in the JSON schema."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=either)


def _positive(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError("expected a whole number, at least 1, or auto")
    return value


PositiveOrAuto = Annotated[int | Literal["auto"], AfterValidator(_positive)]


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
    """The number given as 10M, 1.5B, 300k or a plain number. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(text).strip().lower())
    if not match or float(match.group(1)) <= 0:
        raise ValueError("expected a number of parameters such as 300k, 10M or 1.5B")
    return round(float(match.group(1)) * UNITS[match.group(2)])


def switch(value: Any) -> Any:
    """`on` or `off`, which YAML reads as true or false where they are bare."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def split_class(text: str) -> tuple[Path, str]:
    """The file and the class of `file.py:Class`. Raises ValueError for anything else."""
    file, sign, name = text.rpartition(":")
    if not sign or not file.endswith(".py") or not name.isidentifier():
        raise ValueError("model_class: expected a local file and a class in it, such as my_model.py:TinyModel")
    return Path(file).expanduser(), name


Form = Literal["int8", "nf4", "fp4"]


BLOCK, NESTED = 64, 256  # weights per scale; scales per second-level scale with use_double_quant


class Quantization(Section):
    """Linear layers of the frozen model in 8 or 4 bits, by bitsandbytes. Trainable parameters are never quantized."""

    name: Form = Field(description="int8 (arXiv 2208.07339); nf4, for normally distributed weights, or fp4 (arXiv 2305.14314)")
    use_double_quant: bool = Field(True, description="nf4 and fp4: quantize the scales too, which saves 0.37 bits per weight")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="nf4 and fp4: dtype of the matrix products; auto: model.dtype"
    )
    skip_modules: list[str] = Field(
        [], description="Modules that are not quantized, in addition to heads and trainable modules"
    )

    @model_validator(mode="after")
    def _four_bits_only(self) -> Quantization:
        for key in ("use_double_quant", "compute_dtype"):
            if self.name == "int8" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: for nf4 and fp4 only (int8 has one scale per row and computes in model.dtype); remove it"
                )
        return self

    @property
    def bits(self) -> float:
        """Bits per quantized weight, with its share of the scales (int8: one more float32 per row, not counted here)."""
        if self.name == "int8":
            return 8.0
        return 4 + (8 + 32 / NESTED) / BLOCK if self.use_double_quant else 4 + 32 / BLOCK

    def as_bitsandbytes(self, compute: str, skipped: list[str]) -> dict[str, Any]:
        """The arguments of a `BitsAndBytesConfig` as JSON values."""
        if self.name == "int8":
            return {"load_in_8bit": True, "llm_int8_skip_modules": skipped}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.use_double_quant,
            "bnb_4bit_compute_dtype": compute if self.compute_dtype == "auto" else self.compute_dtype,
            "llm_int8_skip_modules": skipped,
        }


FromName = from_text("name", Quantization | Form | None)
