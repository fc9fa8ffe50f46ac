"""Distillation: a student learns what a frozen teacher says, by any other strategy."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.errors import UserError
from hfstrat.strategies.base import Default, Footprint, Shapes, Strategy
from hfstrat.strategies.distill_section import Cache, LayerPairs, Shrink, TeacherModel
from hfstrat.strategies.full import Full
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.config import Recipe
    from hfstrat.data import Prepared
    from hfstrat.distillation.distill import Distiller
    from hfstrat.feed import Feed
    from hfstrat.loading import Loaded
    from hfstrat.model import Base
    from hfstrat.trainer import StrategyTrainer

Student = Full | Lora | Partial
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
    shrink: Shrink | None = Field(None, description="The student is `model:` with layers left out")
    loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = Field(
        "forward_kl",
        description="Divergence: forward_kl (arXiv 1503.02531), reverse_kl (2306.08543), jsd, skew_kl (2402.03898)",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the teacher in the loss; the rest is cross-entropy")
    temperature: float = Field(1.0, gt=0, description="Of both distributions in the divergence")
    skew: float = Field(0.1, gt=0, lt=1, description="Share of the teacher in the mixture of skew_kl")
    level: Literal["token", "sequence"] = Field(
        "token", description="sequence: fine-tune on answers that the teacher writes (arXiv 1606.07947), asking it nothing else"
    )
    max_new_tokens: int = Field(256, ge=1, description="Length of an answer that the teacher writes, at most")
    hidden: LayerPairs | None = Field(None, description="Bring layers together too")
    cache: Cache = Field(Cache(), description="How the teacher's answers are kept")
    baseline: bool | Literal["auto"] = Field(
        "auto", description="Train the same student without the teacher too, to compare; auto: if training took under 5 minutes"
    )

    packs: ClassVar[bool] = False  # what the teacher says is kept by row

    @property
    def defaults(self) -> dict[str, Default]:  # type: ignore[override]
        return type(self.student).defaults

    @property
    def asks(self) -> bool:
        """Whether there is anything to learn from the teacher."""
        return self.level == "token" and (self.alpha > 0 or self.hidden is not None)

    @model_validator(mode="after")
    def _one_level(self) -> Distill:
        if self.level == "sequence" and self.hidden:
            raise ValueError("hidden: with level: sequence the teacher only writes; remove one of them")
        return self

    @model_validator(mode="after")
    def _can_be_saved(self) -> Distill:
        if self.student.name == "lora" and (self.shrink or self.hidden):
            what = "shrink" if self.shrink else "hidden"
            reason = (
                "an adapter's base is a published model, and one with layers left out is none"
                if self.shrink
                else "its projections would not be in the checkpoints of an adapter"
            )
            raise ValueError(f"{what}: {reason}; take student full or partial")
        return self

    def check_model(self, recipe: Recipe, network: bool) -> Footprint | None:
        from hfstrat.distillation import preflight_teacher

        footprint = super().check_model(recipe, network)
        preflight_teacher.check(self, recipe, network)
        return footprint

    def rewrite(self, data: Prepared, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, screen: Console) -> Prepared:
        if self.level != "sequence":
            return data
        import torch

        from hfstrat.distillation import teacher
        from hfstrat.distillation.teacher_writes import rewritten
        from hfstrat.model import compute_dtype
        from hfstrat.tasks import TASKS

        name = recipe.model.name_or_path
        section = self.teacher or TeacherModel(name_or_path=name, trust_remote_code=recipe.model.trust_remote_code)
        writer = teacher.load_teacher(section, TASKS[recipe.task], compute_dtype(recipe.model.dtype))
        if not writer.can_generate():
            raise UserError(f"strategy.level: sequence, but {section.name_or_path} writes no text; remove it")
        teacher.check_tokenizers(tokenizer, section, teacher.words_of(writer))
        writer.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        return rewritten(data, writer, tokenizer, self.max_new_tokens, recipe.data.max_length, screen)

    def load_base(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Prepared) -> Base:
        from hfstrat.distillation.distill_loss import Mix
        from hfstrat.distillation.shrink import drop_layers, kept_layers

        base = self.student.load_base(recipe, tokenizer, data)
        base.beside[KEY] = base.task.distiller(Mix(self.loss, self.alpha, self.temperature, self.skew))
        if self.asks:
            base.beside["teacher"] = self._teacher(base, tokenizer)
        if self.shrink:
            count = base.model.config.get_text_config().num_hidden_layers
            keep = kept_layers(self.shrink.layers, count)
            base.model = drop_layers(base.model, keep)
            base.say(f"student: layers {', '.join(map(str, keep))} of {count}")
        return base

    def _teacher(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        from hfstrat.distillation import teacher
        from hfstrat.model import read_shapes

        if self.teacher is None:
            return teacher.own_teacher(base, will_change=self.shrink is None and self.student.name != "lora")
        shapes = {name: tuple(p.shape) for name, p in base.model.named_parameters()}
        theirs = sum(map(prod, read_shapes(Path(self.teacher.name_or_path).expanduser()).values()))
        stays = self.cache.form == "off" or self.hidden is not None
        size = self.footprint(shapes, base.is_tied)
        teacher.check_room(theirs, size, stays, teacher.free_bytes(), self.teacher.name_or_path)
        found = teacher.load_teacher(self.teacher, base.task, base.compute_dtype)
        shared = min(teacher.words_of(found), teacher.words_of(base.model))
        teacher.check_tokenizers(tokenizer, self.teacher, shared)
        if found.get_input_embeddings().weight.shape[0] < len(tokenizer):
            raise UserError(
                f"strategy.teacher: {self.teacher.name_or_path} knows {found.get_input_embeddings().weight.shape[0]:,} tokens "
                f"and the student's tokenizer has {len(tokenizer):,}; remove model.add_tokens, or take another teacher"
            )
        return found

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat import fused
        from hfstrat.model import cast_weights, count_parameters

        distiller = base.beside[KEY]
        teacher: PreTrainedModel | None = base.beside.pop("teacher", None)
        fused.unbind_head_loss(base.model)
        if teacher is not None:
            if teacher is not base.model:
                cast_weights(teacher, base.compute_dtype)
            asked = self._wrapped(distiller, teacher, base)
        if reason := distiller.bind(base.model):
            raise UserError(f"strategy.student: this model cannot be distilled: {reason}")
        trained = self.student.build_model(base)
        if teacher is None:
            return trained
        ours, theirs = count_parameters(trained)[1], count_parameters(teacher)[1]
        if theirs < ours and teacher is not base.model:
            base.say(f"the teacher has {theirs:,} parameters, fewer than the student's {ours:,}: is it the other way round?")
        try:
            distiller.begin(asked, base, trained)
        except ValueError as error:
            raise UserError(f"strategy.teacher: it cannot be asked: {error}") from None
        if self.hidden:
            self._match_layers(base, distiller, teacher)
        return trained

    def _wrapped(self, distiller: Any, teacher: PreTrainedModel, base: Base) -> Any:
        """The teacher as it is asked; its head is looked at before anything is bound to it."""
        try:
            return distiller.frozen(teacher, is_own=teacher is base.model)
        except ValueError as error:
            raise UserError(f"strategy.teacher: it cannot be asked: {error}") from None

    def _match_layers(self, base: Base, distiller: Distiller, teacher: PreTrainedModel) -> None:
        from hfstrat.distillation import layer_match, layer_pairs

        assert self.hidden is not None
        if not distiller.matches_layers:
            raise UserError("strategy.hidden: layers are brought together for causal-lm only; remove it")
        ours, theirs = (model.config.get_text_config() for model in (base.model, teacher))
        counts = ours.num_hidden_layers, theirs.num_hidden_layers
        pairs = [(pair[0], pair[1]) for pair in self.hidden.layers] if self.hidden.layers else layer_pairs.even_pairs(*counts)
        layer_pairs.check_pairs(pairs, *counts)
        projections = None
        if ours.hidden_size != theirs.hidden_size:
            projections = layer_match.new_projections(len(pairs), ours.hidden_size, theirs.hidden_size)
            base.model.add_module(layer_match.NAME, projections)
        distiller.match = layer_match.LayerMatch(pairs, self.hidden.loss, self.hidden.weight, projections)

    def prepare_data(self, data: Feed, model: nn.Module) -> Feed:
        from hfstrat import fused

        distiller: Any = fused.objective_of(model)
        return distiller.ask_once(data, self.cache) if distiller is not None and distiller.is_on else data

    def build_trainer(self, **arguments: Any) -> StrategyTrainer:
        from hfstrat import fused

        if loss := getattr(fused.objective_of(arguments["model"]), "loss", None):
            arguments["compute_loss_func"] = loss
        return self.student.build_trainer(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.distillation import layer_match

        layer_match.take_off(model)
        distiller: Distiller = base.beside[KEY]
        distiller.match = None
        self.student.finish(model, base)

    def compare(self, loaded: Loaded, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
        from hfstrat.distillation.distill_report import compare

        return compare(self, loaded, facts, folder) if self.asks else {}

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.student.save(trainer, folder, base)

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        return self.student.checkpoint_bytes(footprint)

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        return self.student.footprint(self._shrunk(shapes), tied)

    def _shrunk(self, shapes: Shapes) -> Shapes:
        """The shapes that are left."""
        from hfstrat.depth import BLOCK
        from hfstrat.distillation.shrink import kept_layers, renamed

        if self.shrink is None:
            return shapes
        count = max((int(match.group(1)) for name in shapes if (match := BLOCK.search(name))), default=-1) + 1
        names = renamed(list(shapes), kept_layers(self.shrink.layers, count))
        return {new: shapes[old] for old, new in names.items()}
