"""Distillation: a student is trained by another strategy to match a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.errors import UserError
from hfstrat.models.load import check_context, read_shapes
from hfstrat.recipe import distill as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies import checks
from hfstrat.strategies.base import Built, Prepared, Strategy
from hfstrat.strategies.description import Description, count
from hfstrat.strategies.distill.shrink import shrink_shapes
from hfstrat.strategies.distill.teacher import check_teacher
from hfstrat.strategies.full import Full
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.scratch import Scratch
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, FSDP

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData as Data
    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.load import Loaded
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.distill.loss import Mix
    from hfstrat.tasks.report import Result
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer


class Objective(NamedTuple):
    """The loss of a task's students, and the function that caches the outputs of their teacher."""

    distiller: Callable[[Mix], Any]
    cache_outputs: Callable[[TrainData, Any, section.Cache], TrainData]


def objective_of(task: str) -> Objective:
    from hfstrat.strategies.distill import classification, objective, precompute

    distillers = {
        "causal-lm": Objective(objective.Distiller, precompute.cache_outputs),
        "image-text-to-text": Objective(objective.Distiller, precompute.cache_outputs),
        "text-classification": Objective(classification.ClassDistiller, classification.cache_outputs),
        "image-classification": Objective(classification.ImageDistiller, classification.cache_outputs),
        "audio-classification": Objective(classification.AudioDistiller, classification.cache_outputs),
        "regression": Objective(classification.RegressionDistiller, classification.cache_outputs),
    }
    return distillers[task]


STUDENTS: dict[str, type[Strategy[Any]]] = {"full": Full, "lora": Lora, "partial": Partial, "scratch": Scratch}


class Distill(Strategy[section.Distill]):
    """A student is trained by another strategy, with a loss that contains the outputs of a frozen teacher."""

    objective: Objective
    distiller: Any  # the loss

    def __init__(self, section: section.Distill) -> None:
        super().__init__(section)
        student = section.student
        if student.name == "partial":  # its frozen part is not cached next to a teacher's outputs
            student = student.model_copy(update={"precompute": False})
        self.student = STUDENTS[student.name](student)
        self.teacher: PreTrainedModel | None = None  # until the distiller has it

    def check_task(self, task: Task) -> None:
        _check_task(self.section, task)
        with checks.inner_keys("student"):
            self.student.check_task(task)

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        self.check_task(TASKS[recipe.task])
        self._check_settings(recipe, wrapping)
        checks.check_quantization(recipe, self.describe)
        checks.check_adapters(recipe)
        check_teacher(self.section, self._of_student(recipe), network)
        with self._student_keys():
            self.student.check(self._of_student(recipe), wrapping, network)

    def _check_settings(self, recipe: Recipe, wrapping: str) -> None:
        wanted = self.section
        if recipe.training.class_weights is not None:
            raise UserError("training.class_weights: a student learns the classes as its teacher weighs them; remove it")
        if recipe.image.mixup:
            raise UserError(f"image.mixup: {recipe.image.mixup:g}: a student learns the classes of whole images; remove it")
        if recipe.image.precompute is True:
            raise UserError(
                "image.precompute: true: the teacher is given the images of each batch, and not the features of the student's "
                "vision tower; set auto or false"
            )
        if recipe.model.quantization is not None and wanted.shrink:
            raise UserError(
                "strategy.shrink: layers are left out of the model after it is loaded, so the trainable layers are unknown at "
                "load time; to quantize the teacher, name it under strategy.teacher with quantization, and remove "
                "model.quantization"
            )
        if wrapping in (FSDP, DEEPSPEED) and (wanted.on_policy or wanted.hidden_states):
            key, why = ("on_policy", "the student generates") if wanted.on_policy else ("hidden_states", "layers are matched")
            raise UserError(
                f"strategy.{key}: {why} within a step, which needs the full model on each process; use --accelerate-config "
                f"ddp, or remove {key}"
            )

    def shapes(self, recipe: Recipe, labels: int = 2) -> tuple[Shapes, bool] | None:
        with self._student_keys():
            return self.student.shapes(self._of_student(recipe), labels)

    def set_family(self, family: str, generates: bool) -> None:
        self.student.set_family(family, generates)

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        """A teacher that is not named is the original model itself; with an adapter it is the frozen base, loaded already."""
        with checks.inner_keys("student"):
            found = self.student.describe(shrink_shapes(shapes, self.section.shrink), tied)
        if self.section.teacher is not None:
            return found._replace(teacher=count(read_shapes(Path(self.section.teacher.name_or_path).expanduser())))
        return found._replace(teacher=0 if found.rank else count(shapes))

    def _of_student(self, recipe: Recipe) -> Recipe:
        """The recipe as the student reads it: a student with random weights by default has its teacher's tokenizer."""
        wanted, model = self.section, recipe.model
        if wanted.needs_weights:
            return recipe
        if wanted.teacher and model.tokenizer is None and not wanted.new_tokenizer:
            model = model.model_copy(update={"tokenizer": wanted.teacher.name_or_path})
        return recipe.model_copy(update={"model": model, "strategy": wanted.student})

    @contextmanager
    def _student_keys(self) -> Iterator[None]:
        """Messages name the keys of the student, and the teacher where the tokenizer is the teacher's."""
        teacher = self.section.teacher
        try:
            with checks.inner_keys("student"):
                yield
        except UserError as error:
            key = f"model.tokenizer: {teacher.name_or_path}" if teacher and not self.section.needs_weights else None
            if key is None or not str(error).startswith(key):
                raise
            raise UserError(str(error).replace("model.tokenizer", "strategy.teacher", 1)) from error.__cause__

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        with self._student_keys():
            found = self.student.load_tokenizer(self._of_student(recipe))
        if getattr(found, "precompute", False):  # of a vision-language model: the teacher is given the images themselves
            found.precompute = False  # type: ignore[attr-defined]
        return found

    def read(self, recipe: Recipe, screen: Console | None = None) -> tuple[PreTrainedTokenizerBase, Data]:
        tokenizer, data = super().read(recipe, screen)
        if self.section.seq_kd and screen is not None:
            from hfstrat.strategies.distill.sequence import generate_answers

            data = generate_answers(self.section, data, recipe, tokenizer, screen)
        return tokenizer, data

    def load(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data | None) -> Base:
        from hfstrat.strategies.distill import teacher as distill_teacher
        from hfstrat.strategies.distill.loss import Mix
        from hfstrat.strategies.distill.shrink import shrink_model
        from hfstrat.trainer.plan import several_epochs

        wanted = self.section
        with self._student_keys():
            base = self.student.load(self._of_student(recipe), tokenizer, data)
        self.objective = objective_of(recipe.task)
        self.distiller = self.objective.distiller(
            Mix(wanted.divergence, wanted.teacher_weight, wanted.temperature, wanted.skew)
        )
        if wanted.uses_teacher or wanted.seq_kd:
            rows = len(data.train) if data else 0
            several = rows > 0 and several_epochs(recipe.training, rows)
            self.teacher = distill_teacher.place_teacher(wanted, base, tokenizer, self.describe, several)
            if self.teacher is not None and data is not None:
                check_context(self.teacher, int(max(data.lengths.max(), data.eval_lengths.max())), "the teacher")
        if wanted.shrink:
            base.model = shrink_model(wanted.shrink, base, data and data.train)
        return base

    def build(self, base: Base, data: TrainData) -> Built:
        collate = data.collate if self.teacher is None else self.distiller.collator(data.collate, self.teacher)
        trained = self.build_model(base)
        others = self.distiller.other_models(base) if self.section.uses_teacher else []
        return Built(trained, replace(data, collate=collate), tuple(others))

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat.strategies.distill.objective import build_student

        teacher, self.teacher = self.teacher, None
        return build_student(self.section, self._build_student, base, self.distiller, teacher)

    def _build_student(self, base: Base) -> nn.Module:
        with checks.inner_keys("student"):
            return self.student.build_model(base)

    def prepare(self, model: nn.Module, data: TrainData) -> Prepared:
        with checks.inner_keys("student"):
            prepared = self.student.prepare(model, data)
        teacher = self.distiller.teacher
        if teacher is not None:
            prepared.data = self._with_teacher(prepared.data)
        if self.distiller.loss is not None:
            prepared.trainer_kwargs["compute_loss_func"] = self.distiller.loss
        if self.section.on_policy:
            from hfstrat.strategies.distill.on_policy import OnPolicyTrainer

            prepared.trainer_class = OnPolicyTrainer
            prepared.trainer_kwargs |= {"distill": self.section, "teacher_model": teacher.model}
        return prepared

    def _with_teacher(self, data: TrainData) -> TrainData:
        """The data with the teacher's outputs, where they are cached, and the teacher's own metrics."""
        from hfstrat.strategies.distill import precompute

        if self.section.on_policy:
            return precompute.compute_each_batch(data, self.distiller, "the answers of the student change in every step")
        if self.section.uses_teacher:
            return self.objective.cache_outputs(data, self.distiller, self.section.teacher_cache)
        data = precompute.evaluate_teacher(data, self.distiller)
        self.distiller.teacher = None  # it has generated the answers, and is not used any more
        return data

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.strategies.distill.objective import remove_projections

        remove_projections(model)
        self.distiller.match = None
        self.student.finish(model, base)

    def published(self, model: nn.Module, base: Base) -> nn.Module:
        return self.student.published(model, base)

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.student.save(trainer, folder, base)

    def after(self, loaded: Loaded, result: Result, folder: Path) -> dict[str, Any]:
        from hfstrat.strategies.distill.report import compare

        return compare(self.section, loaded, result, folder) if result.distillation else {}

    def sections(self, result: Result) -> list[Section]:
        from hfstrat.strategies.distill import page

        return [*page.sections(result), *self.student.sections(result)]

    def advice(self, result: Result) -> list[tuple[str, str]]:
        from hfstrat.strategies.distill import page

        return [*page.advice(result), *self.student.advice(result)]


OF_TEXTS = {  # keys for models of text alone, and why
    "shrink": "layers are left out of a model of one stack, and a vision-language model has two",
    "hidden_states": "layers of a model of one stack are matched, and a vision-language model has two",
    "seq_kd": "answers of the teacher are generated for prompts without images only",
    "on_policy": "answers of the student are generated for prompts without images only",
}


def _check_task(strategy: section.Distill, task: Task) -> None:
    """Refuse a student that does not support the task, and keys for language models. Raises UserError."""
    if task.name not in strategy.student.tasks:
        instead = "" if task.text.generates else "shrink a trained classifier, or "
        raise UserError(
            f"strategy.student.name: {strategy.student.name} is not for task: {task.name}; {instead}name a smaller pretrained "
            "model"
        )
    if task.text.generates:
        for key, reason in OF_TEXTS.items() if task.model.sees_images else ():
            if getattr(strategy, key):
                raise UserError(f"strategy.{key}: {reason}; remove it for task: {task.name}")
        return
    form = strategy.teacher_cache.form
    given = [key for key in ("divergence", "temperature", "skew") if key in strategy.model_fields_set]
    if given and not task.metrics.of_distributions:
        raise UserError(f"strategy.{given[0]}: numbers have no distribution: the loss is the squared error; remove it")
    cache_reason = f"{form} is for tokens; one output per text is cached exactly, so set auto or off"
    for key, is_given, reason in (
        ("on_policy", strategy.on_policy, f"a model for {task.name} generates no text; remove it"),
        ("seq_kd", strategy.seq_kd, f"a model for {task.name} generates no text; remove it"),
        ("hidden_states", strategy.hidden_states is not None, "layers can be matched for causal-lm only; remove it"),
        ("teacher_cache.form", form not in ("auto", "off"), cache_reason),
    ):
        if is_given:
            raise UserError(f"strategy.{key}: {reason}")
