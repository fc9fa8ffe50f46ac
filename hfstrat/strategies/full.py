"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import S, Strategy
from hfstrat.strategies.description import Description, Footprint, count

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base


class AllWeights(Strategy[S]):
    """Every parameter is trained, in float32 with a 16-bit forward pass where the hardware supports it."""

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        return Description(Footprint(count(shapes), count(shapes)), frozenset(shapes), shapes)

    def build_model(self, base: Base) -> nn.Module:
        base.model.requires_grad_(True)
        base.task.model.freeze(base, getattr(self.section, "freeze", None))
        return base.model

    def finish(self, model: nn.Module, base: Base) -> None:
        """In the precision of the checkpoint; where most weights are frozen, in that of the forward pass if it is lower."""
        from hfstrat.models.load import cast_weights, count_parameters

        trained, total = count_parameters(model)
        narrows = 2 * trained < total and base.compute_dtype.itemsize < base.own_dtype.itemsize
        cast_weights(model, base.compute_dtype if narrows else base.own_dtype)


class Full(AllWeights[section.Full]):
    """All weights of a pretrained model are trained."""

    has_pretrained_body = True
