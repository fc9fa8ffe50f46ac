"""Predicting one or several numbers for a text or a pair of texts, by encoders and decoders.

Targets are standardized on the training examples while a head is trained, and this is folded into its last linear layer
before the result is saved: plain transformers predicts in the original units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.tasks.base import Task
from hfstrat.tasks.regression.metrics import TargetMetrics
from hfstrat.tasks.regression.model import Regressor
from hfstrat.tasks.regression.rows import TargetRows
from hfstrat.tasks.regression.text import NumberText
from hfstrat.tasks.text_classification import check_texts

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe


class Regression(Task):
    """The task `regression`."""

    name = "regression"
    rows = TargetRows()
    model = Regressor()
    metrics = TargetMetrics()
    text = NumberText()

    def check(self, recipe: Recipe) -> None:
        check_texts(recipe)
        if recipe.model.dtype == "float16":
            raise UserError(
                "model.dtype: float16: predictions in original units may overflow; for regression expected float32 or bfloat16"
            )
