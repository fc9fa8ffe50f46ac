"""The learning rate of a new head, which has to move further than pretrained weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.recipe.format import plural
from hfstrat.tasks import TASKS

if TYPE_CHECKING:
    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.base import Prepared
    from hfstrat.trainer.plan import Plan

FEW_STEPS = 100
OF_PEFT = "base_model.model."  # before the names of a model's parameters


def share_of(recipe: Recipe, base: Base) -> float:
    """The learning rate of the new head as a multiple of `learning_rate`; 1 where there is none.

    Raises UserError: `head_learning_rate` is set, and there is none.
    """
    wanted, rate = recipe.training.head_learning_rate, recipe.training.learning_rate
    if base.new_modules:
        return TASKS[recipe.task].model.head_share if wanted is None or rate is None else wanted / rate
    if wanted is not None:
        raise UserError(
            "training.head_learning_rate: the head of this model is trained already, so it has no learning rate of its own; "
            "remove it"
        )
    return 1.0


def with_head_rate(recipe: Recipe, base: Base, prepared: Prepared) -> Prepared:
    """The same, with the rate of the new head; in addition to the rates of the strategy, if it has any."""
    share, modules = share_of(recipe, base), tuple(f"{name}." for name in base.new_modules)
    if share == 1:
        return prepared
    given = prepared.trainer_kwargs.get("rate_of")

    def rate_of(name: str) -> float:
        plain = name.removeprefix("module.").removeprefix(OF_PEFT)
        return (given(name) if given else 1.0) * (share if plain.startswith(modules) else 1.0)

    return replace(prepared, trainer_kwargs={**prepared.trainer_kwargs, "rate_of": rate_of})


def remarks(recipe: Recipe, base: Base, plan: Plan) -> list[str]:
    """A warning where a new head is trained for so few steps that it stays near chance (benchmarks/results/few_rows.md)."""
    if not base.new_modules or plan.steps >= FEW_STEPS:
        return []
    epochs = -(-FEW_STEPS * plan.global_batch_size // max(1, plan.rows))
    return [
        f"{'warning':<9} {plural(plan.steps, 'step')} for a head with random weights: often too few to learn the labels; "
        f"training.num_train_epochs={epochs} gives {FEW_STEPS}, and `hfstrat advise --write` proposes a learning rate"
    ]


def words(recipe: Recipe, base: Base) -> str:
    """The rate of the new head, in words; empty where it has none of its own."""
    share = share_of(recipe, base)
    return (
        "" if share == 1 or recipe.training.learning_rate is None else f" (new head {share * recipe.training.learning_rate:g})"
    )
