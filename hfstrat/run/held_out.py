"""Training examples that are held out of training, to choose thresholds on them: of each of several labels, or of a rare
class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.errors import UserError
from hfstrat.tasks.rankings import rarest_of
from hfstrat.tasks.text_classification.thresholds import FEW

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.base import Strategy

SHARE, LEAST_ROWS, MOST_ROWS = 0.15, 200, 2000  # of the training examples; with fewer than the least none are held out


def hold_out(recipe: Recipe, strategy: Strategy[Any], data: PreparedData) -> tuple[PreparedData, Any]:
    """The data without the training examples on which thresholds are chosen, and these; None where none are needed.

    Raises:
        UserError: a threshold of a rare class is asked for, and there is none, or too few examples to choose it on.
    """
    check_rare(recipe, data, 1.0 if strategy.predicts_out_of_fold else SHARE)
    wanted = recipe.evaluation.label_thresholds and getattr(data, "many", False)
    wanted = (wanted or recipe.evaluation.rare_class_precision is not None) and not strategy.predicts_out_of_fold
    if not wanted or len(data.train) < LEAST_ROWS:
        return data, None
    return data.hold_out(min(MOST_ROWS, round(SHARE * len(data.train))), recipe.seed)  # type: ignore[attr-defined, no-any-return]


def check_rare(recipe: Recipe, data: Any, share: float) -> None:
    """Refuse a threshold of a rare class where there is no such class, or too few examples of it.

    Args:
        share: of the training examples, on which it is chosen.

    Raises:
        UserError: see above.
    """
    precision = recipe.evaluation.rare_class_precision
    if precision is None:
        return
    given = f"evaluation.rare_class_precision: {precision:g}"
    if getattr(data, "many", False):
        raise UserError(f"{given}: an example may have several labels, each with a threshold of its own; remove it")
    if len(data.train) < LEAST_ROWS:
        raise UserError(
            f"{given}: it needs at least {LEAST_ROWS} training examples, and there are {len(data.train)}; remove it"
        )
    if (rare := rarest_of(data.counts)) is None:
        fewest = int(np.argmin(data.counts))
        raise UserError(
            f"{given}: no class is rare: the fewest examples has {data.label_names[fewest]}, {data.counts[fewest]:,}, and the "
            f"most frequent class {max(data.counts):,}; remove it"
        )
    if round(share * data.counts[rare]) < FEW:
        raise UserError(
            f"{given}: {data.label_names[rare]} has {data.counts[rare]:,} training examples, of which {share:.0%} would choose "
            f"the threshold, and at least {FEW} have to; add some, set strategy: head, which holds none out, or remove it"
        )
