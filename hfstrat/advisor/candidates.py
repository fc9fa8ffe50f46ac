"""What each strategy would be here: its section of the recipe, the model that it trains, and what of it learns. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from pydantic import TypeAdapter

from hfstrat import strategies
from hfstrat.advisor import shapes as models
from hfstrat.advisor.data import Survey
from hfstrat.advisor.shapes import Model
from hfstrat.errors import UserError
from hfstrat.recipe.schema import STRATEGIES, AnyStrategy
from hfstrat.recipe.strategies import StrategySection
from hfstrat.strategies import defaults
from hfstrat.strategies.base import Footprint, Learning
from hfstrat.strategies.defaults import ORDER
from hfstrat.tasks import TASKS

SMALLEST, LARGEST_NEW_VOCABULARY = 1_000_000, 8_192
EPOCHS = {"scratch": 4.0}
USUAL_EPOCHS = 3.0


@dataclass(frozen=True)
class Candidate:
    """A strategy with everything that predictions ask for; `reason` why it cannot be had, if it cannot."""

    name: str
    section: dict[str, Any]
    strategy: StrategySection | None = None
    model: Model | None = None
    learning: Learning | None = None
    footprint: Footprint | None = None
    reason: str = ""

    @property
    def epochs(self) -> float:
        return EPOCHS.get(self.name, USUAL_EPOCHS)

    @property
    def training(self) -> dict[str, Any]:
        """Keys of `training:` that it wants."""
        rate = defaults.learning_rate(self.name, self.model.width if self.model else 0)
        return {} if rate is None else {"learning_rate": rate}

    @property
    def section_keys(self) -> set[str]:
        return set(type(self.strategy).model_fields) if self.strategy is not None else set()

    @property
    def artefact_bytes(self) -> float:
        """What has to be loaded to use the result, base included, in 16 bits."""
        return 2.0 * (self.footprint.total if self.footprint else 0)


def names(wanted: str | None, task: str) -> list[str]:
    """Which strategies are asked about. Raises UserError for unknown ones, and for those that cannot do the task."""
    if wanted is None:
        return list(ORDER)
    found = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in found:
        if name not in STRATEGIES:
            raise UserError(f"--strategies: {name}: no such strategy; expected some of {', '.join(ORDER)}")
        if task not in STRATEGIES[name].tasks:
            can = [other for other, cls in STRATEGIES.items() if task in cls.tasks]
            raise UserError(f"--strategies: {name} is not for task {task}; expected some of {', '.join(can)}")
    if not found or len(set(found)) < len(found):
        raise UserError(f"--strategies: {wanted}: expected some of {', '.join(ORDER)}, each once")
    return found


def make(name: str, model: Model, data: Survey, most: float = float("inf")) -> Candidate:
    """The candidate; one with a reason where it cannot be.

    Args:
        most: parameters of a model from scratch, at most.
    """
    try:
        return _scratch(name, model, data, most) if STRATEGIES[name].random_weights else _pretrained(name, model, data)
    except UserError as error:
        return Candidate(name, {"name": name}, reason=str(error).partition(": ")[2] or str(error))


def _pretrained(name: str, model: Model, data: Survey) -> Candidate:
    task = TASKS[data.task]
    if data.task not in STRATEGIES[name].tasks:
        raise UserError(f"strategy: not for task {data.task}")
    if task.unit == "token" and model.is_encoder:
        raise UserError(f"model: {model.family} is an encoder, and no causal LM")
    if not model.by_hand:
        task.check_architecture(model.name, model.config)
    labels = len(data.labels)
    made = task.shapes(model.shapes, model.config, labels)
    found, tied = made or ({**model.shapes, "score.weight": (labels, model.width)}, False)
    architecture = str((model.config.get("architectures") or [""])[0])
    about = defaults.About(data.task, model.name, model.layers, model.width, architecture)
    section = {"name": name, **defaults.section(name, about)}
    wanted: StrategySection = TypeAdapter(AnyStrategy).validate_python(section)
    strategy = strategies.build(wanted)
    strategy.check(task)
    return Candidate(name, section, wanted, model, strategy.learning(found, tied), strategy.footprint(found, tied))


def _scratch(name: str, model: Model, data: Survey, most: float) -> Candidate:
    """A Llama of as many parameters as the tokens can shape, with a tokenizer of its own; never larger than `model`."""
    if data.task not in STRATEGIES[name].tasks:
        raise UserError(f"strategy: not for task {data.task}: labels alone are too little to learn a language from")
    from hfstrat.advisor.rules import OPTIMAL, WORTHWHILE
    from hfstrat.models.random import sizes

    worth = data.tokens * WORTHWHILE / OPTIMAL
    size = max(SMALLEST, min(worth, most, model.parameters))
    text = sizes.readable(_two_digits(size))
    words = new_vocabulary(data)
    made = models.by_hand(text, words, data.max_length)
    section = {"name": name, "architecture": "llama", "parameters": text, "tokenizer": {"vocab_size": words}}
    wanted: StrategySection = TypeAdapter(AnyStrategy).validate_python(section)
    strategy = strategies.build(wanted)
    return Candidate(
        name, section, wanted, made, strategy.learning(made.shapes, made.tied), strategy.footprint(made.shapes, made.tied)
    )


def _two_digits(number: float) -> float:
    return float(f"{number:.1e}")


def new_vocabulary(data: Survey) -> int:
    """Tokens of a new tokenizer: 1,024 for little text, twice as many for each tenfold; fewer where the text has no more pairs
    that occur twice."""
    count = int(min(1024, 320 + data.tokens // 8 // 64 * 64))
    for threshold in (1e6, 1e7, 1e8):
        count *= 2 if data.tokens >= threshold else 1
    return min(count, LARGEST_NEW_VOCABULARY)


def parameters_of(candidate: Candidate) -> int:
    return sum(map(prod, candidate.learning.shapes.values())) if candidate.learning else 0
