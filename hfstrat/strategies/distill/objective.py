"""The student's forward with its teacher: what the teacher says about each row, and the loss of that.

A student that is bound to its teacher: who is asked, on what, and what learns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfstrat.errors import UserError
from hfstrat.models import fused_loss
from hfstrat.models.chunked_loss import Head, head_scores
from hfstrat.models.fused_loss import HeadLossOutput, is_plain, last_hidden, within
from hfstrat.models.load import cast_weights, count_parameters
from hfstrat.strategies.distill import hidden_loss
from hfstrat.strategies.distill.hidden_loss import LayerMatch
from hfstrat.strategies.distill.loss import (
    Mix,
    Teacher,
    distill_loss,
    distill_loss_of_logits,
    distill_scores,
    distill_scores_of_logits,
)
from hfstrat.strategies.distill.teacher import check_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from hfstrat.models.load import Base
    from hfstrat.recipe.distill import Distill


COLUMNS = ("teacher_hidden", "teacher_ids", "teacher_weights", "teacher_entropy", "teacher_logprobs")


class FrozenTeacher:
    """A model that only says what it thinks: in evaluation mode, without gradients, out of the student's sight.

    It is no module of the student's, so no optimiser, wrapper or checkpoint finds it.

    Its head is looked at here, so it has to be made before anything is bound to or wrapped around the model.

    Args:
        model: the teacher; or the student's own base, then `adapted` is the PEFT model around it, to be set before it is
            asked: its adapter is off while it teaches.
    """

    def __init__(self, model: PreTrainedModel, is_own: bool = False) -> None:
        self.model = model
        self.adapted: Any = None
        self.scale, self.softcap = proven_head(model)
        self._linear: Any = model.get_output_embeddings()
        if not is_own:
            model.requires_grad_(False).eval()

    @property
    def head(self) -> Head:
        bias = self._linear.bias
        return Head(self._linear.weight.detach(), None if bias is None else bias.detach(), self.softcap, self.scale)

    @torch.no_grad()
    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor, all_layers: bool = False) -> Any:
        """Last hidden states `[n, H]` of these rows; with `all_layers` also each layer's, the embeddings first."""
        if next(self.model.parameters()).device != rows.device:
            self.model.to(rows.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.adapted.disable_adapter() if self.adapted is not None else nullcontext():
                if not all_layers:
                    return last_hidden(self.model, args, kwargs).flatten(0, 1).index_select(0, rows)
                return layers_of(self.model, args, kwargs, rows)
        finally:
            self.model.train(was_training)


def layers_of(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Last hidden states and those of each layer, `[n, H]` each; the first of these are the embeddings."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None and name not in fused_loss.OF_THE_HEAD}
    out = model.base_model(*args, **kwargs, output_hidden_states=True, use_cache=False, return_dict=True)
    pick = [states.flatten(0, 1).index_select(0, rows) for states in out.hidden_states]
    return out.last_hidden_state.flatten(0, 1).index_select(0, rows), pick


def proven_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """The scale and soft-capping of a model's head, as a comparison with its own logits proves them.

    Raises:
        ValueError: why its logits are not those of its head.
    """
    found: dict[str, Any] = {}

    def remember(*given: Any) -> HeadLossOutput:
        found["scale"], found["softcap"] = given[-2:]
        return fused_loss.cross_entropy(*given)

    if reason := fused_loss.bind_head_loss(model, remember):
        raise ValueError(reason)
    fused_loss.unbind_head_loss(model)
    return found["scale"], found["softcap"]


class Distiller:
    """What is minimised (`fused.Objective`) by a student: its teacher's divergence, cross-entropy, and layers if asked.

    Args:
        mix: the loss of a row.
        teacher: None while the rows bring along what it said, or where it is not asked (`alpha` 0).
        match: layers to bring together.
    """

    loss = None  # it is the model's own

    def __init__(self, mix: Mix, teacher: FrozenTeacher | None = None, match: LayerMatch | None = None) -> None:
        self.mix, self.teacher, self.match = mix, teacher, match
        self.head: Head | None = None  # of a teacher whose hidden states the rows bring along
        self.width = 0  # tokens that both vocabularies share
        self.is_on = False

    def bind(self, model: PreTrainedModel) -> str | None:
        """Bind to the model; a reason where that cannot be."""
        return fused_loss.bind_head_loss(model, self)

    def collator(self, collate: Any, teacher: PreTrainedModel) -> Any:
        """The collator of the batches that student and teacher are given."""
        return collate

    def models_beside(self, base: Base) -> list[PreTrainedModel]:
        """The models that are given the student's batches, its own base excluded."""
        return [] if self.teacher is None or self.teacher.model is base.model else [self.teacher.model]

    def frozen(self, teacher: PreTrainedModel, is_own: bool) -> FrozenTeacher:
        """The teacher as it is asked. Raises ValueError with why it cannot be."""
        return FrozenTeacher(teacher, is_own)

    def begin(self, teacher: FrozenTeacher, base: Base, trained: Any) -> None:
        """From now on this teacher is asked."""
        if teacher.model is base.model:
            teacher.adapted = trained
        ours = base.model.get_output_embeddings().weight.shape[0]
        self.teacher, self.width, self.is_on = teacher, min(ours, teacher.head.weight.shape[0]), True

    def __call__(
        self,
        model: PreTrainedModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss_rows: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> HeadLossOutput:
        brought = {name: kwargs.pop(name) for name in COLUMNS if name in kwargs}
        if not self.is_on:
            return fused_loss.cross_entropy(model, args, kwargs, loss_rows, targets, scale, softcap)
        said, theirs = self._ask(brought, args, kwargs, loss_rows)
        if theirs is None or self.match is None:
            rows = last_hidden(model, args, kwargs).flatten(0, 1).index_select(0, loss_rows)
            return self._output(model, rows, targets, said, scale, softcap)
        rows, ours = layers_of(model, args, kwargs, loss_rows)
        output = self._output(model, rows, targets, said, scale, softcap)
        if torch.is_grad_enabled() and output.total is not None:
            output.total = output.total + self.match(ours, theirs)
        return output

    def _ask(
        self, brought: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], loss_rows: torch.Tensor
    ) -> tuple[Teacher, list[torch.Tensor] | None]:
        """What the teacher says, out of the batch or out of its mouth, and its layers' states if they are asked for."""
        if brought:
            given: dict[str, Any] = {name.removeprefix("teacher_"): tensor for name, tensor in brought.items()}
            if "hidden" in given:
                assert self.head is not None
                self.head = head_on(self.head, loss_rows.device)
                return Teacher(self.width, given["hidden"], self.head), None
            return Teacher(self.width, **given), None
        assert self.teacher is not None, "no teacher, and rows that do not say what it said"
        found = self.teacher.hidden(args, kwargs, loss_rows, all_layers=self.match is not None)
        last, layers = found if self.match is not None else (found, None)
        return Teacher(self.width, last, self.teacher.head), layers

    def _output(
        self,
        model: PreTrainedModel,
        rows: torch.Tensor,
        targets: torch.Tensor,
        said: Teacher,
        scale: float,
        softcap: float | None,
    ) -> HeadLossOutput:
        linear: Any = model.get_output_embeddings()
        mix = self.mix
        if not is_plain(linear):
            return self._output_of_module(linear, rows, targets, said, scale, softcap)

        def compute(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            head = Head(weight, bias, softcap, scale)
            if torch.is_grad_enabled() and model.training:
                return (distill_loss(rows, head, targets, said, mix),)
            nll, correct = head_scores(rows, head.weight, targets, head.bias, head.softcap, head.scale)
            kl = distill_scores(rows, head, said, mix.temperature)
            total = distill_loss(rows, head, targets, said, mix) if torch.is_grad_enabled() else nll.sum()
            return total, nll, correct, kl

        return HeadLossOutput(**dict(zip(("total", "nll", "correct", "kl"), within(linear, rows, compute), strict=False)))

    def _output_of_module(
        self, linear: nn.Module, rows: torch.Tensor, targets: torch.Tensor, said: Teacher, scale: float, softcap: float | None
    ) -> HeadLossOutput:
        """Through a head whose doings are its own (an adapter, say): logits of supervised rows exist."""
        logits = linear(rows)
        logits = (logits.float() if logits.dtype.itemsize < 4 else logits) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        nll = nn.functional.cross_entropy(logits.detach(), targets, reduction="none")
        kl = distill_scores_of_logits(logits.detach(), said, self.mix.temperature)
        total = distill_loss_of_logits(logits, targets, said, self.mix) if torch.is_grad_enabled() else nll.sum()
        return HeadLossOutput(total=total, nll=nll, correct=logits.argmax(-1) == targets, kl=kl)


def head_on(head: Head, device: torch.device) -> Head:
    if head.weight.device == device:
        return head
    return head._replace(weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))


def student_of(
    strategy: Distill, build: Callable[[Base], nn.Module], base: Base, distiller: Any, teacher: PreTrainedModel | None
) -> nn.Module:
    """The model that learns, with the distiller's loss bound to it.

    Args:
        build: the student's strategy makes the model that is trained out of its base.
        distiller: what is minimised; it gets the teacher, where that is asked or judged.
        teacher: None where nothing is to be learnt from one.

    Raises:
        UserError: one of the two whose forward cannot be taken apart, or two that do not go together.
    """
    fused_loss.unbind_head_loss(base.model)
    if teacher is not None:
        if teacher is not base.model:
            cast_weights(teacher, base.compute_dtype)
        asked = _wrapped(strategy, distiller, teacher, base)
        teacher = None if asked is None else teacher
    if reason := distiller.bind(base.model):
        raise UserError(f"strategy.student: this model cannot be distilled: {reason}")
    trained = build(base)
    if teacher is None:
        return trained
    ours, theirs = count_parameters(trained)[1], count_parameters(teacher)[1]
    if theirs < ours and teacher is not base.model:
        base.say(f"the teacher has {theirs:,} parameters, fewer than the student's {ours:,}: is it the other way round?")
    try:
        distiller.begin(asked, base, trained)
        distiller.is_on = strategy.uses_teacher
    except ValueError as error:
        raise UserError(f"strategy.teacher: it cannot be asked: {error}") from None
    if strategy.on_policy:
        from hfstrat.strategies.distill.on_policy import REMARK

        check_sizes(*(model.config.get_text_config().vocab_size for model in (base.model, teacher)))
        base.say(f"{'teacher':<9} {REMARK}")
    if strategy.hidden_states:
        hidden_loss.bring_together(strategy.hidden_states, base, distiller, teacher)
    return trained


def _wrapped(strategy: Distill, distiller: Any, teacher: PreTrainedModel, base: Base) -> Any:
    """The teacher as it is asked (None: it only wrote); its head is looked at before anything is bound to it."""
    try:
        return distiller.frozen(teacher, is_own=teacher is base.model)
    except ValueError as error:
        if not strategy.uses_teacher:
            return None
        raise UserError(f"strategy.teacher: it cannot be asked: {error}") from None
