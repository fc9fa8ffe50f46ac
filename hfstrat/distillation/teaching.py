"""A student that is bound to its teacher: who is asked, on what, and what learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat import fused
from hfstrat.distillation import layer_match
from hfstrat.distillation.teacher import check_sizes
from hfstrat.errors import UserError
from hfstrat.model import cast_weights, count_parameters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hfstrat.model import Base
    from hfstrat.strategies.distill import Distill


def student_of(strategy: Distill, base: Base, distiller: Any, teacher: PreTrainedModel | None) -> nn.Module:
    """The model that learns, with the distiller's loss bound to it.

    Args:
        distiller: what is minimised; it gets the teacher, where that is asked or judged.
        teacher: None where nothing is to be learnt from one.

    Raises:
        UserError: one of the two whose forward cannot be taken apart, or two that do not go together.
    """
    fused.unbind_head_loss(base.model)
    if teacher is not None:
        if teacher is not base.model:
            cast_weights(teacher, base.compute_dtype)
        asked = _wrapped(strategy, distiller, teacher, base)
        teacher = None if asked is None else teacher
    if reason := distiller.bind(base.model):
        raise UserError(f"strategy.student: this model cannot be distilled: {reason}")
    trained = strategy.student.build_model(base)
    if teacher is None:
        return trained
    ours, theirs = count_parameters(trained)[1], count_parameters(teacher)[1]
    if theirs < ours and teacher is not base.model:
        base.say(f"the teacher has {theirs:,} parameters, fewer than the student's {ours:,}: is it the other way round?")
    try:
        distiller.begin(asked, base, trained)
        distiller.is_on = strategy.asks
    except ValueError as error:
        raise UserError(f"strategy.teacher: it cannot be asked: {error}") from None
    if strategy.on_policy:
        from hfstrat.distillation.on_policy import REMARK

        check_sizes(*(model.config.get_text_config().vocab_size for model in (base.model, teacher)))
        base.say(f"{'teacher':<9} {REMARK}")
    if strategy.hidden:
        layer_match.bring_together(strategy.hidden, base, distiller, teacher)
    return trained


def _wrapped(strategy: Distill, distiller: Any, teacher: PreTrainedModel, base: Base) -> Any:
    """The teacher as it is asked (None: it only wrote); its head is looked at before anything is bound to it."""
    try:
        return distiller.frozen(teacher, is_own=teacher is base.model)
    except ValueError as error:
        if not strategy.asks:
            return None
        raise UserError(f"strategy.teacher: it cannot be asked: {error}") from None
