"""Which keys of strategy distill go together. No torch: recipes are checked with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.strategies.lora import CHANGES_BASE

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hfstrat.strategies.distill import Distill
    from hfstrat.tasks import Task


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
