"""Strategies for a model and data: the section of the recipe, the model that is trained, its parameters. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from pydantic import TypeAdapter

from hfstrat import strategies
from hfstrat.advisor import architecture
from hfstrat.advisor.architecture import Model
from hfstrat.advisor.data import Survey
from hfstrat.advisor.rules import OPTIMAL, WORTHWHILE
from hfstrat.errors import UserError
from hfstrat.models import random_init
from hfstrat.recipe.schema import STRATEGIES, AnyStrategy
from hfstrat.recipe.strategies import StrategySection
from hfstrat.strategies import defaults
from hfstrat.strategies.description import Description, Footprint
from hfstrat.tasks import TASKS

SMALLEST, LARGEST_NEW_VOCABULARY = 1_000_000, 8_192
EPOCHS = {"scratch": 4.0}
USUAL_EPOCHS = 3.0


@dataclass(frozen=True)
class Candidate:
    """A strategy that is possible here, with everything that predictions need.

    section: of the recipe, `name` included.
    model: the model that is trained; a new one if the strategy trains from scratch.
    """

    name: str
    section: dict[str, Any]
    strategy: StrategySection
    model: Model
    description: Description

    @property
    def footprint(self) -> Footprint:
        return self.description.footprint

    @property
    def epochs(self) -> float:
        return EPOCHS.get(self.name, USUAL_EPOCHS)

    @property
    def training(self) -> dict[str, Any]:
        """Keys of `training:` that are proposed for it."""
        rate = defaults.learning_rate(self.name, self.model.width)
        return {} if rate is None else {"learning_rate": rate}

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.description.shapes.values()))

    @property
    def artifact_bytes(self) -> float:
        """What has to be loaded to use the result in 16 bits, base included."""
        return 2.0 * self.footprint.total


@dataclass(frozen=True)
class Unavailable:
    """A strategy that is impossible here, and why."""

    name: str
    reason: str


def propose(name: str, model: Model, data: Survey, most: float = float("inf")) -> Candidate:
    """The strategy as it is proposed for this model and data.

    Args:
        most: upper limit for the parameters of a model from scratch.

    Raises:
        UserError: it is impossible; begins with the recipe's key.
    """
    if data.task not in STRATEGIES[name].tasks:
        raise UserError(f"strategy: does not support task {data.task}")
    return _from_scratch(name, model, data, most) if STRATEGIES[name].random_weights else _pretrained(name, model, data)


def _pretrained(name: str, model: Model, data: Survey) -> Candidate:
    task = TASKS[data.task]
    if task.text.generates and model.is_encoder:
        raise UserError(f"model: {model.family} is an encoder, not a causal LM")
    if not model.by_hand:
        task.model.check_architecture(model.name, model.config)
    labels = len(data.labels)
    known = task.model.shapes(model.shapes, model.config, labels)
    shapes, tied = known or ({**model.shapes, "score.weight": (labels, model.width)}, False)
    about = defaults.ModelFacts(data.task, model.name, model.layers, model.width, class_name(model.config))
    section = {"name": name, **defaults.section(name, about)}
    strategy: StrategySection = TypeAdapter(AnyStrategy).validate_python(section)
    built = strategies.build(strategy)
    built.check_task(task)
    return Candidate(name, section, strategy, model, built.describe(shapes, tied))


def class_name(config: dict[str, Any]) -> str:
    """The class that a config.json names, such as LlamaForCausalLM; empty if it names none."""
    return str((config.get("architectures") or [""])[0])


def _from_scratch(name: str, model: Model, data: Survey, most: float) -> Candidate:
    """A Llama with a new tokenizer, with as many parameters as the tokens can train, and not larger than `model`."""
    worthwhile = data.tokens * WORTHWHILE / OPTIMAL
    size = random_init.readable(float(f"{max(SMALLEST, min(worthwhile, most, model.parameters)):.1e}"))
    vocabulary = new_vocabulary(data.tokens)
    new = architecture.by_hand(size, vocabulary, data.max_length)
    section = {"name": name, "model_type": "llama", "parameters": size, "tokenizer": {"vocab_size": vocabulary}}
    strategy: StrategySection = TypeAdapter(AnyStrategy).validate_python(section)
    built = strategies.build(strategy)
    return Candidate(name, section, strategy, new, built.describe(new.shapes, new.tied))


def new_vocabulary(tokens: float) -> int:
    """The size of a new vocabulary: 1,024 for little text, doubled with each tenfold; less if the text has too few repeated
    pairs."""
    count = int(min(1024, 320 + tokens // 8 // 64 * 64))
    for threshold in (1e6, 1e7, 1e8):
        count *= 2 if tokens >= threshold else 1
    return min(count, LARGEST_NEW_VOCABULARY)
