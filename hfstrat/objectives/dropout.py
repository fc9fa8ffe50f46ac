"""Objectives that compare probabilities of whole answers are trained without dropout, as in TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    from torch import nn as torch_nn

    from hfstrat.recipe.schema import Recipe
    from hfstrat.trainer.train_data import TrainData


def check_dropout(recipe: Recipe) -> None:
    """Raises UserError where the recipe asks for dropout."""
    if getattr(recipe.strategy, "lora_dropout", 0.0):
        raise UserError(
            f"strategy.lora_dropout: objective {recipe.objective.name} is trained without dropout, as in TRL: all answers see "
            "the same model; remove it"
        )


def without_dropout(model: torch_nn.Module, rows: TrainData) -> None:
    """Turn the dropout of a model off, in place: two answers would be compared through different masks."""
    from torch import nn

    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    for module in dropouts:
        module.p = 0.0
    if dropouts:
        rows.say(f"{'dropout':<9} off in {plural(len(dropouts), 'module')}, as in TRL: all answers see the same model")
