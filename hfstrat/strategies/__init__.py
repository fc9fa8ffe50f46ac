"""The strategies by name: what each section of `hfstrat.recipe.strategies` does. A new one is a file and a name here."""

from __future__ import annotations

from typing import Any

from hfstrat.recipe.strategies import StrategySection
from hfstrat.strategies.base import Footprint, Learning, Strategy
from hfstrat.strategies.distill.strategy import Distill
from hfstrat.strategies.full import Full
from hfstrat.strategies.head.strategy import Head
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.scratch.strategy import Scratch

CLASSES: dict[str, type[Strategy[Any]]] = {
    "distill": Distill,
    "full": Full,
    "head": Head,
    "lora": Lora,
    "partial": Partial,
    "scratch": Scratch,
}


def build(section: StrategySection) -> Strategy[Any]:
    """The strategy of a section such as `recipe.strategy`. It lives for one run and may hold what it has built."""
    return CLASSES[section.name](section)


__all__ = ["CLASSES", "Footprint", "Learning", "Strategy", "build"]
