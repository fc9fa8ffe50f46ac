"""Distillation: a student is trained by another strategy to match a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.errors import UserError
from hfstrat.models.load import read_shapes
from hfstrat.recipe import distill as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import Footprint, Learning, Strategy
from hfstrat.strategies.distill.shrink import shapes_left
from hfstrat.strategies.full import Full
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.scratch.strategy import Scratch
from hfstrat.trainer.distributed import DEEPSPEED, FSDP

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.load import Loaded
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.distill.loss import Mix
    from hfstrat.tasks.base import Task
    from hfstrat.trainer.baselines import Baselines
    from hfstrat.trainer.plan import Plan
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer


class Objective(NamedTuple):
    """The loss of a task's students, and the function that caches the outputs of their teacher."""

    distiller: Callable[[Mix], Any]
    ask_once: Callable[[TrainData, Any, section.Cache], TrainData]


def objective_of(task: str) -> Objective:
    from hfstrat.strategies.distill import classification, objective, precompute

    distillers = {
        "causal-lm": Objective(objective.Distiller, precompute.ask_once),
        "text-classification": Objective(classification.ClassDistiller, classification.ask_once),
    }
    return distillers[task]


def check_task(strategy: section.Distill, task: Task) -> None:
    """Raises UserError with the key that is for models of tokens, where the task is another one."""
    if task.unit == "token":
        return
    form = strategy.cache.form
    for key, is_given, why in (
        ("on_policy", strategy.on_policy, "a classifier writes no answers; remove it"),
        ("level", strategy.level == "sequence", "a classifier writes no answers; remove it"),
        ("hidden", strategy.hidden is not None, "layers are brought together for causal-lm only; remove it"),
        ("cache.form", form not in ("auto", "off"), f"{form} is for tokens; class logits are kept exactly, take auto or off"),
    ):
        if is_given:
            raise UserError(f"strategy.{key}: {why}")


def recipe_for(strategy: section.Distill, recipe: Recipe) -> Recipe:
    """The recipe as the student reads it; a random one has its own section in it, and the teacher's tokenizer."""
    if strategy.student.needs_weights:
        return recipe
    model = recipe.model
    if strategy.teacher and model.tokenizer is None and not strategy.new_tokenizer:
        model = model.model_copy(update={"tokenizer": strategy.teacher.name_or_path})
    return recipe.model_copy(update={"model": model, "strategy": strategy.student})


@contextmanager
def speaking(strategy: section.Distill) -> Iterator[None]:
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


STUDENTS: dict[str, type[Strategy[Any]]] = {"full": Full, "lora": Lora, "partial": Partial, "scratch": Scratch}


class Distill(Strategy[section.Distill]):
    """A student is trained by another strategy, with a loss that contains the outputs of a frozen teacher."""

    def __init__(self, section: section.Distill) -> None:
        super().__init__(section)
        self.student = STUDENTS[section.student.name](section.student)
        self.distiller: Any = None  # the loss
        self.teacher: PreTrainedModel | None = None  # until the distiller has it

    def learns_whole(self, names: list[str], tied: bool) -> set[str]:
        return self.student.learns_whole(names, tied)

    def check_model(self, recipe: Recipe, network: bool) -> Footprint | None:
        from hfstrat.strategies.distill import check_teacher

        if self.section.needs_weights:
            footprint = super().check_model(recipe, network)
            check_teacher.check(self.section, recipe, network)
            return footprint
        recipe = recipe_for(self.section, recipe)
        check_teacher.check(self.section, recipe, network)
        with speaking(self.section):
            return self.student.check_model(recipe, network)

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        with speaking(self.section):
            return self.student.load_tokenizer(recipe_for(self.section, recipe))

    def baselines(self, data: PreparedData, plan: Plan, model: nn.Module) -> Baselines | None:
        return self.student.baselines(data, plan, model)

    def check(self, task: Task) -> None:
        check_task(self.section, task)
        if task.name not in self.section.student.tasks:
            raise UserError(
                f"strategy.student.name: {self.section.student.name} is not for task: {task.name}; shrink a trained "
                "classifier, or name a smaller pretrained model"
            )

    def check_quantized(self) -> None:
        self.student.check_quantized()
        if self.section.shrink:
            raise UserError(
                "strategy.shrink: layers are left out of the model after it is loaded, so the trainable layers are unknown at "
                "load time; to quantize the teacher, name it under strategy.teacher with quantization, and remove "
                "model.quantization"
            )

    def check_wrapping(self, wrapping: str) -> None:
        wanted = self.section
        if wrapping in (FSDP, DEEPSPEED) and (wanted.on_policy or wanted.hidden):
            key, why = ("on_policy", "the student writes answers") if wanted.on_policy else ("hidden", "layers are compared")
            raise UserError(
                f"strategy.{key}: {why} within a step, which was not made to work where no process has the whole model; take "
                f"--accelerate-config ddp, or remove {key}"
            )
        self.student.check_wrapping(wrapping)

    def rewrite(self, data: PreparedData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, screen: Console) -> PreparedData:
        if self.section.level != "sequence":
            return data
        from hfstrat.strategies.distill.sequence import ask_to_write

        return ask_to_write(self.section, data, recipe, tokenizer, screen)

    def load_base(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> Base:
        from hfstrat.strategies.distill import teacher as distill_teacher
        from hfstrat.strategies.distill.loss import Mix
        from hfstrat.strategies.distill.shrink import shrunk
        from hfstrat.trainer.plan import steps_of

        with speaking(self.section):
            base = self.student.load_base(recipe_for(self.section, recipe), tokenizer, data)
        self.objective, wish = objective_of(recipe.task), self.section
        self.distiller = self.objective.distiller(Mix(wish.loss, wish.alpha, wish.temperature, wish.skew))
        if self.section.uses_teacher or self.section.level == "sequence":
            rows, wanted = len(data.train) if data else 0, recipe.training
            again = rows > 0 and steps_of(wanted, rows) * wanted.global_batch_size > rows
            self.teacher = distill_teacher.placed(wish, base, tokenizer, self.footprint, again)
            distill_teacher.check_length(self.teacher, data)
        if wish.shrink:
            base.model = shrunk(wish.shrink, base, data and data.train)
        return base

    def prepare_base(self, base: Base, data: TrainData) -> TrainData:
        if self.teacher is None:
            return data
        return replace(data, collate=self.distiller.collator(data.collate, self.teacher))

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat.strategies.distill.objective import student_of

        teacher, self.teacher = self.teacher, None
        return student_of(self.section, self.student, base, self.distiller, teacher)

    def asked(self, base: Base) -> list[Any]:
        return self.distiller.models_beside(base) if self.section.uses_teacher else []

    def prepare_data(self, data: TrainData, model: nn.Module) -> TrainData:
        if self.distiller.teacher is None:
            return data
        if self.section.uses_teacher and not self.section.on_policy:
            return self.objective.ask_once(data, self.distiller, self.section.cache)
        from hfstrat.strategies.distill import precompute

        if self.section.on_policy:
            return precompute.ask_anew(data, self.distiller, "the student writes other answers each time")
        judged, self.distiller.teacher = precompute.judge(data, self.distiller), None  # it has written, and is compared with
        return judged

    def build_trainer(self, **arguments: Any) -> StrategyTrainer:
        if self.distiller.loss is not None:
            arguments["compute_loss_func"] = self.distiller.loss
        if self.section.on_policy:
            from hfstrat.strategies.distill.on_policy import trainer_arguments

            arguments = trainer_arguments(self.section, self.distiller.teacher.model, arguments)
        return self.student.build_trainer(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.strategies.distill import hidden_loss

        hidden_loss.take_off(model)
        self.distiller.match = None
        self.student.finish(model, base)

    def compare(self, loaded: Loaded, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
        from hfstrat.strategies.distill.report import compare

        return compare(self.section, loaded, facts, folder) if "distillation" in facts else {}

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.student.save(trainer, folder, base)

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        return self.student.checkpoint_bytes(footprint)

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        return self.student.footprint(self._left(shapes), tied)

    def learning(self, shapes: Shapes, tied: bool) -> Learning:
        """A teacher that is not named is the original model itself; with an adapter it is the frozen base, loaded already."""
        found = self.student.learning(self._left(shapes), tied)._replace(keeps_prefix=False)
        if self.section.teacher is not None:
            theirs = read_shapes(Path(self.section.teacher.name_or_path).expanduser())
            return found._replace(teacher=sum(map(prod, theirs.values())))
        return found._replace(teacher=0 if found.rank else sum(map(prod, shapes.values())))

    def _left(self, shapes: Shapes) -> Shapes:
        return shapes if self.section.shrink is None else shapes_left(shapes, self.section.shrink)
