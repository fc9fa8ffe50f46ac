"""Checks of a recipe's model against its strategy, before torch is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models.check import _check_weights, _no_model, check_adapter, check_hub, check_tokenizer, near
from hfstrat.models.load import read_config, read_json, read_shapes
from hfstrat.recipe.load import about
from hfstrat.recipe.schema import STRATEGIES, Recipe
from hfstrat.strategies import check_quantization
from hfstrat.strategies.base import Footprint, Strategy
from hfstrat.tasks import TASKS


def check_model(strategy: Strategy[Any], recipe: Recipe, network: bool) -> Footprint | None:
    """Refuse a model, a tokenizer or an adapter that cannot be; the footprint where the weights' headers are at hand.

    Raises:
        UserError: one sentence that begins with the key.
    """
    footprint = strategy.check_model(recipe, network)
    _check_adapter(recipe)
    return footprint


def check_pretrained(strategy: Strategy[Any], recipe: Recipe, network: bool) -> Footprint | None:
    """The same for pretrained weights with a tokenizer."""
    footprint = _check_base(strategy, recipe, network)
    check_tokenizer(recipe.model, network)
    return footprint


def _check_base(strategy: Strategy[Any], recipe: Recipe, network: bool) -> Footprint | None:
    model = recipe.model
    path = Path(model.name_or_path).expanduser()
    if model.gguf_file:
        if not path.is_file():
            raise UserError(f"model.name_or_path: {model.name_or_path}: no such GGUF file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"model.name_or_path: {model.name_or_path}: this is no GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise UserError("model.name_or_path: reading a GGUF file needs gguf: pip install 'hfstrat[gguf]'")
        return None
    if path.is_file():
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is a file; expected a model folder, a Hub id or a .gguf file"
        )
    if path.is_dir():
        return _check_folder(strategy, recipe, path)
    if model.name_or_path.startswith(("/", ".", "~")) or model.name_or_path.count("/") > 1:
        raise UserError(f"model.name_or_path: {model.name_or_path}: no such folder{near(path)}")
    check_hub("model.name_or_path", model.name_or_path, model.revision, "config.json", "model", network)
    return None


def _check_folder(strategy: Strategy[Any], recipe: Recipe, path: Path) -> Footprint | None:
    model = recipe.model
    config = read_config(model)
    if config is None or (path / "adapter_config.json").is_file():  # an adapter of a classifier has a config.json too
        raise _no_model(path)
    task = TASKS[recipe.task]
    task.check_architecture(str(path), config)
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"model.name_or_path: {path} holds no weights (*.safetensors); the download may be incomplete")
    _check_weights(path)
    return footprint_of(strategy, recipe, labels=2)  # how many there are is known when the data are read


def footprint_of(strategy: Strategy[Any], recipe: Recipe, labels: int) -> Footprint | None:
    """How many parameters learn and how many there are, from the weights' headers; None where they do not tell.

    Args:
        labels: how many the data have, which makes the head of a classifier.
    """
    made = _shapes_of(recipe, labels)
    if made is None or recipe.model.add_tokens:
        return None
    with about("strategy"):
        return strategy.footprint(*made)


def _shapes_of(recipe: Recipe, labels: int) -> tuple[dict[str, tuple[int, ...]], bool] | None:
    config = read_config(recipe.model)
    if config is None or not (shapes := read_shapes(Path(recipe.model.name_or_path).expanduser())):
        return None
    return TASKS[recipe.task].shapes(shapes, config, labels)


def quantized_bytes(strategy: Strategy[Any], recipe: Recipe, labels: int) -> int | None:
    """Bytes that the recipe's quantized base takes, where it is one and the weights' headers tell."""
    if recipe.model.quantization is None or (made := _shapes_of(recipe, labels)) is None:
        return None
    return check_quantization.bytes_of(strategy, recipe, *made)


def on_disk(strategy: Strategy[Any], recipe: Recipe, footprint: Footprint) -> Footprint:
    """The footprint with as many parameters in all as would take, in 16 bits, the room that a quantized base takes."""
    held = quantized_bytes(strategy, recipe, labels=2)
    return footprint if held is None else footprint._replace(total=held // 2)


def check_task(recipe: Recipe) -> None:
    """Refuse a strategy that cannot do the task, and settings that the task cannot have."""
    strategy = recipe.strategy
    if recipe.task not in strategy.tasks:
        can = [name for name, cls in STRATEGIES.items() if recipe.task in cls.tasks]
        raise UserError(f"strategy.name: {strategy.name} is not for task: {recipe.task}; expected one of {', '.join(can)}")
    TASKS[recipe.task].check(recipe)


def _check_adapter(recipe: Recipe) -> None:
    """Refuse an adapter to continue from that is not there."""
    for key, adapter in recipe.strategy.adapters.items():
        _check_adapter_folder(key, adapter, recipe)


def _check_adapter_folder(key: str, adapter: str, recipe: Recipe) -> None:
    path = Path(adapter).expanduser()
    if not path.exists() and (adapter.startswith(("/", ".", "~")) or adapter.count("/") > 1):
        raise UserError(f"{key}: {adapter}: no such folder{near(path)}")
    if (path / "adapter_config.json").is_file() and not read_json(path / "adapter_config.json"):
        raise UserError(f"{key}: {path / 'adapter_config.json'} is no JSON object; give the folder of a PEFT adapter")
    check_adapter(adapter, key)
    kind, task = read_json(path / "adapter_config.json").get("task_type"), TASKS[recipe.task]
    if kind != task.peft_type and any(kind == other.peft_type for other in TASKS.values()):
        raise UserError(f"{key}: {adapter} is an adapter for {kind}; task: {task.name} goes on from {task.peft_type}")
