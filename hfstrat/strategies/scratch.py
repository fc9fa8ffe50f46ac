"""Training from scratch: checks of the config of a new model, and its random weights and tokenizer."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models import families, random_init, transformers_source
from hfstrat.models.check import check_hub, check_tokenizer, read_vocabulary
from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes, parse, split_class
from hfstrat.strategies import checks
from hfstrat.strategies.full import AllWeights
from hfstrat.strategies.new_tokenizer import check_vocabulary_size
from hfstrat.tasks import TASKS
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.trainer.distributed import ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData as Data
    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.base import Task


OF_INPUTS = (  # what the shapes of a model of images or recordings depend on too
    *("image_size", "patch_size", "num_channels", "qkv_bias"),
    *("max_length", "num_mel_bins", "frequency_stride", "time_stride"),
)
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _suggestion(name: str, known: Iterable[str], otherwise: str, quote: str = "") -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {quote}{near[0]}{quote}?" if near else otherwise


def check_family(family: str, key: str, auto_class: str, settings: dict[str, Any]) -> None:
    """Refuse a family without a model for the task, and a causal LM with bidirectional attention. Raises UserError."""
    known, causal = transformers_source.families_of(auto_class), auto_class == "AutoModelForCausalLM"
    kind, such = ("causal LM", "llama, qwen3, mistral or gpt2") if causal else ("classifier", "bert, modernbert or llama")
    if known and family not in known:
        hint = _suggestion(family.lower(), known, f"expected one such as {such}", "'")
        raise UserError(f"{key}: {family}: the installed transformers has no {kind} of that family; {hint}")
    if causal and families.is_bidirectional(family, settings):
        raise UserError(
            f"{key}: {family} has bidirectional attention, so a causal LM would see the token that it has to predict; "
            f"expected one such as {such}"
        )


def check_keys(family: str, config: dict[str, Any]) -> None:
    """Refuse keys that the config of the family does not have, which transformers would ignore. Raises UserError."""
    known = transformers_source.config_keys(family)
    for key in families.canonical(family, config) if known else []:
        if key not in known:
            hint = _suggestion(key, known, f"expected one of {', '.join(list(known)[10:])}", "'")
            raise UserError(f"strategy.config.{key}: the config of {family} has no such key; {hint}")
    positive = {families.common_name(family, name) for name in COUNTS}
    for key, value in config.items():
        name = families.common_name(family, key)
        if name in positive and value is not None and (type(value) is not int or value < 1):
            raise UserError(f"strategy.config.{key}: {value}: expected a whole number, at least 1")


def check_heads(family: str, settings: dict[str, Any]) -> None:
    """Refuse a hidden size that is not divisible by the heads, or heads not divisible by those of keys. Raises UserError."""
    whole = {**transformers_source.config_keys(family), **settings}
    width_key, heads_key = (families.common_name(family, key) for key in ("hidden_size", "num_attention_heads"))
    width, heads, shared = whole.get(width_key), whole.get(heads_key), whole.get("num_key_value_heads")
    if not (isinstance(width, int) and isinstance(heads, int)) or min(width, heads) < 1:
        return
    if width % heads and not settings.get("head_dim"):
        raise UserError(
            f"strategy.config.{heads_key}: {width_key} = {width} is not divisible by {heads} heads; "
            f"set {width_key}: {max(1, round(width / heads)) * heads}, or {_divisor(width, heads)} heads"
        )
    if isinstance(shared, int) and shared > 0 and heads % shared:
        given = "num_key_value_heads" if "num_key_value_heads" in settings else heads_key
        raise UserError(
            f"strategy.config.{given}: {heads} heads are not divisible by num_key_value_heads = {shared}; "
            f"set num_key_value_heads: {_divisor(heads, shared)}"
        )


def _divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def count_tokens(folder: Path, added: list[str]) -> int | None:
    """The size of a tokenizer by its tokenizer.json, with added tokens; None if there is no such file."""
    known = read_vocabulary(folder)
    return None if known is None else len(known.keys() | set(added))


def check_class(text: str) -> None:
    """Refuse a file that does not exist or is not Python, or that has no such class. Raises UserError."""
    file, name = split_class(text)
    if not file.is_file():
        hint = _suggestion(file.name, (path.name for path in file.parent.glob("*.py")), f"looked in {file.parent.resolve()}")
        raise UserError(f"strategy.model_class: {file}: no such file; {hint}")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"strategy.model_class: {file} is not valid Python: {error}") from None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if name not in classes:
        hint = _suggestion(name, classes, f"its classes: {', '.join(classes) or 'none'}")
        raise UserError(f"strategy.model_class: {file} has no class {name}; {hint}")


class Scratch(AllWeights[section.Scratch]):
    """A model with random weights; every parameter is trained, in float32."""

    def check_task(self, task: Task) -> None:
        if not task.model.reads_tokens and self.section.tokenizer is not None:
            raise UserError(f"strategy.tokenizer: models for {task.name} read no tokens; remove it")
        if self.section.model_class is not None and task.name != CausalLM.name:
            raise UserError(f"strategy.model_class is for task: {CausalLM.name}; remove it, or set strategy.model_type")

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        self.check_task(TASKS[recipe.task])
        checks.check_quantization(recipe, self.describe)
        if TASKS[recipe.task].model.reads_tokens:
            self._check_tokenizer(recipe, network)
        elif recipe.model.tokenizer is not None:
            TASKS[recipe.task].rows.check_processor(recipe.model, network)
        source = recipe.model.name_or_path
        if recipe.model.pooling is not None:
            raise UserError("model.pooling: a new model pools as its class in transformers; remove it")
        if recipe.training.head_learning_rate is not None:
            raise UserError("training.head_learning_rate: all weights of this model are new, not only its head; remove it")
        if self.section.model_class is not None:
            if self.section.tokenizer and source:
                raise UserError(
                    f"model.name_or_path: {source}: strategy.model_class and strategy.tokenizer define model and "
                    "tokenizer, so nothing would be read from it; remove it"
                )
            check_class(self.section.model_class)
            return
        if source:
            self._check_source(recipe, network)
        self.blueprint(recipe, self._vocabulary_size(recipe), None)

    def shapes(self, recipe: Recipe, labels: int = 2) -> tuple[Shapes, bool] | None:
        if self._vocabulary_size(recipe) is None or (found := self.new_config(recipe)) is None:
            return None
        family, settings = found
        shapes = families.shapes_of(family, settings)
        config = {**transformers_source.config_keys(family), **settings, "model_type": family}
        config["architectures"] = [] if family in families.BODIES else ["ForCausalLM"]
        return TASKS[recipe.task].model.shapes(shapes, config, labels) if shapes else None

    def new_config(self, recipe: Recipe) -> tuple[str, dict[str, Any]] | None:
        if self.section.model_class is not None:
            return None
        return self.blueprint(recipe, self._vocabulary_size(recipe), None)

    def _vocabulary_size(self, recipe: Recipe) -> int | None:
        """The number of tokens, where it is known before a tokenizer is loaded; None for models that read none."""
        if not TASKS[recipe.task].model.reads_tokens:
            return None
        if self.section.tokenizer is not None:
            return self.section.tokenizer.vocab_size
        return count_tokens(Path(recipe.model.tokenizer or recipe.model.name_or_path).expanduser(), recipe.model.add_tokens)

    def _check_tokenizer(self, recipe: Recipe, network: bool) -> None:
        """Refuse a recipe without exactly one tokenizer."""
        model = recipe.model
        if model.gguf_file:
            raise UserError("model.name_or_path: strategy scratch reads no weights, such as a .gguf file; give a config.json")
        if model.revision and not model.name_or_path:
            raise UserError("model.revision: it needs model.name_or_path; remove it")
        if self.section.tokenizer is None:
            if model.tokenizer is None and (not model.name_or_path or model.name_or_path.endswith(".json")):
                raise UserError(
                    "strategy.tokenizer: missing; set `tokenizer: {vocab_size: 4096}` under strategy to train one on the "
                    "data, or model.tokenizer to use an existing one"
                )
            check_tokenizer(model, network)
            return
        if model.tokenizer is not None:
            raise UserError("model.tokenizer: strategy.tokenizer trains a new one; remove one of them")
        if model.add_tokens:
            raise UserError("model.add_tokens: for a new tokenizer set strategy.tokenizer.special_tokens instead")
        check_vocabulary_size(recipe, self.section.tokenizer)

    def _check_source(self, recipe: Recipe, network: bool) -> None:
        """Refuse a `model:` without a config, or together with a family or a size."""
        source = recipe.model.name_or_path
        if self.section.model_type or self.section.parameters:
            key = "model_type" if self.section.model_type else "parameters"
            raise UserError(
                f"strategy.{key}: model: {source} has a config that defines the shape; remove one of them (set "
                "strategy.config to change keys of that config, or model.tokenizer to use only its tokenizer)"
            )
        path = Path(source).expanduser()
        if not path.exists():
            check_hub("model.name_or_path", source, recipe.model.revision, "config.json", "model", network)

    def blueprint(self, recipe: Recipe, vocabulary: int | None, stored: dict[str, Any] | None) -> tuple[str, Any] | None:
        """The family and the keys of the config, by the names of the family; None if only transformers can read it.

        Args:
            vocabulary: size of the tokenizer; None if it is not known yet.
            stored: the config of `model:`; None to read a local one.

        Raises:
            UserError: an unknown family or key, a wrong number of heads, or an impossible size.
        """
        if stored is None and recipe.model.name_or_path:
            stored = families.read_stored(recipe.model.name_or_path)
            if stored is None:
                return None
        family = str((stored or {}).get("model_type", "")) or self._family(recipe)
        key = "strategy.model_type" if stored is None else "model.name_or_path"
        check_family(family, key, TASKS[recipe.task].model.auto_class, {**(stored or {}), **self.section.config})
        own = families.canonical(family, self.section.config)
        check_keys(family, self.section.config)
        name = families.common_name(family, "vocab_size")
        if vocabulary is not None and own.get(name, vocabulary) < vocabulary:
            raise UserError(f"strategy.config.{name}: {own[name]} is less than the {vocabulary} tokens of the tokenizer")
        settings = {**(stored or {}), **own}
        if vocabulary is not None and name not in own:
            settings[name] = vocabulary if self.section.tokenizer else max(vocabulary, (stored or {}).get(name, 0))
        settings |= TASKS[recipe.task].model.random_inputs(family, recipe)
        if stored is None:
            settings = self._with_size(family, settings, recipe.data.max_length, TASKS[recipe.task])
        check_heads(family, settings)
        return family, settings

    def _family(self, recipe: Recipe) -> str:
        """The family of a model without a config to take it from."""
        return self.section.model_type or TASKS[recipe.task].model.random_family

    def _with_size(self, family: str, settings: dict[str, Any], longest: int, task: Task) -> dict[str, Any]:
        """The settings with a context for `longest` tokens, and the shape for `parameters`."""
        context = families.common_name(family, "max_position_embeddings")
        if context in transformers_source.config_keys(family):
            settings.setdefault(context, longest)
        if self.section.parameters is None:
            if not self.section.config:
                raise UserError(
                    "strategy.parameters: missing; set a size such as `parameters: 10M`, or the keys of the config of "
                    f"{family} under strategy.config, or a model whose config is used"
                )
            return settings
        known_to_task = transformers_source.families_of(task.model.auto_class)
        possible = [name for name in families.KNOWN if name in known_to_task]
        if family not in possible:
            raise UserError(
                f"strategy.parameters: it is for {', '.join(possible)}; for {family} set the keys of its config under "
                "strategy.config"
            )
        if not task.model.reads_tokens:
            known = {**transformers_source.config_keys(family), **settings}
            given = {**{key: known[key] for key in OF_INPUTS if key in known}, **settings}
            return random_init.pick(family, parse(self.section.parameters), None, 0, given)
        vocabulary = settings.get(families.common_name(family, "vocab_size"))
        if vocabulary is None:
            return settings  # a tokenizer on the Hub: the shape is chosen once it is loaded
        return random_init.pick(family, parse(self.section.parameters), vocabulary, settings[context], settings)

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        from hfstrat.strategies import new_tokenizer

        if self.section.tokenizer is None:
            return TASKS[recipe.task].rows.load_processor(recipe, self._family(recipe))  # type: ignore[no-any-return]
        return new_tokenizer.train(recipe, self.section.tokenizer)

    def load(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data | None) -> Base:
        from hfstrat.tasks import loading

        task = TASKS[recipe.task]
        if self.section.model_class is not None:
            return random_init.from_class(recipe, tokenizer, task, self.section.model_class, self.section.config)
        stored = random_init.stored_config(recipe.model) if recipe.model.name_or_path else None
        found = self.blueprint(recipe, len(tokenizer) if task.model.reads_tokens else None, stored)
        assert found is not None
        family, settings = found
        base = loading.random_base(recipe, tokenizer, family, settings, task, data)
        if self.section.parameters is not None:
            base.say(f"{'shape':<9} {random_init.describe(family, settings)}")
        return base
