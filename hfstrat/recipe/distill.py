"""The section of `strategy: {name: distill}`: its parts, and which of its keys go together. Configuration only."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from hfstrat.errors import UserError
from hfstrat.recipe.section import Default, FromName, Quantization, Section, from_text
from hfstrat.recipe.strategies import ALL_TASKS, Full, Lora, NewTokenizer, Partial, Scratch, StrategySection

SIZES = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class TeacherModel(Section):
    """The frozen model whose outputs the student is trained on. It is not part of the result."""

    name_or_path: str = Field(min_length=1, description="Hub id or local folder of the teacher")
    revision: str | None = Field(None, description="Branch, tag or commit of the teacher on the Hub")
    quantization: Annotated[Quantization | None, FromName] = Field(
        None, description="The teacher's linear layers in 8 or 4 bits: int8, nf4 or fp4, or a mapping with name"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the teacher")

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`, for the model as for its processor."""
        return {"trust_remote_code": self.trust_remote_code} | ({"revision": self.revision} if self.revision else {})


class Shrink(Section):
    """The student is `model:` with layers left out, narrower ones, or both."""

    layers: int | list[int] | None = Field(
        None, description="Number of layers to keep (evenly spaced, including the first and the last), or their numbers from 0"
    )
    intermediate_size: int | None = Field(
        None, ge=1, description="Number of channels to keep in each MLP: those with the highest activation on training examples"
    )

    @field_validator("layers")
    @classmethod
    def _some(cls, value: int | list[int] | None) -> int | list[int] | None:
        if value is not None and (not value or (isinstance(value, int) and value < 1)):
            raise ValueError("expected at least one layer")
        return value

    @model_validator(mode="after")
    def _anything(self) -> Shrink:
        if self.layers is None and self.intermediate_size is None:
            raise ValueError("expected layers, such as layers: 6, or intermediate_size")
        return self


class LayerPairs(Section):
    """A loss that matches hidden states of the student to those of the teacher (arXiv 1909.10351)."""

    loss: Literal["mse", "cosine"] = Field("mse", description="Mean squared error, or 1 - cosine similarity")
    weight: float = Field(1.0, gt=0, description="Factor of this loss in the sum")
    layers: list[list[int]] | None = Field(
        None, description="Pairs of a student and a teacher layer, from 0; default: every student layer, evenly spaced"
    )

    @field_validator("layers")
    @classmethod
    def _pairs(cls, value: list[list[int]] | None) -> list[list[int]] | None:
        if value is not None and (not value or any(len(pair) != 2 for pair in value)):
            raise ValueError("expected a list of pairs of a student and a teacher layer, such as [[0, 1], [1, 3]]")
        return value


class Cache(Section):
    """How the teacher's outputs are cached, so that it runs once for all epochs."""

    form: Literal["auto", "off", "hidden", "sampled", "top_k"] = Field(
        "auto",
        description="hidden: exact, 2 bytes per unit; sampled: sampled tokens; top_k: the likeliest tokens; auto: what fits",
    )
    tokens: int = Field(50, ge=1, description="Tokens per position that sampled draws or top_k keeps")
    budget: str = Field("10GB", description="Maximum disk space of the cache, such as 500MB")

    @field_validator("budget", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        size_of(value if isinstance(value, str) else "")
        return value

    @property
    def bytes(self) -> float:
        return size_of(self.budget)


def size_of(text: str) -> float:
    """'500MB' in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", text.strip().upper())
    if match is None:
        raise ValueError("expected a size such as 500MB or 10GB")
    return float(match[1]) * SIZES[match[2]]


def even_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Each student layer with the last layer of the part of the teacher that it corresponds to."""
    return [(layer, round((layer + 1) * teacher / student) - 1) for layer in range(student)]


def check_pairs(pairs: list[tuple[int, int]], student: int, teacher: int) -> None:
    """Raises UserError for a layer that does not exist."""
    for given in pairs:
        for layer, count, who in zip(given, (student, teacher), ("student", "teacher"), strict=True):
            if not 0 <= layer < count:
                raise UserError(
                    f"strategy.hidden_states.layers: {list(given)}: the {who} has no layer {layer}; expected a number from 0 "
                    f"to {count - 1}"
                )


Student = Annotated[Full | Lora | Partial | Scratch, Field(discriminator="name")]
StudentName = Literal["full", "lora", "partial", "scratch"]


class Distill(StrategySection):
    """The loss is `w * T^2 * divergence + (1 - w) * cross-entropy` over supervised tokens, with w = teacher_weight."""

    name: Literal["distill"]
    caches_tower: ClassVar[bool] = False  # the teacher is given the pixels
    refuses: ClassVar[dict[str, str]] = {
        "object-detection": "the queries of a student and of a teacher find objects in no common order, so their outputs "
        "cannot be compared one by one; train the student with full or partial",
    }
    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS
    teacher: Annotated[TeacherModel | None, from_text("name_or_path", TeacherModel | str | None)] = Field(
        None, description="Default: `model:` itself before shrink, or with its adapter disabled"
    )
    student: Annotated[Student, from_text("name", Student | StudentName)] = Field(
        description="How the student is trained: another strategy with its keys"
    )
    shrink: Shrink | None = Field(None, description="The student is `model:` with layers left out, or narrower ones")
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = Field(
        "forward_kl",
        description="Divergence: forward_kl (arXiv 1503.02531), reverse_kl (2306.08543), jsd, skew_kl (2402.03898)",
    )
    teacher_weight: float = Field(0.5, ge=0, le=1, description="Share of the teacher in the loss; the rest is cross-entropy")
    temperature: float = Field(
        1.0, gt=0, description="Of both distributions in the divergence; with on_policy also of the sampling"
    )
    skew: float = Field(0.1, gt=0, lt=1, description="Share of the teacher in the mixture of skew_kl")
    seq_kd: bool = Field(
        False,
        description="Sequence-level distillation: fine-tune on answers that the teacher generates (arXiv 1606.07947), "
        "without its logits",
    )
    on_policy: bool = Field(
        False,
        description="Train on answers that the student itself generates, with TRL's DistillationTrainer (arXiv 2306.13649)",
    )
    max_new_tokens: int = Field(256, ge=1, description="Maximum length of an answer that teacher or student generates")
    hidden_states: LayerPairs | None = Field(None, description="Match hidden states of layers too")
    teacher_cache: Cache = Field(Cache(), description="How the teacher's outputs are cached")
    baseline: bool | Literal["auto"] = Field(
        "auto",
        description="Also train the same student without the teacher, to compare; auto: if training took under 5 minutes",
    )

    single_run: ClassVar[tuple[str, ...]] = ("strategy.baseline=false",)

    @property
    def needs_weights(self) -> bool:
        return self.student.needs_weights

    @property
    def unstreamable(self) -> str:
        return "strategy.name: distill: the teacher is run over all examples before training"

    @property
    def packs(self) -> bool:
        return not self.on_policy

    @property
    def unquantizable(self) -> str:
        return self.student.unquantizable

    @property
    def new_tokenizer(self) -> NewTokenizer | None:
        return self.student.new_tokenizer

    @property
    def adapters(self) -> dict[str, str]:
        return {key.replace("strategy", "strategy.student", 1): name for key, name in self.student.adapters.items()}

    @property
    def models(self) -> dict[str, Any]:
        return {} if self.teacher is None else {"strategy.teacher": self.teacher}

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss of training contains outputs of the teacher."""
        return not self.seq_kd and (self.teacher_weight > 0 or self.hidden_states is not None)  # on_policy: it is not 0

    def training_defaults(self) -> dict[str, Default]:
        return self.student.training_defaults()

    @model_validator(mode="after")
    def _fits_together(self) -> Distill:
        _check_read(self)
        if self.seq_kd and self.hidden_states:
            raise ValueError("hidden_states: with seq_kd the teacher only generates text; remove one of them")
        if isinstance(self.student, Scratch):
            _check_random(self, self.student)
        if isinstance(self.student, Lora):
            _check_lora(self, self.student)
        if isinstance(self.student, Partial):
            _check_partial(self.student)
        if self.on_policy:
            _check_on_policy(self)
        return self


def changed(section: BaseModel) -> set[str]:
    """The keys whose values differ from their defaults, so that a resolved recipe with every key set can be read again."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


OF_THE_DIVERGENCE = ("teacher_weight", "temperature", "divergence", "skew", "teacher_cache")


def _check_read(strategy: Distill) -> None:
    """Refuse keys that nothing reads. (`teacher_weight: 0` is allowed: it switches the teacher off.)"""
    given, kept = changed(strategy), changed(strategy.teacher_cache)
    if strategy.seq_kd and (unused := [key for key in OF_THE_DIVERGENCE if key in given]):
        raise ValueError(f"{unused[0]}: with seq_kd the teacher only generates text, so this key has no effect; remove it")
    if strategy.on_policy and (unused := [key for key in ("teacher_weight", "teacher_cache", "baseline") if key in given]):
        reasons = {
            "teacher_weight": "with on_policy the loss is the divergence from the teacher alone",
            "teacher_cache": "with on_policy the answers of the student change in every step, so nothing can be cached",
            "baseline": "with on_policy there is no loss without the teacher",
        }
        raise ValueError(f"{unused[0]}: {reasons[unused[0]]}; remove it")
    if "max_new_tokens" in given and not (strategy.on_policy or strategy.seq_kd):
        raise ValueError("max_new_tokens: no text is generated; it is for seq_kd: true and on_policy: true, so remove it")
    if "skew" in given and strategy.divergence != "skew_kl":
        raise ValueError(f"skew: it is for divergence: skew_kl, given {strategy.divergence}; remove it, or set skew_kl")
    if "tokens" in kept and strategy.teacher_cache.form in ("hidden", "off"):
        raise ValueError(
            f"teacher_cache.tokens: form: {strategy.teacher_cache.form} stores no tokens; remove it, or set sampled or top_k"
        )
    form = strategy.teacher_cache.form
    if strategy.hidden_states and form not in ("auto", "off"):
        raise ValueError(f"teacher_cache.form: {form}: what `hidden_states` compares is not cached; remove one of them")
    if strategy.divergence != "forward_kl" and form in ("sampled", "top_k"):
        raise ValueError(
            f"teacher_cache.form: {form} stores the probabilities of some tokens, and {strategy.divergence} needs all of "
            "them; set form: hidden, or divergence: forward_kl"
        )
    if "budget" in kept and strategy.teacher_cache.form == "off":
        raise ValueError("teacher_cache.budget: form: off stores nothing; remove it")


def _check_lora(strategy: Distill, student: Lora) -> None:
    if strategy.shrink or strategy.hidden_states:
        what, reason = (
            ("shrink", "the base of an adapter has to be a published model, which the smaller one is not")
            if strategy.shrink
            else ("hidden_states", "the checkpoints of an adapter would not contain its projections")
        )
        raise ValueError(f"{what}: {reason}; set student: full or partial")
    if strategy.teacher is None and student.changes_base:
        raise ValueError(
            f"student.init_lora_weights: {student.init_lora_weights} changes the weights of the base model, which is "
            "the teacher here; set teacher, or another initialization"
        )


def _check_partial(student: Partial) -> None:
    if student.precompute is True:
        raise ValueError("student.precompute: true: hidden states are not cached next to a teacher's outputs; remove it")
    if not student.frozen_dropout:
        raise ValueError("student.frozen_dropout: false is not supported for a student; remove it")


def _check_random(strategy: Distill, student: Scratch) -> None:
    if strategy.teacher is None:
        raise ValueError("teacher: missing; a student with random weights cannot be its own teacher, so name one")
    if strategy.shrink:
        raise ValueError(
            "shrink: it removes layers of a pretrained model, and this student has random weights; remove one of them"
        )
    if student.tokenizer and not strategy.seq_kd:
        raise ValueError(
            "student: with a new tokenizer the teacher's probabilities would be for other tokens; remove student.tokenizer "
            "(that of the teacher is used), or set seq_kd: true"
        )


def _check_on_policy(strategy: Distill) -> None:
    if strategy.seq_kd:
        raise ValueError(
            "seq_kd: true trains on answers of the teacher, and on_policy on answers of the student; remove one of them"
        )
    if strategy.hidden_states:
        raise ValueError("hidden_states: TRL's DistillationTrainer does not match hidden states; remove it, or on_policy")
    if strategy.divergence == "skew_kl":
        raise ValueError("divergence: TRL's DistillationTrainer has no skew_kl; set forward_kl, reverse_kl or jsd")
    if strategy.teacher is None and strategy.student.name == "lora":
        raise ValueError("teacher: missing; TRL's DistillationTrainer needs a model other than the student, so name one")
