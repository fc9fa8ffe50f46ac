"""Models with random weights: the shape for a number of parameters (no torch), and building from a config or a custom class."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line
from hfstrat.models import families, transformers_source
from hfstrat.models.load import Base, compute_dtype, source_of
from hfstrat.recipe.section import UNITS, split_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfstrat.recipe.schema import Model, Recipe


NARROWEST, WIDEST = 32, 16_384
ASPECT = (64.0, 128.0)  # width / depth: as in GPT-2 and Pythia; from 1B as in Llama. The loss hardly depends on it (2001.08361)
GATED = ("intermediate_size", 8 / 3)  # key of the inner width, and inner / outer width of a gated MLP (arXiv 2002.05202)
PLAIN = ("intermediate_size", 4.0)
INNER = {"gpt2": ("n_inner", 4.0), "vit": PLAIN, "audio-spectrogram-transformer": PLAIN}  # of ordinary MLPs
EXACT, NEAR = 0.02, 0.05  # relative errors of the parameters: up to which shapes are equally good, and the maximum


OF_ANOTHER_MODEL = (  # keys of a stored config that do not describe the shape of a new model
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "auto_map",
    "ignore_mismatched_sizes",
)


def readable(count: float) -> str:
    """A number of parameters as a recipe writes it: 10.1M."""
    unit = next((unit for unit in "bmk" if count >= UNITS[unit]), "")
    return f"{count / UNITS[unit]:.3g}{unit.upper() if unit != 'k' else unit}"


def pick(family: str, wanted: int, vocab_size: int | None, positions: int, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config with about `wanted` parameters; those in `given` (by the family's names) are kept.

    Without a vocabulary (`vocab_size` None) there are neither token embeddings nor a number of positions to set.

    The embeddings are tied: below about 500M, untied ones would be most of the model. Of all shapes within 2% of the number,
    the one with width / depth nearest to 64 (128 from 1B) is chosen.

    Raises UserError: no shape is within 5%.
    """
    names = families.common_names(family, "vocab_size", "max_position_embeddings", "tie_word_embeddings")
    fixed = {**(dict(zip(names, (vocab_size, positions, True), strict=True)) if vocab_size is not None else {}), **given}
    own = given.keys() - set(names)
    found: tuple[float, dict[str, Any]] | None = None
    nearest: tuple[float, int] = (math.inf, 0)
    for settings in _candidates(family, wanted, fixed):
        count = count_parameters(family, settings)
        error = abs(count - wanted) / wanted
        nearest = min(nearest, (error, count))
        score = max(0.0, error - EXACT) * 100 + _shape_cost(family, settings, ASPECT[wanted >= 10**9])
        if error <= NEAR and (found is None or score < found[0]):
            found = score, settings
    if found is None:
        if vocab_size is None and not nearest[1]:
            raise UserError(
                f"strategy.parameters: {readable(wanted)} are too few for any shape of {family} with this config; give more, "
                "or another strategy.config"
            )
        if vocab_size is None:
            raise UserError(
                f"strategy.parameters: no {family} with this config has about {readable(wanted)} parameters; the "
                f"nearest has {readable(nearest[1])}. Use that number, or another strategy.config"
            )
        tables = vocab_size * NARROWEST
        why = f"its embeddings alone have {readable(tables)} at width {NARROWEST}" if tables > wanted / 2 else ""
        instead = "use a smaller vocabulary" if why or not own else "remove strategy.config"
        raise UserError(
            f"strategy.parameters: no {family} with {vocab_size:,} tokens{' and this config' if own else ''} has about "
            f"{readable(wanted)} parameters; the nearest has {readable(nearest[1])}{f' ({why})' if why else ''}. Use that "
            f"number, or {instead}"
        )
    return found[1]


def count_parameters(family: str, settings: dict[str, Any]) -> int:
    """The number of parameters, from the shapes of one and of two blocks: all blocks are equal."""
    depth = families.common_name(family, "num_hidden_layers")
    one, two = (sum(map(prod, (families.shapes_of(family, {**settings, depth: n}) or {}).values())) for n in (1, 2))
    return one + (int(settings[depth]) - 1) * (two - one)


def _candidates(family: str, wanted: int, fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    names = families.common_names(family, "hidden_size", "num_attention_heads", "num_hidden_layers")
    width_key, heads_key, depth_key = names
    inner_key, _ = INNER.get(family, GATED)
    known = transformers_source.config_keys(family)
    for width in [fixed[width_key]] if width_key in fixed else _widths():
        each = 128 if width >= 2048 else 64 if width >= 512 else 32 if width >= 128 else 16
        heads = fixed.get(heads_key) or max(1, width // each)
        settings = {**fixed, width_key: width, heads_key: heads}
        if width % heads:
            continue
        if "num_key_value_heads" in known:
            settings.setdefault("num_key_value_heads", heads)
        if "head_dim" in known:
            settings.setdefault("head_dim", width // heads)
        for inner in [fixed[inner_key]] if inner_key in fixed else _inners(family, width):
            shape = {**settings, inner_key: inner}
            one, two = (count_parameters(family, {**shape, depth_key: n}) for n in (1, 2))
            guess = 1 + (wanted - one) / (two - one)
            for depth in [fixed[depth_key]] if depth_key in fixed else {math.floor(guess), math.ceil(guess)}:
                if 1 <= depth <= 256 and (depth > 1 or depth_key in fixed):
                    yield {**shape, depth_key: depth}


def _widths() -> Iterator[int]:
    width = NARROWEST
    while width <= WIDEST:
        yield width
        width += 16 if width < 64 else 32 if width < 512 else 64 if width < 2048 else 128


def _inners(family: str, width: int) -> list[int]:
    middle = INNER.get(family, GATED)[1] * width
    step = 8 if width < 128 else 16 if width < 256 else 32
    return sorted({round(middle * share / step) * step for share in (0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15)})


def _shape_cost(family: str, settings: dict[str, Any], aspect: float) -> float:
    width, depth = (settings[name] for name in families.common_names(family, "hidden_size", "num_hidden_layers"))
    key, middle = INNER.get(family, GATED)
    return abs(math.log(width / depth / aspect)) + abs(math.log(settings[key] / width / middle))


def describe(family: str, settings: dict[str, Any]) -> str:
    """A line about the sizes that were chosen."""
    names = families.common_names(family, "hidden_size", "num_hidden_layers", "num_attention_heads")
    width, depth, heads = (settings[name] for name in names)
    tokens, inner = settings.get(families.common_name(family, "vocab_size")), settings[INNER.get(family, GATED)[0]]
    count = count_parameters(family, settings)
    if tokens is None:
        return f"{family} of {count:,} parameters: {depth} layers of width {width}, {heads} heads, inner width {inner}"
    tables = tokens * width
    return (
        f"{family} of {count:,} parameters: {depth} layers of width {width}, {heads} heads, inner width {inner}, "
        f"{'tied' if families.is_tied(family, settings) else 'untied'} embeddings of {tables:,} ({tables / count:.0%})"
    )


def stored_config(model: Model) -> dict[str, Any]:
    """The config of the section `model`, from a file, a folder or the Hub; weights are not loaded."""
    from transformers import PreTrainedConfig

    if (stored := families.read_stored(model.name_or_path)) is not None:
        return stored
    source, options = source_of(model)
    try:
        return dict(PreTrainedConfig.get_config_dict(source, **options)[0])
    except Exception as error:
        raise UserError(f"model.name_or_path: {model.name_or_path}: {first_line(error)}") from error


def from_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Any, family: str, settings: dict[str, Any]) -> Base:
    """A model of a family for a task, with random weights by its config's `initializer_range`.

    Raises UserError: transformers refuses the config.
    """
    import transformers

    options: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    if recipe.model.attn_implementation != "auto":
        options["attn_implementation"] = recipe.model.attn_implementation
    plain = {key: value for key, value in settings.items() if key not in OF_ANOTHER_MODEL}
    try:
        config = transformers.AutoConfig.for_model(family, **plain)
        model = getattr(transformers, task.model.auto_class).from_config(config, **options)
    except Exception as error:
        raise UserError(f"strategy.config: transformers refuses this config of {family}: {first_line(error)}") from error
    base = make_base(recipe, model, task, tokenizer)
    base.new_head = True
    return base


def from_class(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Any, named: str, settings: dict[str, Any]) -> Base:
    """A model of the user's own class, made with its own config class.

    Raises UserError: the file does not run, or the class is none that can be trained and saved here.
    """
    found = _import_class(named)
    known = found.config_class().to_dict()
    if strange := [key for key in settings if key not in known]:
        raise UserError(
            f"strategy.config.{strange[0]}: {found.config_class.__name__} has no such key; it has {', '.join(known)}"
        )
    sizes = {"vocab_size": len(tokenizer)} if "vocab_size" in known else {}
    try:
        model = found(found.config_class(**{**sizes, **settings, **token_ids(tokenizer)}))
    except Exception as error:
        raise UserError(f"strategy.model_class: {named} cannot be built from this config: {first_line(error)}") from error
    if not hasattr(model.config, "num_hidden_layers"):
        raise UserError(f"strategy.model_class: {named}: its config has no num_hidden_layers, which generation needs; add it")
    found.config_class.register_for_auto_class("AutoConfig")
    found.register_for_auto_class("AutoModelForCausalLM")
    base = make_base(recipe, model, task, tokenizer)
    base.reload = {"trust_remote_code": True}
    base.say(f"{named} is a custom class: the result contains its code, and loads only with trust_remote_code=True")
    return base


def _import_class(named: str) -> Any:
    """The class of a `file.py:Class`. Raises UserError if it cannot be imported, trained and saved."""
    from transformers import PreTrainedModel

    file, name = split_class(named)
    other = importlib.util.find_spec(file.stem)
    if other is not None and (other.origin is None or Path(other.origin).resolve() != file.resolve()):
        raise UserError(f"strategy.model_class: {file}: a module has that name ({other.origin}); rename the file")
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
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not (is_model and found.config_class and found.can_generate()):
        raise UserError(
            f"strategy.model_class: {named}: expected a subclass of PreTrainedModel and GenerationMixin with a config_class "
            "and a forward that takes input_ids, attention_mask and **kwargs and returns logits"
        )
    return found


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of the special tokens, for a config."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if ids["pad_token_id"] in (ids["bos_token_id"], ids["eos_token_id"]):
        ids["pad_token_id"] = None  # as padding_idx it would keep the embedding of the end token at zero
    return ids


def make_base(recipe: Recipe, model: Any, task: Any, tokenizer: PreTrainedTokenizerBase) -> Base:
    """The model in float32, with an embedding for every token, as a loaded base model."""
    import torch

    model.float()
    new_ids = tokenizer.convert_tokens_to_ids(recipe.model.add_tokens) if recipe.model.add_tokens else []
    compute = compute_dtype(recipe.model.dtype)
    own = torch.float32 if recipe.model.dtype == "auto" else compute  # trained weights are rounded only if the recipe sets it
    return Base(model, task, recipe.model.name_or_path, recipe.model.revision, list(new_ids), compute, own)
