"""Strategies for a model and data: the section of the recipe, the model that is trained, its parameters. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from hfstrat import strategies
from hfstrat.advisor import architecture, towers
from hfstrat.advisor.architecture import Model
from hfstrat.advisor.data import Survey
from hfstrat.errors import UserError
from hfstrat.models import families, random_init, transformers_source
from hfstrat.objectives.preference.objective import REFUSED
from hfstrat.recipe import section as sizes
from hfstrat.recipe.schema import STRATEGIES, AnyStrategy
from hfstrat.recipe.section import Shapes
from hfstrat.recipe.strategies import StrategySection
from hfstrat.strategies import defaults
from hfstrat.strategies.description import Description, Footprint
from hfstrat.tasks import TASKS

SMALLEST, LARGEST_NEW_VOCABULARY = 1_000_000, 8_192
SMALL = 3_000_000  # parameters of a model of files from scratch, as in docs/images.md: no law for their data is known here
OPTIMAL = 20.0  # tokens per parameter: arXiv 2203.15556
WORTHWHILE = 4.0  # epochs for which a repeated token is worth about as much as a new one: arXiv 2305.16264
EPOCHS = {"scratch": 4.0}
USUAL_EPOCHS, MOST_EPOCHS = 3.0, 40.0
ENOUGH_EXAMPLES = 3200.0  # that a classifier sees in training, repeated where there are few (arXiv 2006.04884)


@dataclass(frozen=True)
class Candidate:
    """A strategy that is possible here, with everything that predictions need.

    section: of the recipe, `name` included.
    model: the model that is trained; a new one if the strategy trains from scratch.
    epochs: that are proposed.
    data: where the model is given something else than the pretrained one; None: the same.
    """

    name: str
    section: dict[str, Any]
    strategy: StrategySection
    model: Model
    description: Description
    epochs: float = USUAL_EPOCHS
    data: Survey | None = None

    @property
    def footprint(self) -> Footprint:
        return self.description.footprint

    @property
    def artifact_bytes(self) -> float:
        """What has to be loaded to use the result in 16 bits, base included."""
        return 2.0 * self.footprint.total


def propose(name: str, model: Model, data: Survey, most: float = float("inf")) -> Candidate:
    """The strategy as it is proposed for this model and data.

    Args:
        most: upper limit for the parameters of a model from scratch.

    Raises:
        UserError: it is impossible; begins with the recipe's key.
    """
    if data.task not in STRATEGIES[name].tasks:
        raise UserError(f"strategy: does not support task {data.task}")
    if data.objective != "sft" and name in REFUSED:
        raise UserError(f"strategy: cannot be combined with objective {data.objective}: {REFUSED[name]}")
    own = None
    if STRATEGIES[name].random_weights:
        if data.files is None:
            model, settings = _from_scratch(model, data, most)
            shapes, tied = model.shapes, model.tied
        else:
            model, settings, own = _from_scratch_of_files(model, data, most)
            shapes, tied = architecture.parameters_of(model, TASKS[data.task], data.outputs) or (model.shapes, False)
    else:
        shapes, tied = _with_head(model, data)
        architecture_name = str((model.config.get("architectures") or [""])[0])
        about = defaults.ModelFacts(data.task, model.name, model.layers, model.width, architecture_name)
        settings = defaults.section(name, about)
    section = {"name": name, **settings}
    strategy: StrategySection = TypeAdapter(AnyStrategy).validate_python(section)
    built = strategies.build(strategy)
    built.check_task(TASKS[data.task])
    built.set_family(model.family, TASKS[data.task].text.generates)
    description = towers.describe(built, model, shapes, tied)
    if data.objective != "sft":  # states of pairs are not cached
        description = description._replace(keeps_prefix=False)
    return Candidate(name, section, strategy, model, description, epochs_of(name, data), own)


def epochs_of(name: str, data: Survey) -> float:
    """The epochs of a run; those of a classification with few examples are more, since fine-tuning needs steps."""
    if name in EPOCHS or not data.outputs:
        return EPOCHS.get(name, USUAL_EPOCHS)
    return float(round(min(MOST_EPOCHS, max(USUAL_EPOCHS, ENOUGH_EXAMPLES / max(1, data.rows)))))


def _with_head(model: Model, data: Survey) -> tuple[Shapes, bool]:
    """The parameters of a pretrained model with the head of the task, and whether the head is tied."""
    task, labels = TASKS[data.task], data.outputs
    if task.text.generates and model.is_encoder:
        raise UserError(f"model: {model.family} is an encoder, not a causal LM")
    if not model.by_hand:
        task.model.check_architecture(model.name, model.config)
    known = architecture.parameters_of(model, task, labels)
    return known or ({**model.shapes, "score.weight": (labels, model.width)}, False)


def _from_scratch_of_files(model: Model, data: Survey, most: float) -> tuple[Model, dict[str, Any], Survey]:
    """A model with random weights for files: of a size that is known to be trained in minutes, not larger than `model`."""
    size = max(SMALLEST, min(SMALL, most, model.parameters))
    own, family, settings = data.scratch(size)
    wanted = random_init.readable(float(f"{size:.1e}"))
    config = random_init.pick(family, sizes.parse(wanted), None, 0, settings)
    shapes = families.shapes_of(family, config) or {}
    whole = {**transformers_source.config_keys(family), **config, "model_type": family}
    made = architecture.from_config(f"a {family} of {wanted}", whole, shapes, 0, task=TASKS[data.task])
    keys = {"model_type": family, "parameters": wanted, "config": settings}
    return replace(made, by_hand=True), keys, own


def _from_scratch(model: Model, data: Survey, most: float) -> tuple[Model, dict[str, Any]]:
    """A Llama with a new tokenizer, with as many parameters as the tokens can train, and not larger than `model`."""
    worthwhile = data.tokens * WORTHWHILE / OPTIMAL
    size = random_init.readable(float(f"{max(SMALLEST, min(worthwhile, most, model.parameters)):.1e}"))
    vocabulary = new_vocabulary(data.tokens)
    settings = {"model_type": "llama", "parameters": size, "tokenizer": {"vocab_size": vocabulary}}
    return architecture.by_hand(size, vocabulary, data.max_length), settings


def new_vocabulary(tokens: float) -> int:
    """The size of a new vocabulary: 1,024 for little text, doubled with each tenfold; less if the text has too few repeated
    pairs."""
    count = int(min(1024, 320 + tokens // 8 // 64 * 64))
    for threshold in (1e6, 1e7, 1e8):
        count *= 2 if tokens >= threshold else 1
    return min(count, LARGEST_NEW_VOCABULARY)
