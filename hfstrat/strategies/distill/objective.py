"""The loss of a student that is a language model: the outputs of its teacher, matched layers, and binding both to the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hfstrat.errors import UserError
from hfstrat.models import fused_loss
from hfstrat.models.chunked_loss import Head, head_scores
from hfstrat.models.fused_loss import (
    HeadLossOutput,
    LossCall,
    call_body,
    call_with_weight,
    is_plain,
    last_hidden,
    logits_of_module,
    scores_of_logits,
)
from hfstrat.models.load import Base, cast_weights, count_parameters
from hfstrat.recipe.distill import Distill, LayerPairs, check_pairs, even_pairs
from hfstrat.strategies.distill.loss import (
    Mix,
    Teacher,
    distill_loss,
    distill_loss_of_logits,
    distill_scores,
    distill_scores_of_logits,
)
from hfstrat.strategies.distill.teacher import check_sizes

NOT_COMPUTED = "strategy.teacher: its outputs cannot be computed"
NAME = "distill_projections"  # of a trainable submodule that is not saved


class LayerMatch:
    """The mean squared or cosine distance of pairs of layers, summed over positions.

    Args:
        pairs: indices of a student and a teacher layer, from 0.
        kind: `mse` is the mean over the width; `cosine` is 1 - cosine.
        weight: factor of the mean over pairs.
        projections: `[H, H']` for each pair, from the student's width to the teacher's; None if both are equal.
    """

    def __init__(
        self, pairs: list[tuple[int, int]], kind: Literal["mse", "cosine"], weight: float, projections: nn.ParameterList | None
    ) -> None:
        self.pairs, self.kind, self.weight, self.projections = pairs, kind, weight, projections

    def __call__(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
        """The summed loss; each list has the embeddings first, then the hidden states of each layer `[n, H]`, the last one
        after the final norm."""
        total = torch.zeros((), device=ours[0].device)
        for index, (student, teacher) in enumerate(self.pairs):
            made, wanted = ours[student + 1], theirs[teacher + 1]
            if self.projections is not None:
                made = made @ self.projections[index].to(made.dtype)
            made, wanted = (one.float() if one.dtype.itemsize < 4 else one for one in (made, wanted))
            if self.kind == "mse":
                total = total + functional.mse_loss(made, wanted, reduction="none").mean(-1).sum()
            else:
                total = total + (1 - functional.cosine_similarity(made, wanted, dim=-1)).sum()
        return total * (self.weight / len(self.pairs))


def match_layers(options: LayerPairs, base: Base, distiller: Any, teacher: PreTrainedModel) -> None:
    """Add a loss that matches layers, with projections if the widths differ. Raises UserError for a layer that is missing."""
    ours, theirs = (model.config.get_text_config() for model in (base.model, teacher))
    counts = ours.num_hidden_layers, theirs.num_hidden_layers
    pairs = [(pair[0], pair[1]) for pair in options.layers] if options.layers else even_pairs(*counts)
    check_pairs(pairs, *counts)
    projections = None
    if ours.hidden_size != theirs.hidden_size:
        projections = new_projections(len(pairs), ours.hidden_size, theirs.hidden_size)
        base.model.add_module(NAME, projections)
    distiller.match = LayerMatch(pairs, options.loss, options.weight, projections)


def new_projections(count: int, student: int, teacher: int) -> nn.ParameterList:
    """Orthogonal, in float32; `[student, teacher]` each."""
    return nn.ParameterList(nn.init.orthogonal_(torch.empty(student, teacher)) for _ in range(count))


def remove_projections(model: Any) -> None:
    """Remove the projections, which are not saved; does nothing if there are none."""
    for module in model.modules():
        if NAME in module._modules:
            del module._modules[NAME]


COLUMNS = ("teacher_hidden", "teacher_ids", "teacher_weights", "teacher_entropy", "teacher_logprobs")


class FrozenTeacher:
    """A teacher in evaluation mode, without gradients.

    It is not a submodule of the student, so it is in no optimizer, wrapper or checkpoint. Create it before anything is bound to
    or wrapped around the model, since its head is inspected.

    Args:
        model: the teacher; or the student's own base, then `adapted` is the PEFT model around it, whose adapter is disabled
            while it runs.
    """

    def __init__(self, model: PreTrainedModel, is_own: bool = False) -> None:
        self.model = model
        self.adapted: Any = None
        self.scale, self.softcap = find_head_scaling(model)
        self._linear: Any = model.get_output_embeddings()
        if not is_own:
            model.requires_grad_(False).eval()

    @property
    def head(self) -> Head:
        return Head.of(self._linear, self.softcap, self.scale)

    @torch.no_grad()
    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor, all_layers: bool = False) -> Any:
        """The last hidden states `[n, H]` at these positions; with `all_layers` also those of each layer, embeddings first."""
        if next(self.model.parameters()).device != rows.device:
            self.model.to(rows.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.adapted.disable_adapter() if self.adapted is not None else nullcontext():
                return (hidden_states_of if all_layers else last_hidden)(self.model, args, kwargs, rows)
        finally:
            self.model.train(was_training)


def hidden_states_of(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last hidden states, and those of each layer with the embeddings first, `[n, H]` each."""
    out = call_body(model, args, kwargs, output_hidden_states=True)
    last, *layers = (states.flatten(0, 1).index_select(0, rows) for states in (out.last_hidden_state, *out.hidden_states))
    return last, layers


def find_head_scaling(model: PreTrainedModel) -> tuple[float, float | None]:
    """The scale and soft-capping of a model's head, checked against its own logits.

    Raises ValueError: the reason why its logits are not those of its head.
    """
    if reason := fused_loss.bind_head_loss(model):
        raise ValueError(reason)
    bound: Any = model.forward
    fused_loss.unbind_head_loss(model)
    return bound.scale, bound.softcap


class Distiller:
    """The loss of a student (a `fused_loss.Objective`): divergence from its teacher, cross-entropy, and matched layers.

    Args:
        mix: the loss of a position.
        teacher: None if its outputs are cached, or not used (`teacher_weight` 0).
        match: the loss of matched layers.
    """

    loss = None  # the loss is computed in the model's forward

    def __init__(self, mix: Mix, teacher: FrozenTeacher | None = None, match: LayerMatch | None = None) -> None:
        self.mix, self.teacher, self.match = mix, teacher, match
        self.head: Head | None = None  # of a teacher whose hidden states are cached
        self.width = 0  # tokens that both vocabularies share
        self.is_active = False

    def bind(self, model: PreTrainedModel) -> str | None:
        """Bind to the model; returns the reason if that is not possible."""
        return fused_loss.bind_head_loss(model, self)

    def collator(self, collate: Any, teacher: PreTrainedModel) -> Any:
        """The collator of the batches that student and teacher are given."""
        return collate

    def other_models(self, base: Base) -> list[PreTrainedModel]:
        """The models that are given the student's batches, its own base excluded."""
        return [] if self.teacher is None or self.teacher.model is base.model else [self.teacher.model]

    def freeze(self, teacher: PreTrainedModel, is_own: bool) -> FrozenTeacher:
        """The frozen teacher. Raises ValueError with the reason if that is not possible."""
        return FrozenTeacher(teacher, is_own)

    def set_teacher(self, teacher: FrozenTeacher, base: Base, trained: Any) -> None:
        """Use this teacher from now on."""
        if teacher.model is base.model:
            teacher.adapted = trained
        ours = base.model.get_output_embeddings().weight.shape[0]
        self.teacher, self.width, self.is_active = teacher, min(ours, teacher.head.weight.shape[0]), True

    def __call__(self, model: PreTrainedModel, call: LossCall) -> HeadLossOutput:
        cached = {name.removeprefix("teacher_"): call.kwargs.pop(name) for name in COLUMNS if name in call.kwargs}
        if not self.is_active:
            return fused_loss.cross_entropy(model, call)
        teacher, theirs = self._teacher_outputs(cached, call)
        if theirs is None or self.match is None:
            return self._output(model, last_hidden(model, call.args, call.kwargs, call.rows), teacher, call)
        hidden, ours = hidden_states_of(model, call.args, call.kwargs, call.rows)
        output = self._output(model, hidden, teacher, call)
        if torch.is_grad_enabled() and output.total is not None:
            output.total = output.total + self.match(ours, theirs)
        return output

    def _teacher_outputs(self, cached: dict[str, Any], call: LossCall) -> tuple[Teacher, list[torch.Tensor] | None]:
        """The teacher's outputs, from the batch or from its forward pass, and its hidden states if layers are matched."""
        if "hidden" in cached:
            assert self.head is not None
            self.head = self.head.map(lambda one: one.to(call.rows.device))
            return Teacher(self.width, cached["hidden"], self.head), None
        if cached:
            return Teacher(self.width, **cached), None
        assert self.teacher is not None, "no teacher, and no cached outputs in the batch"
        found = self.teacher.hidden(call.args, call.kwargs, call.rows, all_layers=self.match is not None)
        last, layers = found if self.match is not None else (found, None)
        return Teacher(self.width, last, self.teacher.head), layers

    def _output(self, model: PreTrainedModel, hidden: torch.Tensor, teacher: Teacher, call: LossCall) -> HeadLossOutput:
        layer: Any = model.get_output_embeddings()
        mix, targets = self.mix, call.targets
        if not is_plain(layer):  # as one with an adapter: logits are materialized
            logits = logits_of_module(layer, hidden, call)
            scores = scores_of_logits(logits.detach(), targets)
            kl = distill_scores_of_logits(logits.detach(), teacher, mix.temperature)
            total = distill_loss_of_logits(logits, targets, teacher, mix) if torch.is_grad_enabled() else scores.total
            return HeadLossOutput(total=total, nll=scores.nll, correct=scores.correct, kl=kl)

        def compute(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, Any, Any, Any]:
            head = Head(weight, bias, call.softcap, call.scale)
            if torch.is_grad_enabled() and model.training:
                return distill_loss(rows, head, targets, teacher, mix), None, None, None
            nll, correct = head_scores(rows, head, targets)
            kl = distill_scores(rows, head, teacher, mix.temperature)
            total = distill_loss(rows, head, targets, teacher, mix) if torch.is_grad_enabled() else nll.sum()
            return total, nll, correct, kl

        total, nll, correct, kl = call_with_weight(layer, hidden, compute)
        return HeadLossOutput(total=total, nll=nll, correct=correct, kl=kl)


def build_student(
    strategy: Distill, build: Callable[[Base], nn.Module], base: Base, distiller: Any, teacher: PreTrainedModel | None
) -> nn.Module:
    """The model to train, with the distiller's loss bound to it.

    Args:
        build: from the base model to the model to train.
        distiller: the loss; it gets the teacher.
        teacher: None if there is none.

    Raises:
        UserError: a forward pass that the loss cannot be bound to, or two models that do not fit.
    """
    fused_loss.unbind_head_loss(base.model)
    frozen: Any = None
    if teacher is not None:
        if teacher is not base.model:
            cast_weights(teacher, base.compute_dtype)
        try:
            frozen = distiller.freeze(teacher, is_own=teacher is base.model)
        except ValueError as error:
            if strategy.uses_teacher:
                raise UserError(f"{NOT_COMPUTED}: {error}") from None
            teacher = None  # it has generated answers only
    if reason := distiller.bind(base.model):
        raise UserError(f"strategy.student: this model cannot be distilled: {reason}")
    trained = build(base)
    if teacher is None:
        return trained
    ours, theirs = count_parameters(trained)[1], count_parameters(teacher)[1]
    if theirs < ours and teacher is not base.model:
        base.say(f"the teacher has {theirs:,} parameters, fewer than the student's {ours:,}; check that they are not swapped")
    try:
        distiller.set_teacher(frozen, base, trained)
        distiller.is_active = strategy.uses_teacher
    except ValueError as error:
        raise UserError(f"{NOT_COMPUTED}: {error}") from None
    if strategy.on_policy:
        from hfstrat.strategies.distill.on_policy import REMARK

        check_sizes(*(model.config.get_text_config().vocab_size for model in (base.model, teacher)))
        base.say(f"{'teacher':<9} {REMARK}")
    if strategy.hidden_states:
        match_layers(strategy.hidden_states, base, distiller, teacher)
    return trained
