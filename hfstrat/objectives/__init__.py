"""What is minimized, by name. A new objective is a folder here, a section in `hfstrat.recipe.objectives`, and a line below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.objectives.base import Objective
from hfstrat.objectives.preference.objective import PreferenceObjective
from hfstrat.objectives.reinforcement.objective import RewardObjective
from hfstrat.tasks.base import Task

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe

__all__ = ["Objective", "objective_of", "task_of"]

BY_NAME: dict[str, type[Objective]] = {
    "sft": Objective,
    **dict.fromkeys(("dpo", "orpo", "simpo", "kto"), PreferenceObjective),
    "grpo": RewardObjective,
}


def objective_of(recipe: Recipe) -> Objective:
    """The objective of a recipe."""
    return BY_NAME[recipe.objective.name](recipe.objective, recipe.task)


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe with the rows, the loss and the metrics of its objective."""
    return objective_of(recipe).task
