"""The preference objectives: what they refuse, their task, and the columns that are computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.objectives.base import Objective
from hfstrat.objectives.dropout import check_dropout, without_dropout
from hfstrat.objectives.preference.task import BY_TASK
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, FSDP

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from hfstrat.data.prepare import PreparedData
    from hfstrat.objectives.preference.divergence import Sampled
    from hfstrat.recipe.schema import Recipe
    from hfstrat.trainer.train_data import TrainData

DIVERGENCE = "divergence from the reference"  # the name of its measurement
REFUSED = {  # strategies that cannot be combined with a preference, and why
    "scratch": "random weights prefer nothing: train them with objective: sft first, then continue with full or lora",
    "head": "only the output layer would be trained, on cached states of one answer; use lora, partial or full",
    "distill": "a student is trained on its teacher's outputs; distill with objective: sft, then continue with full or lora",
}


class PreferenceObjective(Objective):
    """Direct preference optimization and its relatives."""

    answers: Sampled | None = None  # of the reference

    @property
    def task(self) -> Task:
        make = BY_TASK.get(self.base_task.name)
        return make(self.section) if make else self.base_task  # which `check` refuses

    def check(self, recipe: Recipe, wrapping: str = ALONE) -> None:
        name = self.section.name
        if recipe.task not in BY_TASK:
            named = " or ".join(BY_TASK)
            raise UserError(f"objective: {name}: preferences are between generated answers; it needs task: {named}")
        if why := REFUSED.get(recipe.strategy.name):
            raise UserError(f"objective: {name} cannot be combined with strategy {recipe.strategy.name}: {why}")
        if getattr(recipe.strategy, "precompute", None) is True:
            raise UserError(
                "strategy.precompute: true: states are cached for single sequences, not for pairs; set auto or false"
            )
        if recipe.training.packing == "dense":
            raise UserError("training.packing: dense: a preference objective counts its batch in pairs; set auto or true")
        if self.section.name == "kto" and recipe.training.packing is True:
            raise UserError("training.packing: true: the answers of kto are not packed; set auto or false")
        if recipe.data.overflow == "split":
            raise UserError(
                f"data.overflow: split: the answers of objective {name} cannot be split; set truncate, drop or error"
            )
        if recipe.data.documents == "files":
            raise UserError("data.documents: files: complete files are no preferences; remove it, or set objective: sft")
        if "train_on" in recipe.data.model_fields_set and recipe.data.train_on not in ("auto", "completions"):
            raise UserError(f"data.train_on: {recipe.data.train_on}: objective {name} compares answers alone; remove it")
        check_dropout(recipe)
        if self.section.has_reference and wrapping in (FSDP, DEEPSPEED):
            raise UserError(
                f"objective: {name}: its reference is computed by the full model on each process; use --accelerate-config ddp, "
                "or objective orpo or simpo, which have no reference"
            )

    def prepare(self, recipe: Recipe, model: nn.Module, rows: TrainData, data: PreparedData) -> tuple[TrainData, PreparedData]:
        without_dropout(model, rows)
        if not self.section.has_reference:
            return rows, data
        from hfstrat.objectives.preference.divergence import sampled
        from hfstrat.objectives.preference.reference import with_reference

        rows = with_reference(model, rows)
        self.answers = sampled(model, rows, data, recipe.evaluation.max_new_tokens)
        return rows, replace(data, eval=rows.eval)

    def measure(self, model: Any, data: TrainData) -> dict[str, dict[str, np.ndarray]]:
        if self.answers is None:
            return {}
        from hfstrat.objectives.preference.divergence import divergence

        return {DIVERGENCE: divergence(model, self.answers, data)}

    def reference(self, recipe: Recipe, model: Any, rows: TrainData, data: PreparedData) -> PreparedData:
        if not self.section.has_reference:
            return data
        from hfstrat.objectives.preference.divergence import sampled
        from hfstrat.objectives.preference.reference import with_reference_of

        self.answers = sampled(model, rows, data, recipe.evaluation.max_new_tokens)
        return replace(data, eval=with_reference_of(model, rows))

    @property
    def trainer_class(self) -> Any:
        from hfstrat.objectives.preference.trainer import PreferenceTrainer

        return PreferenceTrainer
