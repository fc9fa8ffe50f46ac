"""Checks of a recipe's pretrained model, its quantization and its adapters, before torch is imported."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hfstrat.errors import UserError
from hfstrat.models.check import (
    check_adapter,
    check_has_weights,
    check_quantizable,
    check_weights,
    is_path,
    is_quantized_already,
    local_folder,
    near,
    no_model,
    read_vocabulary,
)
from hfstrat.models.load import read_config, read_json, read_shapes
from hfstrat.models.parameter_names import EMBEDDING, embeddings_of, weight_bytes
from hfstrat.recipe.schema import STRATEGIES, Model, Recipe
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.description import Description
from hfstrat.tasks import TASKS

Describe = Callable[[Shapes, bool], Description]


@contextmanager
def inner_keys(key: str) -> Iterator[None]:
    """Messages about the keys of a strategy within a strategy name them where they are, such as `strategy.student.r`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"\bstrategy\.(?!{key}\b)", f"strategy.{key}.", str(error))) from error.__cause__


def check_task(recipe: Recipe) -> None:
    """Refuse a strategy that does not support the task, and settings that the task does not have. Raises UserError."""
    strategy = recipe.strategy
    if why := strategy.refuses.get(recipe.task):
        raise UserError(f"strategy.name: {strategy.name} is not for task: {recipe.task}: {why}")
    if recipe.task not in strategy.tasks:
        can = [name for name, cls in STRATEGIES.items() if recipe.task in cls.tasks]
        raise UserError(f"strategy.name: {strategy.name} is not for task: {recipe.task}; expected one of {', '.join(can)}")
    TASKS[recipe.task].check(recipe)


def check_pretrained(recipe: Recipe, network: bool) -> None:
    """Refuse a model without usable weights, a tokenizer or an adapter that does not exist. Raises UserError."""
    _check_weights_of(recipe, network)
    TASKS[recipe.task].rows.check_processor(recipe.model, network)
    check_adapters(recipe)


def _check_weights_of(recipe: Recipe, network: bool) -> None:
    model = recipe.model
    path = Path(model.name_or_path).expanduser()
    if model.pooling in ("mean", "last", "first") and (model.quantization or model.trust_remote_code):
        key = "quantization" if model.quantization else "trust_remote_code"
        raise UserError(
            f"model.pooling: {model.pooling}: only classes of transformers can be used with model.{key}; remove one"
        )
    if model.gguf_file:
        _check_gguf(model.name_or_path, path)
        return
    key, expected = "model.name_or_path", "a model folder, a Hub id or a .gguf file"
    if local_folder(key, model.name_or_path, model.revision, "config.json", expected, network) is None:
        return
    config = read_config(model)
    if config is None or (path / "adapter_config.json").is_file():  # an adapter of a classifier has a config.json too
        raise no_model(path)
    TASKS[recipe.task].model.check_architecture(str(path), config)
    check_has_weights(key, str(path), path)
    check_weights(path)


def _check_gguf(name: str, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"model.name_or_path: {name}: no such GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.name_or_path: {name} is not a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("model.name_or_path: reading a GGUF file needs gguf: pip install 'hfstrat[gguf]'")


def pretrained_shapes(recipe: Recipe, labels: int, model: Model | None = None) -> tuple[Shapes, bool] | None:
    """The parameters that a model (`model:`) has for the task, from the headers of its weights; None where there are none."""
    config = read_config(recipe.model)
    if config is None or not (shapes := read_shapes(Path(recipe.model.name_or_path).expanduser())):
        return None
    task, section = TASKS[recipe.task], model or recipe.model
    pooled = task.model.pooling(section, config)[0] is not None
    return task.model.shapes(shapes, config, labels, pooled)


def has_tokens_beyond(recipe: Recipe, shapes: Shapes) -> bool:
    """Whether the tokenizer has token ids for which the model has no embedding, by their files."""
    words = read_vocabulary(Path(recipe.model.tokenizer or recipe.model.name_or_path).expanduser())
    rows = shapes[embeddings_of(shapes)][0] if any("embed" in name or EMBEDDING.search(name) for name in shapes) else 0
    return bool(words and rows and max(words.values()) >= rows)


def check_adapters(recipe: Recipe) -> None:
    """Refuse an adapter to continue from that does not exist, or that is for another task. Raises UserError."""
    for key, adapter in recipe.strategy.adapters.items():
        path, file = Path(adapter).expanduser(), Path(adapter).expanduser() / "adapter_config.json"
        if not path.exists() and is_path(adapter):
            raise UserError(f"{key}: {adapter}: no such folder{near(path)}")
        if file.is_file() and not read_json(file):
            raise UserError(f"{key}: {file} is not a JSON object; give the folder of a PEFT adapter")
        check_adapter(adapter, key)
        kind, task = read_json(file).get("task_type"), TASKS[recipe.task]
        if kind is not None and kind != task.model.peft_type and any(kind == each.model.peft_type for each in TASKS.values()):
            raise UserError(
                f"{key}: {adapter} is an adapter for {kind}; task: {task.name} continues from "
                f"{task.model.peft_type or 'one of its own kind'}"
            )


def quantized_bytes(recipe: Recipe, description: Description) -> int | None:
    """Bytes of the recipe's base model in memory, where it is quantized."""
    section = recipe.model.quantization
    return None if section is None else weight_bytes(description.shapes, section, description.unquantized)


def check_quantization(recipe: Recipe, describe: Describe) -> None:
    """Refuse a base or another model that cannot be quantized. Raises UserError."""
    section, source = recipe.model.quantization, recipe.model.name_or_path
    if section is not None:
        _check_combination(recipe, f"model.quantization: {section.name}")
    elif is_quantized_already(source):
        reason = recipe.strategy.unquantizable
        if not reason and describe(read_shapes(Path(source).expanduser()), False).unquantized:
            reason = (
                "trainable weights cannot be quantized; name the model that it was made from, with model.quantization, or use "
                "lora"
            )
        if reason:
            raise UserError(f"model.name_or_path: {source} is quantized: {reason}")
    check_quantizable("model.quantization", section, source)
    for key, model in recipe.strategy.models.items():
        check_quantizable(f"{key}.quantization", model.quantization, model.name_or_path)


def _check_combination(recipe: Recipe, key: str) -> None:
    if recipe.strategy.unquantizable:
        raise UserError(f"{key}: {recipe.strategy.unquantizable}")
    if recipe.model.gguf_file:
        raise UserError(
            f"{key}: a .gguf file is dequantized when it is read, and its weights would be rounded a second time; save it as a "
            "folder with transformers first (GgufConfig(dequantize=True), save_pretrained) and give that, or remove it"
        )
    if recipe.training.torch_compile:
        raise UserError("training.torch_compile: true: quantized layers are not compiled; remove it, or model.quantization")
