"""Loading pretrained weights for a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line
from hfstrat.models import vocabulary
from hfstrat.models.check import check_trainable
from hfstrat.models.load import Base, compute_dtype, main_dtype, source_of
from hfstrat.models.pooling import Pooling, pooled_class, restore_head
from hfstrat.tasks import sentence_transformers
from hfstrat.tasks.base import Task
from hfstrat.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.quantization import Trainable
    from hfstrat.recipe.schema import Model, Recipe


def load_base(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None = None,
    data: PreparedData | None = None,
    learns: Trainable | None = None,
) -> Base:
    """Load the model for a task (a causal LM) in its checkpoint's own precision, so that nothing is rounded before the
    trainable parameters are known; or quantized, except for those that `learns` names.

    Raises:
        UserError: weights that do not fit the task, cannot be read, or lack parameters.
    """
    import transformers

    task = task or CausalLM()
    source, options = source_of(model)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"model.name_or_path: {model.name_or_path}: {first_line(error)}") from error
    check_trainable(model.name_or_path, config.model_type)
    if not model.trust_remote_code:
        task.model.check_config(model.name_or_path, config)
    pooling, keys = task.model.pooling(model, config.to_dict())
    auto = class_of(task, config, pooling)
    compute, how = compute_dtype(model.dtype), None
    if model.quantization is not None:
        from hfstrat.models import quantization

        key, remote = "model.quantization", model.trust_remote_code
        how = quantization.loading_options(model.quantization, key, auto, config, remote, compute, learns)
    wanted = keys | task.model.config_options(data, tokenizer) | task.model.stored_outputs(config, pooling)
    extra = wanted | (how.options if how else {})
    loaded, missing, replaced = _load_weights(model, auto, extra)
    missing = without_restored(loaded, pooling, missing)
    new_head = bool(missing or replaced)
    new = missing
    head, missing = task.model.split_missing(loaded, missing)
    if missing:
        raise UserError(
            f"model.name_or_path: {model.name_or_path} has no weights for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}: {task.model.if_missing}"
        )
    own = main_dtype(loaded) if model.dtype == "auto" else compute
    if own.itemsize == compute.itemsize == 2:
        own = compute  # the result runs where it was trained: a CPU has no norms of float16 on inputs of bfloat16
    base = Base(loaded, task, model.name_or_path, model.revision, [], compute, own, new_head=new_head, head_modules=head)
    rows = _fit_vocabulary(base, model, tokenizer) if task.model.reads_tokens else 0
    base.pooling, base.new_modules = pooling, [one for one in head if any(name.startswith(f"{one}.") for name in new)]
    if pooling is not None:
        base.say(f"pooled by {pooling.mode}; the result is saved in the format of sentence-transformers (model.pooling)")
    if task.model.reads_tokens:
        vocabulary.note_tokens_beyond(base, tokenizer, rows, data)
    if how is not None:
        base.quantized = quantization.finalize(loaded, how, trains_itself=how.options["dtype"] == "auto")
        base.reload |= how.record
        base.say(base.quantized.pop("line"))
    if replaced:
        base.say(f"the checkpoint's {replaced[0].rpartition('.')[0]} does not match its own config and is re-initialized")
    task.model.fit_outputs(base, config, data)
    task.model.adapt(base, tokenizer)
    return base


def _fit_vocabulary(base: Base, model: Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the model an embedding for each token of the tokenizer; returns the number that the checkpoint has."""
    loaded: Any = base.model
    base.new_token_ids = list(tokenizer.convert_tokens_to_ids(model.add_tokens)) if model.add_tokens else []
    rows = int(loaded.get_input_embeddings().weight.shape[0])
    vocabulary.check_tokenizer(model, tokenizer, rows)
    if len(tokenizer) > rows:
        loaded.resize_token_embeddings(len(tokenizer))
    return rows


def random_base(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    settings: dict[str, Any],
    task: Task,
    data: PreparedData | None,
) -> Base:
    """A model of this family for the task, with random weights and what the task adds to its config.

    Raises:
        UserError: transformers refuses the config.
    """
    from hfstrat.models import random_init

    check_trainable(family, family)
    settings = {**settings, **task.model.config_options(data, tokenizer)}
    settings = task.model.random_config(family, settings, tokenizer)
    base = random_init.from_config(recipe, tokenizer, task, family, settings)
    base.head_modules = task.model.split_missing(base.model, [])[0]
    task.model.adapt(base, tokenizer)
    return base


def class_of(task: Task, config: Any, pooling: Pooling | None) -> Any:
    """The class whose `from_pretrained` loads a model of this task."""
    import transformers

    if pooling is None:
        return getattr(transformers, task.model.auto_class)
    sentence_transformers.check_installed("model.pooling: class, or ")
    kind: Any = type(config)
    return pooled_class(kind, pooling.mode)


def without_restored(model: Any, pooling: Pooling | None, missing: list[str]) -> list[str]:
    """The missing parameters, once the head that a result has beside its body is loaded."""
    restored = [] if pooling is None else restore_head(model, pooling)
    return [name for name in missing if name not in restored]


def _load_weights(model: Model, auto: Any, extra: dict[str, Any]) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The loaded model, the names of parameters that the checkpoint lacks, and of those that it has in another shape."""
    import torch
    import transformers

    from hfstrat.models.quantization import prevent_repacking

    source, options = source_of(model)
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    if model.gguf_file:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)  # otherwise it cannot be trained or saved
        options["dtype"] = torch.float32
    try:
        loaded, info = auto.from_pretrained(source, **{"dtype": "auto", **options, **extra}, output_loading_info=True)
    except Exception as error:
        raise UserError(f"model.name_or_path: {model.name_or_path} cannot be loaded: {first_line(error)}") from error
    prevent_repacking(loaded)
    replaced = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
    return loaded, sorted({*info["missing_keys"], *replaced}), replaced
