"""What can be known to be wrong with a teacher before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models import check as models_check
from hfstrat.models.load import read_json, read_shapes
from hfstrat.recipe.distill import check_pairs
from hfstrat.strategies.distill import shrink, teacher
from hfstrat.tasks import TASKS

if TYPE_CHECKING:
    from hfstrat.recipe.distill import Distill
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.base import Task

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WORDS = "vocab_size"


def check(strategy: Distill, recipe: Recipe, network: bool) -> None:
    """Refuse a teacher that is not there, that speaks of other tokens, and layers that are not there.

    Raises:
        UserError: one sentence that begins with the key.
    """
    if recipe.data.overflow == "split" and (strategy.seq_kd or strategy.on_policy):
        raise UserError(
            "data.overflow: split: only the first piece of a row has a prompt that could be answered; take truncate or drop"
        )
    model = recipe.model
    config = read_json(Path(model.name_or_path).expanduser() / "config.json") if model.name_or_path else {}
    count = _layers(config)
    if strategy.shrink and count:
        shrink.kept_layers(strategy.shrink.layers, count)
    if strategy.shrink and strategy.shrink.intermediate_size and config:
        shapes = read_shapes(Path(model.name_or_path).expanduser())
        shrink.check_width(strategy.shrink.intermediate_size, config, shapes)
    theirs = _check_teacher(strategy, recipe, config, network) if strategy.teacher else config
    if strategy.on_policy and not recipe.model.add_tokens:
        _check_sizes(strategy.student, config, theirs)
    if strategy.hidden_states and strategy.hidden_states.layers and count and (above := _layers(theirs)):
        below = len(shrink.kept_layers(strategy.shrink.layers, count)) if strategy.shrink else count
        check_pairs([(pair[0], pair[1]) for pair in strategy.hidden_states.layers], below, above)


def _check_kind(name: str, config: dict[str, Any], task: Task) -> None:
    """Refuse a teacher whose head is of another task: a new one would have nothing to say."""
    try:
        task.model.check_architecture(name, config)
    except UserError as error:
        raise UserError(str(error).replace("model.name_or_path", "strategy.teacher", 1)) from None
    architectures = [str(one) for one in config.get("architectures") or []]
    if not task.text.generates and architectures and not architectures[0].endswith(task.model.architecture):
        raise UserError(
            f"strategy.teacher: {name} is a {architectures[0]}; expected one that was trained for task: {task.name} "
            f"(...{task.model.architecture}): train it first, and name the final/ of that run"
        )


def _check_sizes(student: Any, own: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Where both configs say how many tokens there are; what else there is to know is known when they are loaded."""
    ours = (own if student.needs_weights else student.config).get(WORDS)
    if isinstance(ours, int) and isinstance(theirs.get(WORDS), int):
        teacher.check_sizes(ours, theirs[WORDS])


def _layers(config: dict[str, Any]) -> int:
    return next((int(config[name]) for name in LAYERS if isinstance(config.get(name), int)), 0)


def _check_teacher(strategy: Distill, recipe: Recipe, own: dict[str, Any], network: bool) -> dict[str, Any]:
    """The teacher's config, empty where it is not at hand."""
    assert strategy.teacher is not None
    name, path = strategy.teacher.name_or_path, Path(strategy.teacher.name_or_path).expanduser()
    if path.is_file():
        raise UserError(f"strategy.teacher: {name} is a file; expected a model folder or a Hub id")
    if not path.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise UserError(f"strategy.teacher: {name}: no such folder{models_check.near(path)}")
        revision = strategy.teacher.revision
        models_check.check_hub("strategy.teacher", name, revision, "config.json", "model", network)
        return {}
    if (path / "adapter_config.json").is_file():
        raise UserError(f"strategy.teacher: {name} is an adapter; `hfstrat merge` makes a model of it, give that")
    if not (config := read_json(path / "config.json")):
        raise UserError(f"strategy.teacher: {name} holds no model (config.json)")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"strategy.teacher: {name} holds no weights (*.safetensors); the download may be incomplete")
    if not models_check.has_tokenizer(path):
        raise UserError(
            f"strategy.teacher: {name} holds no tokenizer, such as tokenizer.json, and it has to be known which tokens it "
            "means; put the one that it was trained with into its folder"
        )
    if not strategy.teacher.trust_remote_code:  # classes of one's own have any names
        _check_kind(name, config, TASKS[recipe.task])
    if strategy.seq_kd:
        return config  # texts are handed over
    ours = teacher.words_in(Path(recipe.model.tokenizer or recipe.model.name_or_path).expanduser())
    theirs = teacher.words_in(path)
    sizes = [size for size in (config.get(WORDS), own.get(WORDS)) if isinstance(size, int)]
    if ours and theirs and sizes and (differs := teacher.different_words(ours, theirs, min(sizes))):
        raise UserError(f"strategy.teacher: {name} has another vocabulary ({differs}): {teacher.OTHER_WORDS}")
    return config
