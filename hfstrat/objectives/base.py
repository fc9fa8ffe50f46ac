"""What an objective decides. The base class is `sft`: everything is the task's own. torch is imported inside the methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import ALONE

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.objectives import ObjectiveSection
    from hfstrat.recipe.schema import Recipe
    from hfstrat.trainer.train_data import TrainData


class Objective:
    """The task's own loss.

    Args:
        section: of the recipe.
        task: its name.
    """

    def __init__(self, section: ObjectiveSection, task: str) -> None:
        self.section, self.base_task = section, TASKS[task]

    @property
    def task(self) -> Task:
        """The task with the rows, the loss, the metrics and the texts of this objective."""
        return self.base_task

    def check(self, recipe: Recipe, wrapping: str = ALONE) -> None:
        """Refuse what cannot work together, before torch.

        Args:
            wrapping: how processes share the model: alone, ddp, fsdp or deepspeed.

        Raises:
            UserError: one sentence that begins with the key.
        """

    def prepare(self, recipe: Recipe, model: nn.Module, rows: TrainData, data: PreparedData) -> tuple[TrainData, PreparedData]:
        """The data with what is computed once by the model at its start, such as the outputs of a reference."""
        return rows, data

    def measure(self, model: Any, data: TrainData) -> dict[str, dict[str, np.ndarray]]:
        """What is measured after training beside the metrics: by a name, columns with a number for each example, `[n]`."""
        return {}

    def facts(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Parts of the report from the log of training (an entry for each log)."""
        return {}

    def reference(self, recipe: Recipe, model: Any, rows: TrainData, data: PreparedData) -> PreparedData:
        """Evaluation data with the outputs of this model as the reference, where the objective has one.

        `measure` compares with this reference from then on.
        """
        return data

    @property
    def trainer_class(self) -> Any:
        """The class of the Trainer; None for that of the strategy."""
        return None
