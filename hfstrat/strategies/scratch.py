"""Training from scratch: random weights from a config, and a tokenizer trained on the data if asked."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hfstrat.errors import UserError
from hfstrat.scratch import families, sizes
from hfstrat.strategies import blueprint
from hfstrat.strategies.base import Default, Footprint, Shapes, Strategy
from hfstrat.strategies.new_tokenizer import NewTokenizer, check_supply
from hfstrat.tasks import TASKS
from hfstrat.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hfstrat.bars import Bars
    from hfstrat.config import Recipe
    from hfstrat.data import Prepared
    from hfstrat.model import Base
    from hfstrat.plan import Plan
    from hfstrat.tasks import Task

PYTHIA = "Pythia trains its 70M model at 1e-3 (arXiv 2304.01373, table 6)"
GPT3 = "GPT-3 (arXiv 2005.14165, appendix B)"


class Scratch(Strategy):
    """A model with random weights; every parameter learns, in float32.

    Its shape comes from `architecture` (with `parameters` or `config`), from the config of `model:` (its weights are not
    read), or from a class of your own.
    """

    name: Literal["scratch"]
    architecture: str | None = Field(
        None,
        min_length=1,
        description="Family of the model, as transformers' model_type (also bert for a classifier); llama unless model or "
        "model_class is given",
    )
    parameters: str | int | None = Field(
        None, description="Size, such as 10M: width, depth, heads and inner width are picked for the vocabulary"
    )
    config: dict[str, Any] = Field({}, description="Keys of the model's config, such as {hidden_size: 256}; they win")
    model_class: str | None = Field(
        None, description="A PreTrainedModel of your own: file.py:Class; it is made with config and saved with its code"
    )
    tokenizer: NewTokenizer | None = Field(None, description="Train a tokenizer on the training rows")
    needs_weights: ClassVar[bool] = False
    unquantizable: ClassVar[str] = "from scratch the weights are random and all of them learn: remove it"
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(1e-3, PYTHIA),
        "weight_decay": Default(0.1, f"{GPT3}; of matrices only, not of norms and biases"),
        "extra": Default({"adam_beta2": 0.95}, GPT3),
    }

    @field_validator("parameters")
    @classmethod
    def _readable_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            sizes.parse(value)
        return value

    @model_validator(mode="after")
    def _one_shape(self) -> Scratch:
        if self.model_class is not None:
            if self.architecture or self.parameters:
                raise ValueError("model_class: your class has a shape of its own; remove architecture and parameters")
            blueprint.split_class(self.model_class)
        return self

    def check_model(self, recipe: Recipe, network: bool) -> Footprint | None:
        vocabulary = self._check_words(recipe, network)
        if self.model_class is not None:
            if self.tokenizer and recipe.model.name_or_path:
                raise UserError(
                    f"model.name_or_path: {recipe.model.name_or_path}: strategy.model_class brings the model and "
                    "strategy.tokenizer the tokenizer, so nothing would be read from it; remove it"
                )
            blueprint.check_class(self.model_class)
            return None
        source = recipe.model.name_or_path
        if source:
            self._check_source(recipe, network)
        found = self.blueprint(recipe, vocabulary, None)
        if found is None or vocabulary is None:
            return None
        family, settings = found
        shapes = families.shapes_of(family, settings)
        config = {**families.config_keys(family), **settings, "model_type": family}
        config["architectures"] = [] if family in families.BODIES else ["ForCausalLM"]
        made = TASKS[recipe.task].shapes(shapes, config, labels=2) if shapes else None  # how many there are is known later
        return self.footprint(*made) if made else None

    def _check_words(self, recipe: Recipe, network: bool) -> int | None:
        """Refuse a recipe without one tokenizer; the number of its tokens where it can be told."""
        from hfstrat import preflight_model

        model = recipe.model
        if model.gguf_file:
            raise UserError("model.name_or_path: a .gguf file is read for its weights; from scratch, name a config.json")
        if model.revision and not model.name_or_path:
            raise UserError("model.revision: there is no model.name_or_path that it could be of; remove it")
        if self.tokenizer is None:
            if model.tokenizer is None and (not model.name_or_path or model.name_or_path.endswith(".json")):
                raise UserError(
                    "strategy.tokenizer: missing; say `tokenizer: {vocab_size: 4096}` under strategy to train one on the "
                    "data, or name one to reuse by model.tokenizer"
                )
            preflight_model.check_tokenizer(model, network)
            return blueprint.count_tokens(Path(model.tokenizer or model.name_or_path).expanduser(), model.add_tokens)
        if model.tokenizer is not None:
            raise UserError("model.tokenizer: strategy.tokenizer trains one; remove one of them")
        if model.add_tokens:
            raise UserError(
                "model.add_tokens: for a new tokenizer they are strategy.tokenizer.special_tokens; write them there"
            )
        check_supply(recipe, self.tokenizer)
        return self.tokenizer.vocab_size

    def _check_source(self, recipe: Recipe, network: bool) -> None:
        """Refuse a `model:` that has no config, or one beside a family or a size."""
        from hfstrat import preflight_model

        source = recipe.model.name_or_path
        if self.architecture or self.parameters:
            key = "architecture" if self.architecture else "parameters"
            raise UserError(
                f"strategy.{key}: model: {source} brings a config with a shape of its own; remove one of them (keys of that "
                "config are changed by strategy.config; a tokenizer alone is model.tokenizer)"
            )
        path = Path(source).expanduser()
        if not path.exists():
            preflight_model.check_hub("model.name_or_path", source, recipe.model.revision, "config.json", "model", network)

    def blueprint(self, recipe: Recipe, vocabulary: int | None, stored: dict[str, Any] | None) -> tuple[str, Any] | None:
        """The family and the settings of the config, by the family's own names; None where only transformers can tell.

        Args:
            vocabulary: tokens of the tokenizer; None where it is not known yet.
            stored: the config of `model:`; None to read a local one.

        Raises:
            UserError: an unknown family or key, heads that do not divide the width, a size that cannot be.
        """
        if stored is None and recipe.model.name_or_path:
            stored = blueprint.read_stored(recipe.model.name_or_path)
            if stored is None:
                return None
        family = str((stored or {}).get("model_type", "")) or self.architecture or "llama"
        key = "strategy.architecture" if stored is None else "model.name_or_path"
        blueprint.check_family(family, key, TASKS[recipe.task].auto_class, {**(stored or {}), **self.config})
        own = families.canonical(family, self.config)
        blueprint.check_keys(family, self.config)
        name = families.common_name(family, "vocab_size")
        if vocabulary is not None and own.get(name, vocabulary) < vocabulary:
            raise UserError(f"strategy.config.{name}: {own[name]} is fewer than the {vocabulary} tokens of the tokenizer")
        settings = {**(stored or {}), **own}
        if vocabulary is not None and name not in own:
            settings[name] = vocabulary if self.tokenizer else max(vocabulary, (stored or {}).get(name, 0))
        if stored is None:
            settings = self._with_size(family, settings, recipe.data.max_length)
        blueprint.check_heads(family, settings)
        return family, settings

    def _with_size(self, family: str, settings: dict[str, Any], longest: int) -> dict[str, Any]:
        """With a context for the longest row, and the shape that `parameters` asks for."""
        context = families.common_name(family, "max_position_embeddings")
        if context in families.config_keys(family):
            settings.setdefault(context, longest)
        if self.parameters is None:
            if not self.config:
                raise UserError(
                    "strategy.parameters: missing; how large shall it be? Say `parameters: 10M`, or the keys of "
                    f"{family}'s config under strategy.config, or name a model whose config is taken"
                )
            return settings
        if family not in families.KNOWN:
            raise UserError(
                f"strategy.parameters: shapes are picked for {', '.join(families.KNOWN)}; for {family} say the keys of its "
                "config under strategy.config"
            )
        vocabulary = settings.get(families.common_name(family, "vocab_size"))
        if vocabulary is None:
            return settings  # of a tokenizer on the Hub: it is picked once it is here
        return sizes.pick(family, sizes.parse(self.parameters), vocabulary, settings[context], settings)

    def check(self, task: Task) -> None:
        if self.model_class is not None and task.name != CausalLM.name:
            raise UserError(
                f"strategy.model_class: a class of your own is for task: {CausalLM.name}; remove it, or name a family"
            )

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        from hfstrat.strategies import new_tokenizer

        return new_tokenizer.train(recipe, self.tokenizer) if self.tokenizer else super().load_tokenizer(recipe)

    def held_out(self, recipe: Recipe) -> np.ndarray | None:
        from hfstrat.data.corpus import open_corpus

        return open_corpus(recipe).held_out if self.tokenizer else None

    def load_base(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> Base:
        from hfstrat.scratch import random_model

        if self.model_class is not None:
            return random_model.of_class(recipe, tokenizer, self.model_class, self.config)
        task = TASKS[recipe.task]
        stored = random_model.stored_config(recipe.model) if recipe.model.name_or_path else None
        found = self.blueprint(recipe, len(tokenizer), stored)
        assert found is not None
        family, settings = found
        base = random_model.of_config(recipe, tokenizer, family, settings, task, task.config_options(data, tokenizer))
        if self.parameters is not None:
            base.say(f"{'picked':<9} {sizes.line(family, settings)}")
        return base

    def build_model(self, base: Base) -> nn.Module:
        base.model.requires_grad_(True)
        return base.model

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.model import cast_weights

        cast_weights(model, base.own_dtype)

    def bars(self, data: Prepared, plan: Plan, model: nn.Module) -> Bars | None:
        from hfstrat import bars

        return None if data.label_names else bars.measure(data, plan, model)  # a classifier's bar is its largest label

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        total = sum(prod(shape) for shape in shapes.values())
        return Footprint(total, total)
