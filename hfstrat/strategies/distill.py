"""Distillation: a student learns what a frozen teacher says, by any other strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.distillation import combinations, random_student
from hfstrat.errors import UserError
from hfstrat.strategies.base import Default, Footprint, Learning, Shapes, Strategy
from hfstrat.strategies.distill_section import Cache, LayerPairs, Shrink, TeacherModel
from hfstrat.strategies.full import Full
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.scratch import Scratch
from hfstrat.world import DEEPSPEED, FSDP

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hfstrat.bars import Bars
    from hfstrat.config import Recipe
    from hfstrat.data import Prepared
    from hfstrat.distillation.distill import Distiller
    from hfstrat.feed import Feed
    from hfstrat.loading import Loaded
    from hfstrat.model import Base
    from hfstrat.plan import Plan
    from hfstrat.tasks import Task
    from hfstrat.trainer import StrategyTrainer

Student = Full | Lora | Partial | Scratch
StudentName: Any = Literal[tuple(get_args(cls.model_fields["name"].annotation)[0] for cls in get_args(Student))]
KEY = "distiller"  # where the loss is kept beside the base


def _text(key: str, either: Any) -> BeforeValidator:
    """`student: full` and `teacher: some/id` say all there is to say."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=either)


class Distill(Strategy):
    """The loss is `alpha * T^2 * divergence from the teacher + (1 - alpha) * cross-entropy`, of rows that carry loss."""

    name: Literal["distill"]
    teacher: Annotated[TeacherModel | None, _text("name_or_path", TeacherModel | str | None)] = Field(
        None, description="Default: `model:` itself as it is before shrink, or with the adapter off"
    )
    student: Annotated[Student, Field(discriminator="name"), _text("name", Student | StudentName)] = Field(
        description="How the student learns: another strategy with its keys"
    )
    shrink: Shrink | None = Field(None, description="The student is `model:` with layers left out, or narrower ones")
    loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = Field(
        "forward_kl",
        description="Divergence: forward_kl (arXiv 1503.02531), reverse_kl (2306.08543), jsd, skew_kl (2402.03898)",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the teacher in the loss; the rest is cross-entropy")
    temperature: float = Field(1.0, gt=0, description="Of both distributions in the divergence; on_policy: of the drawing too")
    skew: float = Field(0.1, gt=0, lt=1, description="Share of the teacher in the mixture of skew_kl")
    level: Literal["token", "sequence"] = Field(
        "token", description="sequence: fine-tune on answers that the teacher writes (arXiv 1606.07947), asking it nothing else"
    )
    on_policy: bool = Field(
        False, description="Learn on answers that the student itself writes, by TRL's DistillationTrainer (arXiv 2306.13649)"
    )
    max_new_tokens: int = Field(256, ge=1, description="Length of an answer that teacher or student writes, at most")
    hidden: LayerPairs | None = Field(None, description="Bring layers together too")
    cache: Cache = Field(Cache(), description="How the teacher's answers are kept")
    baseline: bool | Literal["auto"] = Field(
        "auto", description="Train the same student without the teacher too, to compare; auto: if training took under 5 minutes"
    )

    @property
    def defaults(self) -> dict[str, Default]:  # type: ignore[override]
        return type(self.student).defaults

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        return self.student.needs_weights

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return not self.on_policy

    @property
    def unquantizable(self) -> str:  # type: ignore[override]
        return self.student.unquantizable.replace("strategy full", "student full")

    def learns_whole(self, names: list[str], tied: bool) -> set[str]:
        return self.student.learns_whole(names, tied)

    @property
    def asks(self) -> bool:
        """Whether there is anything to learn from the teacher."""
        return self.level == "token" and (self.alpha > 0 or self.hidden is not None)  # on_policy: alpha is not 0

    @model_validator(mode="after")
    def _fits_together(self) -> Distill:
        combinations.check(self)
        return self

    def check_model(self, recipe: Recipe, network: bool) -> Footprint | None:
        from hfstrat.distillation import preflight_teacher

        if self.student.needs_weights:
            footprint = super().check_model(recipe, network)
            preflight_teacher.check(self, recipe, network)
            return footprint
        recipe = random_student.recipe_for(self, recipe)
        preflight_teacher.check(self, recipe, network)
        with random_student.speaking(self):
            return self.student.check_model(recipe, network)

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        with random_student.speaking(self):
            return self.student.load_tokenizer(random_student.recipe_for(self, recipe))

    def models(self, recipe: Recipe) -> dict[str, Any]:
        return super().models(recipe) | ({"strategy.teacher": self.teacher} if self.teacher else {})

    def held_out(self, recipe: Recipe) -> np.ndarray | None:
        return self.student.held_out(random_student.recipe_for(self, recipe))

    def bars(self, data: Prepared, plan: Plan, model: nn.Module) -> Bars | None:
        return self.student.bars(data, plan, model)

    def check(self, task: Task) -> None:
        combinations.check_task(self, task)
        if task.name not in self.student.tasks:
            raise UserError(
                f"strategy.student.name: {self.student.name} is not for task: {task.name}; shrink a trained classifier, or "
                "name a smaller pretrained model"
            )

    def check_wrapping(self, wrapping: str) -> None:
        if wrapping in (FSDP, DEEPSPEED) and (self.on_policy or self.hidden):
            key, why = ("on_policy", "the student writes answers") if self.on_policy else ("hidden", "layers are compared")
            raise UserError(
                f"strategy.{key}: {why} within a step, which was not made to work where no process has the whole model; take "
                f"--accelerate-config ddp, or remove {key}"
            )
        self.student.check_wrapping(wrapping)

    def rewrite(self, data: Prepared, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, screen: Console) -> Prepared:
        if self.level != "sequence":
            return data
        from hfstrat.distillation.teacher_writes import ask_to_write

        return ask_to_write(self, data, recipe, tokenizer, screen)

    def load_base(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> Base:
        from hfstrat.distillation import teacher
        from hfstrat.distillation.distill_loss import Mix
        from hfstrat.distillation.shrink import shrunk
        from hfstrat.plan import steps_of

        with random_student.speaking(self):
            base = self.student.load_base(random_student.recipe_for(self, recipe), tokenizer, data)
        base.beside[KEY] = base.task.distiller(Mix(self.loss, self.alpha, self.temperature, self.skew))
        if self.asks or self.level == "sequence":
            rows, wanted = len(data.train) if data else 0, recipe.training
            again = rows > 0 and steps_of(wanted, rows) * wanted.global_batch_size > rows
            base.beside["teacher"] = found = teacher.placed(self, base, tokenizer, again)
            teacher.check_length(found, data)
        if self.shrink:
            base.model = shrunk(self.shrink, base, data and data.train)
        return base

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat.distillation.teaching import student_of

        return student_of(self, base, base.beside[KEY], base.beside.pop("teacher", None))

    def asked(self, base: Base) -> list[Any]:
        teacher = base.beside[KEY].teacher if self.asks else None
        return [] if teacher is None or teacher.model is base.model else [teacher.model]

    def prepare_data(self, data: Feed, model: nn.Module) -> Feed:
        from hfstrat import fused

        distiller: Any = fused.objective_of(model)
        if distiller is None or distiller.teacher is None:
            return data
        if self.asks and not self.on_policy:
            return distiller.ask_once(data, self.cache)  # type: ignore[no-any-return]
        from hfstrat.distillation import teacher_once

        if self.on_policy:
            return teacher_once.ask_anew(data, distiller, "the student writes other answers each time")
        judged, distiller.teacher = teacher_once.judge(data, distiller), None  # it has written, and is compared with
        return judged

    def build_trainer(self, **arguments: Any) -> StrategyTrainer:
        from hfstrat import fused

        if loss := getattr(fused.objective_of(arguments["model"]), "loss", None):
            arguments["compute_loss_func"] = loss
        if self.on_policy:
            from hfstrat.distillation.on_policy import trainer_arguments

            teacher: Any = fused.objective_of(arguments["model"]).teacher  # type: ignore[union-attr]
            arguments = trainer_arguments(self, teacher.model, arguments)
        return self.student.build_trainer(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.distillation import layer_match

        layer_match.take_off(model)
        distiller: Distiller = base.beside[KEY]
        distiller.match = None
        self.student.finish(model, base)

    def compare(self, loaded: Loaded, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
        from hfstrat.distillation.distill_report import compare

        return compare(self, loaded, facts, folder) if "distillation" in facts else {}

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.student.save(trainer, folder, base)

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        return self.student.checkpoint_bytes(footprint)

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        from hfstrat.distillation.shrink import shapes_left

        return self.student.footprint(shapes if self.shrink is None else shapes_left(shapes, self.shrink), tied)

    def learning(self, shapes: Shapes, tied: bool) -> Learning:
        from hfstrat.distillation.what_learns import of_student

        return of_student(self, shapes, tied)
