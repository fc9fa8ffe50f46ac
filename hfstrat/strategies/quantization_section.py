"""`model.quantization` and a teacher's: frozen weights in 8 or 4 bits. What can be said of it without torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.class_heads import CLASS_HEAD
from hfstrat.depth import EMBEDDING, HEAD
from hfstrat.errors import UserError
from hfstrat.strategies.base import Section, Shapes

if TYPE_CHECKING:
    from hfstrat.config import Recipe

Form = Literal["int8", "nf4", "fp4"]
BLOCK, NESTED = 64, 256  # weights that share a scale, and scales that share one under double_quant
POSITIONS = re.compile(r"\.(?:wpe|\w*embeddings?)\.|(?:^|\.)embed_positions\.|(?:^|\.)shared\.")


class Quantization(Section):
    """Linear layers of the frozen model in 8 or 4 bits, by bitsandbytes. What learns is never quantized."""

    name: Form = Field(description="int8 (arXiv 2208.07339); nf4, for weights that are about normal, or fp4 (arXiv 2305.14314)")
    double_quant: bool = Field(True, description="Of nf4 and fp4: quantize the scales too, 0.37 bits a weight less")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of nf4 and fp4: what weights are multiplied in; auto: model.dtype"
    )
    skip_modules: list[str] = Field([], description="Modules that stay as they are, beside heads and what learns")

    @model_validator(mode="after")
    def _four_bits_only(self) -> Quantization:
        for key in ("double_quant", "compute_dtype"):
            if self.name == "int8" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is for nf4 and fp4; int8 has one scale a row and computes as model.dtype says; remove it"
                )
        return self

    @property
    def bits(self) -> float:
        """Bits a quantized weight takes with its share of the scales (int8: one more float32 a row, not counted here)."""
        if self.name == "int8":
            return 8.0
        return 4 + (8 + 32 / NESTED) / BLOCK if self.double_quant else 4 + 32 / BLOCK

    def as_bitsandbytes(self, compute: str, skipped: list[str]) -> dict[str, Any]:
        """The keywords of a `BitsAndBytesConfig`, as JSON can hold them."""
        if self.name == "int8":
            return {"load_in_8bit": True, "llm_int8_skip_modules": skipped}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": compute if self.compute_dtype == "auto" else self.compute_dtype,
            "llm_int8_skip_modules": skipped,
        }


FromName = BeforeValidator(
    lambda value: {"name": value} if isinstance(value, str) else value, json_schema_input_type=Quantization | Form | None
)


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether a module, or one around it, has one of these names: whole, or the end of a whole one."""
    around = module.split(".")
    paths = [".".join(around[: depth + 1]) for depth in range(len(around))]
    return any(path == name or path.endswith(f".{name}") for path in paths for name in names)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer that is no head, told from its name."""
    other = (HEAD, CLASS_HEAD, EMBEDDING, POSITIONS)
    return name.endswith(".weight") and len(shape) == 2 and not any(pattern.search(name) for pattern in other)


def weight_bytes(shapes: Shapes, section: Quantization | None, learning: Iterable[str] = (), each: float = 2) -> int:
    """Bytes of a frozen model's weights in memory.

    Args:
        shapes: its parameters.
        learning: names of those that learn, and so are not quantized.
        each: bytes of a weight that is not quantized.
    """
    learning, total = set(learning), 0.0
    for name, shape in shapes.items():
        quantized = section is not None and is_linear(name, shape) and name not in learning
        if section is None or not quantized or is_named(name.removesuffix(".weight"), section.skip_modules):
            total += prod(shape) * each
        else:
            total += prod(shape) * section.bits / 8 + (4 * shape[0] if section.name == "int8" else 0)
    return int(total)


def bytes_of(recipe: Recipe, shapes: Shapes, tied: bool) -> int | None:
    """Bytes of the recipe's base in memory, where it is quantized."""
    section = recipe.model.quantization
    return None if section is None else weight_bytes(shapes, section, recipe.strategy.learns_whole(list(shapes), tied))


def check(recipe: Recipe) -> None:
    """Refuse what cannot be quantized, before torch. Raises UserError."""
    if recipe.model.quantization is not None:
        _check_combination(recipe, f"model.quantization: {recipe.model.quantization.name}")
    elif is_quantized_already(recipe.model.name_or_path):
        _check_made(recipe)
    _check_base("model.quantization", recipe.model.quantization, recipe.model.name_or_path)
    if (teacher := getattr(recipe.strategy, "teacher", None)) is not None:
        _check_base("strategy.teacher.quantization", teacher.quantization, teacher.name_or_path)


def _check_combination(recipe: Recipe, key: str) -> None:
    if recipe.strategy.unquantizable:
        raise UserError(f"{key}: {recipe.strategy.unquantizable}")
    if recipe.model.gguf_file:
        raise UserError(
            f"{key}: a .gguf file is dequantized as it is read, and its weights would be rounded a second time; save it as a "
            "folder with transformers first (GgufConfig(dequantize=True), save_pretrained) and name that, or remove it"
        )
    if recipe.training.torch_compile:
        raise UserError("training.torch_compile: true: quantized layers are not compiled; remove it, or model.quantization")
    student = getattr(recipe.strategy, "student", recipe.strategy)
    start = getattr(student, "init_lora_weights", "")
    if start.startswith(("pissa", "olora")):
        raise UserError(
            f"strategy.init_lora_weights: {start} changes the base's weights, and quantized ones stay as they are; take "
            "default, gaussian or orthogonal, or remove model.quantization"
        )
    if getattr(recipe.strategy, "shrink", None):
        raise UserError(
            "strategy.shrink: layers are left out of the model after it is loaded, so nobody knows then which will learn; to "
            "quantize the teacher, name it under strategy.teacher with quantization, and remove model.quantization"
        )


def _check_made(recipe: Recipe) -> None:
    """A base that somebody saved quantized: nothing of it can learn."""
    from hfstrat.model import read_shapes

    source, strategy = recipe.model.name_or_path, recipe.strategy
    reason = strategy.unquantizable
    if not reason and strategy.learns_whole(list(read_shapes(Path(source).expanduser())), False):
        reason = "what learns has to be whole; name the model that it was made from, with model.quantization, or take lora"
    if reason:
        raise UserError(f"model.name_or_path: {source} is quantized: {reason}")


def _check_base(key: str, section: Quantization | None, source: str) -> None:
    if section is None:
        return
    if is_quantized_already(source):
        raise UserError(
            f"{key}: {section.name}: {source} is quantized already (quantization_config in its config.json); remove this, or "
            "name the model that it was made from"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}: {section.name} needs bitsandbytes: pip install 'hfstrat[quantization]'")


def is_quantized_already(source: str) -> bool:
    """Whether a local model's config says so."""
    from hfstrat.model import read_json

    return bool(source) and bool(read_json(Path(source).expanduser() / "config.json").get("quantization_config"))
