"""Checks of `model.quantization` against the strategy, before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.quantized_size import _check_base, is_quantized_already, weight_bytes
from hfstrat.recipe.section import Shapes

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.base import Strategy


def bytes_of(strategy: Strategy[Any], recipe: Recipe, shapes: Shapes, tied: bool) -> int | None:
    """Bytes of the recipe's base in memory, where it is quantized."""
    section = recipe.model.quantization
    return None if section is None else weight_bytes(shapes, section, strategy.learns_whole(list(shapes), tied))


def check(strategy: Strategy[Any], recipe: Recipe) -> None:
    """Refuse what cannot be quantized, before torch. Raises UserError."""
    if recipe.model.quantization is not None:
        _check_combination(recipe, f"model.quantization: {recipe.model.quantization.name}")
        strategy.check_quantized()
    elif is_quantized_already(recipe.model.name_or_path):
        _check_made(strategy, recipe)
    _check_base("model.quantization", recipe.model.quantization, recipe.model.name_or_path)
    for name, model in recipe.strategy.models.items():
        _check_base(f"{name}.quantization", model.quantization, model.name_or_path)


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


def _check_made(strategy: Strategy[Any], recipe: Recipe) -> None:
    """A base that somebody saved quantized: nothing of it can learn."""
    from hfstrat.models.load import read_shapes

    source = recipe.model.name_or_path
    reason = recipe.strategy.unquantizable
    if not reason and strategy.learns_whole(list(read_shapes(Path(source).expanduser())), False):
        reason = "what learns has to be whole; name the model that it was made from, with model.quantization, or take lora"
    if reason:
        raise UserError(f"model.name_or_path: {source} is quantized: {reason}")
