"""A student that begins with random weights: what it reads of the recipe, and where its keys stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hfstrat.distillation.combinations import makes_words
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.config import Recipe
    from hfstrat.strategies.distill import Distill


def recipe_for(strategy: Distill, recipe: Recipe) -> Recipe:
    """The recipe as the student reads it; a random one has its own section in it, and the teacher's tokenizer."""
    if strategy.student.needs_weights:
        return recipe
    model = recipe.model
    if strategy.teacher and model.tokenizer is None and not makes_words(strategy):
        model = model.model_copy(update={"tokenizer": strategy.teacher.name_or_path})
    return recipe.model_copy(update={"model": model, "strategy": strategy.student})


@contextmanager
def speaking(strategy: Distill) -> Iterator[None]:
    """What a random student's section says of its keys is said of where they stand here."""
    try:
        yield
    except UserError as error:
        if strategy.student.needs_weights:
            raise
        said = str(error).replace("strategy.", "strategy.student.")
        if strategy.teacher and said.startswith(f"model.tokenizer: {strategy.teacher.name_or_path}"):
            said = said.replace("model.tokenizer", "strategy.teacher", 1)
        raise UserError(said) from error.__cause__
