"""The strategies by name: what a section of `recipe/strategies.py` does. A new one is a file and a name here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hfstrat.recipe.load import about
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.strategies import StrategySection
from hfstrat.strategies import checks
from hfstrat.strategies.base import Strategy
from hfstrat.strategies.description import Description
from hfstrat.strategies.distill.strategy import Distill
from hfstrat.strategies.full import Full
from hfstrat.strategies.head import strategy as head
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.peft import Peft
from hfstrat.strategies.scratch import Scratch

STRATEGIES: dict[str, Callable[[Any], Strategy[Any]]] = {
    "distill": Distill,
    "full": Full,
    "head": head.build,
    "lora": Lora,
    "partial": Partial,
    "peft": Peft,
    "scratch": Scratch,
}


def build(section: StrategySection) -> Strategy[Any]:
    """The strategy of a section such as `recipe.strategy`. It lives for one run and may hold what it has built."""
    return STRATEGIES[section.name](section)


def describe(recipe: Recipe, labels: int = 2) -> Description | None:
    """What a recipe trains, without torch; None where that is unknown before the model is loaded.

    Args:
        labels: the number of labels in the data, which gives the size of a classifier's head.

    Raises:
        UserError: settings that do not fit the model's shapes.
    """
    strategy = build(recipe.strategy)
    found = None if recipe.model.add_tokens else strategy.shapes(recipe, labels)
    if found is None or (recipe.strategy.needs_weights and checks.has_tokens_beyond(recipe, found[0])):
        return None
    with about("strategy"):
        return strategy.describe(*found)


__all__ = ["STRATEGIES", "Description", "Strategy", "build", "describe"]
