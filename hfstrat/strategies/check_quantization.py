"""Checks of `model.quantization` against the strategy, before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.models.check import check_quantizable, is_quantized_already
from hfstrat.models.parameter_names import weight_bytes
from hfstrat.recipe.section import Shapes

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe


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
    check_quantizable("model.quantization", recipe.model.quantization, recipe.model.name_or_path)
    if (teacher := getattr(recipe.strategy, "teacher", None)) is not None:
        check_quantizable("strategy.teacher.quantization", teacher.quantization, teacher.name_or_path)


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
    from hfstrat.models.load import read_shapes

    source, strategy = recipe.model.name_or_path, recipe.strategy
    reason = strategy.unquantizable
    if not reason and strategy.learns_whole(list(read_shapes(Path(source).expanduser())), False):
        reason = "what learns has to be whole; name the model that it was made from, with model.quantization, or take lora"
    if reason:
        raise UserError(f"model.name_or_path: {source} is quantized: {reason}")
