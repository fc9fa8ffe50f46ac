"""Which keys of strategy distill go together. No torch: recipes are checked with it.

A student that begins with random weights: what it reads of the recipe, and where its keys stand.

What learns in a student, and how large its teacher is: for predictions, without torch.

Distillation: a student learns what a frozen teacher says, by any other strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.errors import UserError
from hfstrat.models.load import read_shapes
from hfstrat.recipe.distill import Cache, LayerPairs, Shrink, TeacherModel
from hfstrat.recipe.section import Default, Shapes
from hfstrat.strategies.base import Footprint, Learning, Strategy
from hfstrat.strategies.distill.shrink import shapes_left
from hfstrat.strategies.full import Full
from hfstrat.strategies.lora import CHANGES_BASE, Lora
from hfstrat.strategies.partial import Partial
from hfstrat.strategies.scratch.strategy import Scratch
from hfstrat.trainer.distributed import DEEPSPEED, FSDP

if TYPE_CHECKING:
    import numpy as np
    from pydantic import BaseModel
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.load import Loaded
    from hfstrat.recipe.schema import Recipe
    from hfstrat.recipe.section import Shapes
    from hfstrat.strategies.base import Learning
    from hfstrat.strategies.distill.objective import Distiller
    from hfstrat.tasks.base import Task
    from hfstrat.trainer.baselines import Baselines
    from hfstrat.trainer.plan import Plan
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer


def check(strategy: Distill) -> None:
    """Raises ValueError with the key that does not fit, or that is missing."""
    _check_read(strategy)
    if strategy.level == "sequence" and strategy.hidden:
        raise ValueError("hidden: with level: sequence the teacher only writes; remove one of them")
    if strategy.student.name == "lora" and (strategy.shrink or strategy.hidden):
        what, reason = (
            ("shrink", "an adapter's base is a published model, and one with layers left out is none")
            if strategy.shrink
            else ("hidden", "its projections would not be in the checkpoints of an adapter")
        )
        raise ValueError(f"{what}: {reason}; take student full or partial")
    if strategy.teacher is None and getattr(strategy.student, "init_lora_weights", "").startswith(CHANGES_BASE):
        raise ValueError(
            f"student.init_lora_weights: {strategy.student.init_lora_weights} changes the weights of the base, which would be "  # type: ignore[union-attr]
            "the teacher; name a teacher, or take another initialisation"
        )
    if getattr(strategy.student, "precompute", None) == "on":
        raise ValueError("student.precompute: on: hidden states are not kept beside a teacher's answers; remove it")
    if getattr(strategy.student, "frozen_dropout", None) is False:
        raise ValueError("student.frozen_dropout: a student's forward is bound to its teacher; remove it")
    if not strategy.student.needs_weights:
        _check_random(strategy)
    if strategy.on_policy:
        _check_on_policy(strategy)


def changed(section: BaseModel) -> set[str]:
    """The keys with another value than their default: a resolved recipe, where every key stands, can be read again."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


def check_task(strategy: Distill, task: Task) -> None:
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


OF_THE_DIVERGENCE = ("alpha", "temperature", "loss", "skew", "cache")


def _check_read(strategy: Distill) -> None:
    """Refuse what is given and nothing reads. (`alpha: 0` is no such case: it is how the teacher is switched off.)"""
    given, kept = changed(strategy), changed(strategy.cache)
    if strategy.level == "sequence" and (odd := [key for key in OF_THE_DIVERGENCE if key in given]):
        raise ValueError(f"{odd[0]}: with level: sequence the teacher only writes, and nothing reads it; remove it")
    if strategy.on_policy and (odd := [key for key in ("alpha", "cache", "baseline") if key in given]):
        said = {
            "alpha": "on its own answers a student learns from the teacher alone",
            "cache": "the student writes other answers each time, so that none are kept",
            "baseline": "on its own answers there is nothing to learn without the teacher",
        }
        raise ValueError(f"{odd[0]}: {said[odd[0]]}; remove it")
    if "max_new_tokens" in given and not (strategy.on_policy or strategy.level == "sequence"):
        raise ValueError("max_new_tokens: nobody writes; it is for level: sequence and on_policy: true, remove it")
    if "skew" in given and strategy.loss != "skew_kl":
        raise ValueError(f"skew: it is of skew_kl, and loss is {strategy.loss}; remove it, or say loss: skew_kl")
    if "tokens" in kept and strategy.cache.form in ("hidden", "off"):
        raise ValueError(f"cache.tokens: form: {strategy.cache.form} keeps no tokens; remove it, or take sampled or top_k")
    form = strategy.cache.form
    if strategy.hidden and form not in ("auto", "off"):
        raise ValueError(f"cache.form: {form}, but hidden compares states of layers, which are not kept; remove one of them")
    if strategy.loss != "forward_kl" and form in ("sampled", "top_k"):
        raise ValueError(
            f"cache.form: {form} tells some tokens' probabilities, and {strategy.loss} needs all of them; take hidden, or "
            "loss: forward_kl"
        )
    if "budget" in kept and strategy.cache.form == "off":
        raise ValueError("cache.budget: form: off keeps nothing; remove it")


def makes_words(strategy: Distill) -> bool:
    """Whether the student gets a new tokenizer."""
    return getattr(strategy.student, "tokenizer", None) is not None


def _check_random(strategy: Distill) -> None:
    if strategy.teacher is None:
        raise ValueError("teacher: missing; a student with random weights has none of its own to learn from: name one")
    if strategy.shrink:
        raise ValueError("shrink: leaves layers out of a pretrained model, and this student is random; remove one of them")
    if makes_words(strategy) and strategy.level != "sequence":
        raise ValueError(
            "student: its tokenizer would be a new one, and the teacher's probabilities are of its own tokens; remove "
            "student.tokenizer (the teacher's is taken), or let the teacher write: level: sequence"
        )


def _check_on_policy(strategy: Distill) -> None:
    if strategy.level == "sequence":
        raise ValueError("level: with sequence the teacher writes the answers, with on_policy the student; remove one of them")
    if strategy.hidden:
        raise ValueError("hidden: TRL's DistillationTrainer compares no layers; remove it, or on_policy")
    if strategy.loss == "skew_kl":
        raise ValueError("loss: skew_kl is not in TRL's DistillationTrainer; take forward_kl, reverse_kl or jsd")
    if strategy.teacher is None and strategy.student.name == "lora":
        raise ValueError("teacher: missing; TRL's DistillationTrainer needs a model beside the student: name one")


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


def of_student(strategy: Distill, shapes: Shapes, tied: bool) -> Learning:
    """A teacher that is not named is the model itself as it was; with an adapter it is the frozen base, there already."""
    found = strategy.student.learning(shapes if strategy.shrink is None else shapes_left(shapes, strategy.shrink), tied)
    found = found._replace(keeps_prefix=False)
    if strategy.teacher is not None:
        theirs = read_shapes(Path(strategy.teacher.name_or_path).expanduser())
        return found._replace(teacher=sum(map(prod, theirs.values())))
    return found._replace(teacher=0 if found.rank else sum(map(prod, shapes.values())))


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
        check(self)
        return self

    def check_model(self, recipe: Recipe, network: bool) -> Footprint | None:
        from hfstrat.strategies.distill import check_teacher

        if self.student.needs_weights:
            footprint = super().check_model(recipe, network)
            check_teacher.check(self, recipe, network)
            return footprint
        recipe = recipe_for(self, recipe)
        check_teacher.check(self, recipe, network)
        with speaking(self):
            return self.student.check_model(recipe, network)

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        with speaking(self):
            return self.student.load_tokenizer(recipe_for(self, recipe))

    def models(self, recipe: Recipe) -> dict[str, Any]:
        return super().models(recipe) | ({"strategy.teacher": self.teacher} if self.teacher else {})

    def held_out(self, recipe: Recipe) -> np.ndarray | None:
        return self.student.held_out(recipe_for(self, recipe))

    def baselines(self, data: PreparedData, plan: Plan, model: nn.Module) -> Baselines | None:
        return self.student.baselines(data, plan, model)

    def check(self, task: Task) -> None:
        check_task(self, task)
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

    def rewrite(self, data: PreparedData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, screen: Console) -> PreparedData:
        if self.level != "sequence":
            return data
        from hfstrat.strategies.distill.sequence import ask_to_write

        return ask_to_write(self, data, recipe, tokenizer, screen)

    def load_base(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> Base:
        from hfstrat.strategies.distill import teacher as distill_teacher
        from hfstrat.strategies.distill.loss import Mix
        from hfstrat.strategies.distill.shrink import shrunk
        from hfstrat.trainer.plan import steps_of

        with speaking(self):
            base = self.student.load_base(recipe_for(self, recipe), tokenizer, data)
        base.beside[KEY] = base.task.distiller(Mix(self.loss, self.alpha, self.temperature, self.skew))
        if self.asks or self.level == "sequence":
            rows, wanted = len(data.train) if data else 0, recipe.training
            again = rows > 0 and steps_of(wanted, rows) * wanted.global_batch_size > rows
            base.beside["teacher"] = found = distill_teacher.placed(self, base, tokenizer, again)
            distill_teacher.check_length(found, data)
        if self.shrink:
            base.model = shrunk(self.shrink, base, data and data.train)
        return base

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat.strategies.distill.objective import student_of

        return student_of(self, base, base.beside[KEY], base.beside.pop("teacher", None))

    def asked(self, base: Base) -> list[Any]:
        teacher = base.beside[KEY].teacher if self.asks else None
        return [] if teacher is None or teacher.model is base.model else [teacher.model]

    def prepare_data(self, data: TrainData, model: nn.Module) -> TrainData:
        from hfstrat.models import fused_loss

        distiller: Any = fused_loss.objective_of(model)
        if distiller is None or distiller.teacher is None:
            return data
        if self.asks and not self.on_policy:
            return distiller.ask_once(data, self.cache)  # type: ignore[no-any-return]
        from hfstrat.strategies.distill import precompute

        if self.on_policy:
            return precompute.ask_anew(data, distiller, "the student writes other answers each time")
        judged, distiller.teacher = precompute.judge(data, distiller), None  # it has written, and is compared with
        return judged

    def build_trainer(self, **arguments: Any) -> StrategyTrainer:
        from hfstrat.models import fused_loss

        if loss := getattr(fused_loss.objective_of(arguments["model"]), "loss", None):
            arguments["compute_loss_func"] = loss
        if self.on_policy:
            from hfstrat.strategies.distill.on_policy import trainer_arguments

            teacher: Any = fused_loss.objective_of(arguments["model"]).teacher  # type: ignore[union-attr]
            arguments = trainer_arguments(self, teacher.model, arguments)
        return self.student.build_trainer(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.strategies.distill import hidden_loss

        hidden_loss.take_off(model)
        distiller: Distiller = base.beside[KEY]
        distiller.match = None
        self.student.finish(model, base)

    def compare(self, loaded: Loaded, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
        from hfstrat.strategies.distill.report import compare

        return compare(self, loaded, facts, folder) if "distillation" in facts else {}

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.student.save(trainer, folder, base)

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        return self.student.checkpoint_bytes(footprint)

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        from hfstrat.strategies.distill.shrink import shapes_left

        return self.student.footprint(shapes if self.shrink is None else shapes_left(shapes, self.shrink), tied)

    def learning(self, shapes: Shapes, tied: bool) -> Learning:

        return of_student(self, shapes, tied)
