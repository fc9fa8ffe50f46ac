"""Models with random weights, from a config or from a custom class."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line
from hfstrat.models.load import Base, compute_dtype, source_of
from hfstrat.recipe.section import split_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfstrat.recipe.schema import Model, Recipe


def stored_config(model: Model) -> dict[str, Any]:
    """The config of the section `model`, from a file, a folder or the Hub; weights are not loaded."""
    from transformers import PreTrainedConfig

    from hfstrat.models.random.families import read_stored

    if (stored := read_stored(model.name_or_path)) is not None:
        return stored
    source, options = source_of(model)
    try:
        return dict(PreTrainedConfig.get_config_dict(source, **options)[0])
    except Exception as error:
        raise UserError(f"model.name_or_path: {model.name_or_path}: {first_line(error)}") from error


def from_config(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    settings: dict[str, Any],
    auto_class: str,
) -> Base:
    """A model of a family and an auto class, with random weights by its config's `initializer_range`.

    Raises:
        UserError: transformers refuses the config.
    """
    import transformers

    drop = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config", "auto_map")
    options: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    if recipe.model.attn_implementation != "auto":
        options["attn_implementation"] = recipe.model.attn_implementation
    plain = {key: value for key, value in settings.items() if key not in (*drop, "ignore_mismatched_sizes")}
    try:
        config = transformers.AutoConfig.for_model(family, **{**plain, **token_ids(tokenizer)})
        model = getattr(transformers, auto_class).from_config(config, **options)
    except Exception as error:
        raise UserError(f"strategy.config: transformers refuses this config of {family}: {first_line(error)}") from error
    base = make_base(recipe, model, tokenizer)
    base.new_head = True
    return base


def from_class(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, named: str, settings: dict[str, Any]) -> Base:
    """A model of the user's own class, made with its own config class.

    Raises:
        UserError: the file does not run, or the class is none that can be trained and saved here.
    """
    from transformers import PreTrainedModel

    file, name = split_class(named)
    there = importlib.util.find_spec(file.stem)
    if there is not None and (there.origin is None or Path(there.origin).resolve() != file.resolve()):
        raise UserError(f"strategy.model_class: {file}: a module has that name ({there.origin}); rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # transformers looks there for the file to save with the model
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"strategy.model_class: {file} cannot be imported: {first_line(error)}") from error
    found: Any = getattr(module, name)
    fits = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not (fits and found.config_class and found.can_generate()):
        raise UserError(
            f"strategy.model_class: {named}: expected a subclass of PreTrainedModel and GenerationMixin with a config_class "
            "and a forward that takes input_ids, attention_mask and **kwargs and returns logits"
        )
    known = found.config_class().to_dict()
    sizes = {"vocab_size": len(tokenizer)} if "vocab_size" in known else {}
    if strange := [key for key in settings if key not in known]:
        raise UserError(
            f"strategy.config.{strange[0]}: {found.config_class.__name__} has no such key; it has {', '.join(known)}"
        )
    try:
        model = found(found.config_class(**{**sizes, **settings, **token_ids(tokenizer)}))
    except Exception as error:
        raise UserError(f"strategy.model_class: {named} cannot be built from this config: {first_line(error)}") from error
    if not hasattr(model.config, "num_hidden_layers"):
        raise UserError(f"strategy.model_class: {named}: its config has no num_hidden_layers, which generation needs; add it")
    found.config_class.register_for_auto_class("AutoConfig")
    found.register_for_auto_class("AutoModelForCausalLM")
    base = make_base(recipe, model, tokenizer)
    base.reload = {"trust_remote_code": True}
    base.say(f"{named} is a custom class: the result contains its code, and loads only with trust_remote_code=True")
    return base


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of the special tokens, for a config."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if ids["pad_token_id"] in (ids["bos_token_id"], ids["eos_token_id"]):
        ids["pad_token_id"] = None  # as padding_idx it would keep the embedding of the end token at zero
    return ids


def make_base(recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase) -> Base:
    """The model in float32, with an embedding for every token, as a loaded base model."""
    import torch

    model.float()
    new_ids = tokenizer.convert_tokens_to_ids(recipe.model.add_tokens) if recipe.model.add_tokens else []
    compute = compute_dtype(recipe.model.dtype)
    own = torch.float32 if recipe.model.dtype == "auto" else compute  # what was learnt is not rounded unasked
    return Base(model, recipe.model.name_or_path, recipe.model.revision, list(new_ids), compute, own)
