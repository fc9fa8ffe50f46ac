"""Training examples that are held out of training, to choose a threshold for each of several labels on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.base import Strategy

SHARE, LEAST_ROWS, MOST_ROWS = 0.15, 200, 2000  # of the training examples; with fewer than the least none are held out


def hold_out(recipe: Recipe, strategy: Strategy[Any], data: PreparedData) -> tuple[PreparedData, Any]:
    """The data without the training examples on which thresholds are chosen, and these; None where none are needed."""
    wanted = recipe.evaluation.label_thresholds and getattr(data, "many", False) and not strategy.predicts_out_of_fold
    if not wanted or len(data.train) < LEAST_ROWS:
        return data, None
    return data.hold_out(min(MOST_ROWS, round(SHARE * len(data.train))), recipe.seed)  # type: ignore[attr-defined, no-any-return]
