"""What the adviser says of a recipe, to stand beside what was measured. `of` is the one place where it is asked."""

from __future__ import annotations

from typing import TypedDict

from hfstrat.loading import Loaded


class Prediction(TypedDict, total=False):
    """Each of it may be left out; an empty cell is shown then.

    memory_bytes, memory_band: peak of the process as report.json has it, and [low, high].
    seconds, seconds_band: from the start to trained weights (setup_seconds + train_seconds of report.json), and [low, high].
    rank: place among the strategies compared, from 1.
    verdict, source: the reasons, and where they are from.
    """

    memory_bytes: float
    memory_band: tuple[float, float]
    seconds: float
    seconds_band: tuple[float, float]
    rank: int
    verdict: str
    source: str


def of(recipes: dict[str, Loaded]) -> dict[str, Prediction]:
    """What was predicted of each recipe (with its budget), by its name, before the first run; nothing where nobody can tell.

    It has to be quick, and must not import torch.
    """
    from hfstrat.advisor import of_recipe

    return of_recipe.of(recipes)  # type: ignore[return-value]
