"""The teacher: loaded once in each process, and checked against the student it is to teach."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line
from hfstrat.trainer import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.distill import Distill, TeacherModel
    from hfstrat.recipe.section import Shapes
    from hfstrat.strategies.description import Description, Footprint
    from hfstrat.tasks.base import Task

OTHER_WORDS = (
    "their probabilities speak of different tokens; take a teacher of the student's family, or let it write the answers "
    "to fine-tune on (level: sequence), or use TRL's GOLD, which aligns tokenizers"
)


def load_teacher(section: TeacherModel, task: Task, dtype: torch.dtype) -> PreTrainedModel:
    """The frozen model in `dtype`.

    Raises:
        UserError: it is nothing for this task, or cannot be read.
    """
    import transformers

    from hfstrat.models import quantization

    source = Path(section.name_or_path).expanduser()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": section.trust_remote_code}
    if section.revision:
        options["revision"] = section.revision
    auto, how = getattr(transformers, task.model.auto_class), None
    try:
        name = str(source.absolute()) if source.is_dir() else section.name_or_path
        if section.quantization is not None:
            shared = {key: value for key, value in options.items() if key != "dtype"}
            config = transformers.AutoConfig.from_pretrained(name, **shared)
            remote = section.trust_remote_code
            how = quantization.wanted(section.quantization, "strategy.teacher.quantization", auto, config, remote, dtype)
            options |= how.options
        model, info = auto.from_pretrained(name, **options, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"strategy.teacher: {section.name_or_path} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"strategy.teacher: {section.name_or_path} has no weights for {missing[0]}: {task.model.if_missing}")
    if how is not None:
        quantization.settle(model, how, trains_itself=False)
    quantization.steady(model)
    loaded: PreTrainedModel = model
    return loaded.requires_grad_(False).eval()


def own_teacher(base: Base, will_change: bool) -> PreTrainedModel:
    """The student's own base as it is now; a copy of it if its weights will change."""
    from hfstrat.models.fused_loss import unbind_head_loss
    from hfstrat.models.load import cast_weights

    unbind_head_loss(base.model)
    if not will_change:
        return base.model
    teacher = copy.deepcopy(base.model)
    cast_weights(teacher, base.compute_dtype)
    return teacher.requires_grad_(False).eval()


def placed(
    strategy: Distill,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    describe: Callable[[Shapes, bool], Description],
    again: bool,
) -> PreTrainedModel | None:
    """The teacher of this process, beside its student; None where it has written, and cannot be compared token by token.

    Args:
        describe: what of the student is trained, from its shapes.
        again: whether the run sees rows again, for which the teacher's answers are then kept.

    Raises:
        UserError: it does not fit into memory, or speaks of other tokens.
    """
    from hfstrat.models.load import read_shapes
    from hfstrat.models.parameter_names import weight_bytes
    from hfstrat.models.quantization import shape_of
    from hfstrat.recipe.quantization import Quantization

    section = strategy.teacher
    if section is None:
        if base.new_head:
            raise UserError("strategy.teacher: missing; this model's own head is new and random: name a trained classifier")
        return own_teacher(
            base, will_change=strategy.shrink is None and (strategy.student.name != "lora" or distributed.is_sharded())
        )
    name = section.name_or_path
    shapes = {key: shape_of(p) for key, p in base.model.named_parameters()}
    held = read_shapes(Path(name).expanduser())
    if strategy.seq_kd and different_words(tokenizer.get_vocab(), tokenizer_of(section).get_vocab(), 10**9):
        return None
    kept = strategy.teacher_cache.form != "off" and (again or strategy.teacher_cache.form != "auto")
    stays = strategy.uses_teacher and (strategy.on_policy or strategy.hidden_states is not None or not kept)
    each = base.compute_dtype.itemsize
    wanted, few = (weight_bytes(held, how, each=each) for how in (section.quantization, Quantization(name="nf4")))
    ours = base.quantized["weight_bytes"] / base.quantized["parameters"] if base.quantized else 2.0
    check_room(name, (wanted, few), describe(shapes, base.is_tied).footprint, free_bytes(), stays, not strategy.on_policy, ours)
    found = load_teacher(section, base.task, base.compute_dtype)
    check_tokenizers(tokenizer, section, min(words_of(found), words_of(base.model)))
    known = found.get_input_embeddings().weight.shape[0]
    if known < len(tokenizer):
        raise UserError(
            f"strategy.teacher: {name} knows {known:,} tokens and the student's tokenizer has {len(tokenizer):,}; take another "
            "teacher, or remove model.add_tokens, if there are any"
        )
    return found


def check_length(teacher: PreTrainedModel | None, data: PreparedData | None) -> None:
    """Refuse rows that are longer than what the teacher was made for. Raises UserError."""
    from hfstrat.models.load import check_context

    if teacher is not None and data is not None:
        check_context(teacher, int(max(data.lengths.max(), data.eval_lengths.max())), "the teacher")


def words_of(model: PreTrainedModel) -> int:
    """The size of a model's vocabulary, padding included."""
    head = model.get_output_embeddings()
    return int((model.get_input_embeddings() if head is None else head).weight.shape[0])


def check_tokenizers(ours: PreTrainedTokenizerBase, section: TeacherModel, shared: int) -> None:
    """Refuse a teacher to whom the same numbers are other tokens, among the first `shared`."""
    if differs := different_words(ours.get_vocab(), tokenizer_of(section).get_vocab(), shared):
        raise UserError(f"strategy.teacher: {section.name_or_path} has another vocabulary ({differs}): {OTHER_WORDS}")


def check_sizes(ours: int, theirs: int) -> None:
    """Refuse to learn on-policy from a teacher with more or fewer tokens, padding included."""
    if ours != theirs:
        raise UserError(
            f"strategy.on_policy: the student has {ours:,} tokens and the teacher {theirs:,}, and TRL's DistillationTrainer "
            "needs as many; remove it (then the shared ones are compared), or give a random student the teacher's vocab_size "
            "in strategy.student.config"
        )


def tokenizer_of(section: TeacherModel) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer. Raises UserError where it cannot be loaded."""
    from transformers import AutoTokenizer

    source = Path(section.name_or_path).expanduser()
    try:
        name = str(source) if source.is_dir() else section.name_or_path
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        raise UserError(
            f"strategy.teacher: {section.name_or_path}: its tokenizer cannot be loaded ({first_line(error)}), and it has to be "
            "known which tokens it means; put the tokenizer that it was trained with into its folder"
        ) from error
    return found


def different_words(ours: dict[str, int], theirs: dict[str, int], shared: int) -> str | None:
    """The first number that means two things; tokens beyond `shared` or beyond an end do not count."""
    own, other = ({number: word for word, number in words.items()} for words in (ours, theirs))
    for number in range(min(shared, max(own, default=-1) + 1, max(other, default=-1) + 1)):
        if own.get(number) != other.get(number):
            return f"{number} is {own.get(number)!r} to the student and {other.get(number)!r} to the teacher"
    return None


def words_in(folder: Path) -> dict[str, int] | None:
    """The vocabulary in a folder's tokenizer.json, without transformers; None where it cannot be told."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        words = content["model"]["vocab"]
        listed = words if isinstance(words, dict) else {word[0]: number for number, word in enumerate(words)}
        return {**listed, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
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
    """Refuse a teacher that does not fit beside the student.

    Args:
        bytes_of: its weights as they are wanted, 0 where nobody knows, and in 4 bits.
        free: bytes of memory, None where nobody knows.
        stays: whether it is asked during training; else it goes before gradients and moments come.
        keepable: whether its answers could be kept instead.
        ours_each: bytes that a weight of the student's base takes.

    Raises:
        UserError: what would fit.
    """
    (theirs, few), least = bytes_of, ours_each * student.total + 2 * student.trainable
    ours = least + (12 * student.trainable if stays else 0)  # what learns: 32 bits, gradients, moments
    if not theirs or free is None or theirs + ours <= free:
        return
    keeping, cures = "answers that are kept (cache.form: hidden, and no `hidden:`), since it then goes before training", []
    if stays and keepable and theirs + least <= free:
        cures.append(keeping)
    if few < theirs and few + ours <= free:
        cures.append("a quantized one (teacher: {quantization: nf4})")
    elif stays and keepable and few < theirs and few + least <= free and not cures:
        cures.append(f"a quantized one (teacher: {{quantization: nf4}}) with {keeping}")
    cures.append(f"one of at most {(free - ours) / 1e9:.1f} GB" if free > ours else "a smaller student and a smaller teacher")
    raise UserError(
        f"strategy.teacher: {name} takes {theirs / 1e9:.1f} GB beside the student's {ours / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free; what would fit: {', or '.join(cures)}"
    )


def free_bytes() -> int | None:
    """Memory that is free: of the GPU where there is one, else of the machine."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
