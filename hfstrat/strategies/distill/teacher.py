"""The teacher: checks before torch is imported, and loading it in each process with checks against its student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line
from hfstrat.models import check as models_check
from hfstrat.models.load import read_json, read_shapes
from hfstrat.models.parameter_names import config_size, weight_bytes
from hfstrat.models.pooling import Pooling
from hfstrat.recipe.distill import check_pairs
from hfstrat.recipe.schema import Model
from hfstrat.recipe.section import Quantization
from hfstrat.strategies.distill import shrink
from hfstrat.tasks import TASKS
from hfstrat.trainer import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.models.load import Base
    from hfstrat.recipe.distill import Distill, TeacherModel
    from hfstrat.recipe.schema import Recipe
    from hfstrat.recipe.section import Shapes
    from hfstrat.strategies.description import Description, Footprint
    from hfstrat.tasks.base import Task

NF4 = Quantization(name="nf4")
OTHER_VOCABULARY = (
    "their probabilities are for different tokens; use a teacher of the student's family, or fine-tune on answers of the "
    "teacher (seq_kd: true), or use TRL's GOLD, which aligns tokenizers"
)


def load_teacher(section: TeacherModel, task: Task, dtype: torch.dtype) -> PreTrainedModel:
    """The frozen model in `dtype`. Raises UserError: it is not usable for this task, or cannot be read."""
    import transformers

    from hfstrat.models import quantization
    from hfstrat.tasks.loading import class_of, without_restored

    loading, remote = None, section.trust_remote_code
    options = section.options
    source = Path(section.name_or_path).expanduser()
    try:
        name = str(source.absolute()) if source.is_dir() else section.name_or_path
        config, key = transformers.AutoConfig.from_pretrained(name, **options), "strategy.teacher.quantization"
        pooling, _ = task.model.pooling(_as_model(section), config.to_dict())
        auto = class_of(task, config, pooling)
        if section.quantization is not None:
            loading = quantization.loading_options(section.quantization, key, auto, config, remote, dtype)
        kwargs = {**options, "dtype": dtype, **(loading.options if loading else {})}
        model, info = auto.from_pretrained(name, **kwargs, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"strategy.teacher: {section.name_or_path} cannot be loaded: {first_line(error)}") from error
    if missing := without_restored(model, pooling, sorted(info["missing_keys"])):
        raise UserError(f"strategy.teacher: {section.name_or_path} has no weights for {missing[0]}: {task.model.if_missing}")
    if loading is not None:
        quantization.finalize(model, loading, trains_itself=False)
    quantization.prevent_repacking(model)
    loaded: PreTrainedModel = model
    return loaded.requires_grad_(False).eval()


def _as_model(section: TeacherModel) -> Model:
    """The section of a teacher as that of a model."""
    keys = ("name_or_path", "revision", "quantization", "trust_remote_code")
    return Model.model_validate({key: getattr(section, key) for key in keys})


def teacher_from_base(base: Base, will_change: bool) -> PreTrainedModel:
    """The student's base model as the teacher; a copy of it if its weights will change."""
    from hfstrat.models.fused_loss import unbind_head_loss
    from hfstrat.models.load import cast_weights

    unbind_head_loss(base.model)
    if not will_change:
        return base.model
    teacher = copy.deepcopy(base.model)
    cast_weights(teacher, base.compute_dtype)
    return teacher.requires_grad_(False).eval()


def place_teacher(
    strategy: Distill,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    describe: Callable[[Shapes, bool], Description],
    several_epochs: bool,
) -> PreTrainedModel | None:
    """The teacher of this process; None if it has generated answers only, and cannot be compared token by token.

    Args:
        describe: of the student's strategy.
        several_epochs: whether there is more than one epoch, for which the teacher's outputs are cached.

    Raises:
        UserError: it does not fit into memory, or has another vocabulary.
    """
    section = strategy.teacher
    if section is None:
        if base.new_head:
            raise UserError("strategy.teacher: missing; the head of this model is new and random, so name a trained model")
        changes = strategy.shrink is None and (strategy.student.name != "lora" or distributed.is_sharded())
        return teacher_from_base(base, will_change=changes)
    if strategy.seq_kd and first_difference(tokenizer.get_vocab(), tokenizer_of(section).get_vocab(), 10**9):
        return None
    _check_memory(strategy, section, base, describe, several_epochs)
    found = load_teacher(section, base.task, base.compute_dtype)
    if not base.task.model.reads_tokens:
        base.task.model.check_teacher(found, section, tokenizer)
        return found
    check_tokenizers(tokenizer, section, min(vocabulary_size(found), vocabulary_size(base.model)))
    known = found.get_input_embeddings().weight.shape[0]
    if known < len(tokenizer):
        raise UserError(
            f"strategy.teacher: {section.name_or_path} has {known:,} tokens and the student's tokenizer {len(tokenizer):,}; "
            "use another teacher, or remove model.add_tokens"
        )
    base.task.model.check_teacher(found, section, tokenizer)
    return found


def _check_memory(
    strategy: Distill, section: TeacherModel, base: Base, describe: Callable[[Shapes, bool], Description], several_epochs: bool
) -> None:
    from hfstrat.models.quantization import shape_of

    held = read_shapes(Path(section.name_or_path).expanduser())
    sizes = [weight_bytes(held, how, each=base.compute_dtype.itemsize) for how in (section.quantization, NF4)]
    cached = strategy.teacher_cache.form != "off" and (several_epochs or strategy.teacher_cache.form != "auto")
    stays = strategy.uses_teacher and (strategy.on_policy or strategy.hidden_states is not None or not cached)
    own = base.quantized["weight_bytes"] / base.quantized["parameters"] if base.quantized else 2.0
    student = describe({name: shape_of(p) for name, p in base.model.named_parameters()}, base.is_tied).footprint
    check_room(section.name_or_path, (sizes[0], sizes[1]), student, free_memory(), stays, not strategy.on_policy, own)


def vocabulary_size(model: PreTrainedModel) -> int:
    """The size of a model's vocabulary, padding included."""
    head = model.get_output_embeddings()
    return int((model.get_input_embeddings() if head is None else head).weight.shape[0])


def check_tokenizers(ours: PreTrainedTokenizerBase, section: TeacherModel, shared: int) -> None:
    """Refuse a teacher with other tokens among the first `shared` ids. Raises UserError."""
    if differs := first_difference(ours.get_vocab(), tokenizer_of(section).get_vocab(), shared):
        raise UserError(f"strategy.teacher: {section.name_or_path} has another vocabulary ({differs}): {OTHER_VOCABULARY}")


def check_sizes(ours: int, theirs: int) -> None:
    """Refuse on-policy training with a teacher of another vocabulary size, padding included. Raises UserError."""
    if ours != theirs:
        raise UserError(
            f"strategy.on_policy: the student has {ours:,} tokens and the teacher {theirs:,}, and TRL's DistillationTrainer "
            "needs equal sizes; remove it (then the shared tokens are compared), or set the teacher's vocab_size in "
            "strategy.student.config of a random student"
        )


def tokenizer_of(section: TeacherModel) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer. Raises UserError if it cannot be loaded."""
    from transformers import AutoTokenizer

    source = Path(section.name_or_path).expanduser()
    try:
        name = str(source) if source.is_dir() else section.name_or_path
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        raise UserError(
            f"strategy.teacher: {section.name_or_path}: its tokenizer cannot be loaded ({first_line(error)}), and it is "
            "needed to compare the vocabularies; put the tokenizer that it was trained with into its folder"
        ) from error
    return found


def first_difference(ours: dict[str, int], theirs: dict[str, int], shared: int) -> str | None:
    """The first id with two different tokens, as text; ids beyond `shared` or either vocabulary are ignored."""
    own, other = ({number: word for word, number in words.items()} for words in (ours, theirs))
    for number in range(min(shared, max(own, default=-1) + 1, max(other, default=-1) + 1)):
        if own.get(number) != other.get(number):
            return f"{number} is {own.get(number)!r} for the student and {other.get(number)!r} for the teacher"
    return None


def check_room(
    name: str,
    bytes_of: tuple[float, float],
    student: Footprint,
    free: int | None,
    stays: bool,
    keepable: bool = True,
    ours_each: float = 2.0,
) -> None:
    """Refuse a teacher that does not fit into memory next to the student.

    Args:
        bytes_of: its weights in the given form, 0 if unknown, and in 4 bits.
        free: bytes of memory, None if unknown.
        stays: whether it runs during training; else its memory is free before gradients and moments are allocated.
        keepable: whether its outputs could be cached instead.
        ours_each: bytes per weight of the student's base.

    Raises:
        UserError: what would fit.
    """
    (theirs, few), least = bytes_of, ours_each * student.total + 2 * student.trainable
    ours = least + (12 * student.trainable if stays else 0)  # trainable parameters: 32 bits, gradients, moments
    if not theirs or free is None or theirs + ours <= free:
        return
    cures: list[str] = []
    caching = (
        "cached outputs (teacher_cache.form: hidden, and no `hidden_states:`), since they free the teacher before training"
    )
    if stays and keepable and theirs + least <= free:
        cures.append(caching)
    if few < theirs and few + ours <= free:
        cures.append("a quantized one (teacher: {quantization: nf4})")
    elif stays and keepable and few < theirs and few + least <= free and not cures:
        cures.append(f"a quantized one (teacher: {{quantization: nf4}}) with {caching}")
    cures.append(f"one of at most {(free - ours) / 1e9:.1f} GB" if free > ours else "a smaller student and a smaller teacher")
    raise UserError(
        f"strategy.teacher: {name} takes {theirs / 1e9:.1f} GB and the student {ours / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free; possible: {', or '.join(cures)}"
    )


def free_memory() -> int | None:
    """Free memory in bytes: of the GPU if there is one, else of the machine."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def check_teacher(strategy: Distill, recipe: Recipe, network: bool) -> None:
    """Refuse a teacher that does not exist or has another vocabulary, and layers that do not exist.

    Raises UserError: one sentence that begins with the key.
    """
    if recipe.data.overflow == "split" and (strategy.seq_kd or strategy.on_policy):
        raise UserError("data.overflow: split: only the first piece of an example has a prompt to answer; set truncate or drop")
    model = recipe.model
    config = read_json(Path(model.name_or_path).expanduser() / "config.json") if model.name_or_path else {}
    count = config_size(config, "layers")
    if strategy.shrink and count:
        shrink.layers_to_keep(strategy.shrink.layers, count)
    if strategy.shrink and strategy.shrink.intermediate_size and config:
        shapes = read_shapes(Path(model.name_or_path).expanduser())
        shrink.check_width(strategy.shrink.intermediate_size, config, shapes)
    theirs = _check_named_teacher(strategy, recipe, config, network) if strategy.teacher else config
    if strategy.on_policy and not recipe.model.add_tokens:
        _check_config_sizes(strategy.student, config, theirs)
    if strategy.hidden_states and strategy.hidden_states.layers and count and (above := config_size(theirs, "layers")):
        below = len(shrink.layers_to_keep(strategy.shrink.layers, count)) if strategy.shrink else count
        check_pairs([(pair[0], pair[1]) for pair in strategy.hidden_states.layers], below, above)


def _check_kind(name: str, config: dict[str, Any], task: Task) -> None:
    """Refuse a teacher whose head is for another task, since a new head would be random."""
    try:
        task.model.check_architecture(name, config)
    except UserError as error:
        raise UserError(str(error).replace("model.name_or_path", "strategy.teacher", 1)) from None
    architectures = [str(one) for one in config.get("architectures") or []]
    if task.text.generates or (task.model.pooling(Model(name_or_path=name), config)[0] or Pooling("")).head:
        return
    ends = task.model.architecture
    if architectures and not architectures[0].endswith(ends):
        named = ends if isinstance(ends, str) else " or ...".join(ends)
        raise UserError(
            f"strategy.teacher: {name} is a {architectures[0]}; expected one that was trained for task: {task.name} "
            f"(...{named}); train it first, and give the final/ folder of that run"
        )


def _check_config_sizes(student: Any, own: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare the vocabulary sizes of both configs, if they are known before loading."""
    sizes = [config_size(config, "vocabulary") for config in (own if student.needs_weights else student.config, theirs)]
    if all(sizes):
        check_sizes(*sizes)


def _check_named_teacher(strategy: Distill, recipe: Recipe, own: dict[str, Any], network: bool) -> dict[str, Any]:
    """The teacher's config, empty if it is not local."""
    assert strategy.teacher is not None
    name, key = strategy.teacher.name_or_path, "strategy.teacher"
    expected = "a model folder or a Hub id"
    path = models_check.local_folder(key, name, strategy.teacher.revision, "config.json", expected, network)
    if path is None:
        return {}
    if (path / "adapter_config.json").is_file():
        raise UserError(f"strategy.teacher: {name} is an adapter; merge it with `hfstrat merge`, and give the result")
    if not (config := read_json(path / "config.json")):
        raise UserError(f"strategy.teacher: {name} contains no model (config.json)")
    models_check.check_has_weights(key, name, path)
    if not TASKS[recipe.task].model.reads_tokens:
        TASKS[recipe.task].rows.check_processor(_as_model(strategy.teacher), network)
        _check_kind(name, config, TASKS[recipe.task])
        return config
    if not models_check.has_tokenizer(path):
        raise UserError(
            f"strategy.teacher: {name} contains no tokenizer, such as tokenizer.json, which is needed to compare the "
            "vocabularies; put the one that it was trained with into its folder"
        )
    if not strategy.teacher.trust_remote_code:  # custom classes may have any name
        _check_kind(name, config, TASKS[recipe.task])
    if strategy.seq_kd:
        return config  # only text is exchanged
    ours = models_check.read_vocabulary(Path(recipe.model.tokenizer or recipe.model.name_or_path).expanduser())
    theirs = models_check.read_vocabulary(path)
    sizes = [size for each in (config, own) if (size := config_size(each, "vocabulary"))]
    if ours and theirs and sizes and (differs := first_difference(ours, theirs, min(sizes))):
        raise UserError(f"strategy.teacher: {name} has another vocabulary ({differs}): {OTHER_VOCABULARY}")
    return config
