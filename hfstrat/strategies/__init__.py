"""The tagged union of strategies. A new strategy is one file and one name here."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from hfstrat.recipe.section import Default, Section, Shapes
from hfstrat.strategies.base import Footprint, Learning, Strategy
from hfstrat.strategies.distill.strategy import Distill
from hfstrat.strategies.full import Full
from hfstrat.strategies.head.strategy import Head
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.scratch.strategy import Scratch

AnyStrategy = Annotated[Distill | Full | Head | Lora | Partial | Scratch, Field(discriminator="name")]

STRATEGIES: dict[str, type[Strategy]] = {
    get_args(cls.model_fields["name"].annotation)[0]: cls for cls in get_args(get_args(AnyStrategy)[0])
}

__all__ = ["STRATEGIES", "AnyStrategy", "Default", "Footprint", "Learning", "Section", "Shapes", "Strategy"]
