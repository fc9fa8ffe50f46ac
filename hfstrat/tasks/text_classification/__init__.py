"""Predicting which label, or labels, a text or a pair of texts has, by encoders and decoders with a classification head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.tasks.base import Task
from hfstrat.tasks.text_classification.metrics import ClassMetrics
from hfstrat.tasks.text_classification.model import Classifier
from hfstrat.tasks.text_classification.rows import LabeledRows
from hfstrat.tasks.text_classification.text import LabelText

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe


class TextClassification(Task):
    """The task `text-classification`."""

    name = "text-classification"
    rows = LabeledRows()
    model = Classifier()
    metrics = ClassMetrics()
    text = LabelText()

    def check(self, recipe: Recipe) -> None:
        check_texts(recipe)


def check_texts(recipe: Recipe) -> None:
    """Refuse settings that are for generated text, in a task that predicts something about complete texts."""
    task = recipe.task
    if recipe.data.overflow == "split":
        raise UserError(
            f"data.overflow: split: a label belongs to a complete text, not to its parts; for {task} expected truncate, "
            "drop or error"
        )
    for key in ("template", "train_on"):
        if getattr(recipe.data, key) != "auto":
            raise UserError(f"data.{key}: {getattr(recipe.data, key)} is for task: causal-lm; remove it")
    if recipe.model.gguf_file:
        raise UserError("model.name_or_path: a .gguf file is read for task: causal-lm only; give a model folder or a Hub id")
    for key in ("metrics", "choices", "lm_eval"):
        if getattr(recipe.evaluation, key):
            raise UserError(f"evaluation.{key}: it is for models that generate text; remove it for {task}")
    if recipe.evaluation.control not in ("auto", "off"):
        raise UserError(f"evaluation.control: it is a language model's loss; remove it for {task}")
    if recipe.training.packing is True:
        raise UserError(f"training.packing: true: examples of {task} are not packed; set auto or false")
