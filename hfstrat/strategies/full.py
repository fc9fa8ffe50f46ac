"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from hfstrat.recipe.section import Default, Shapes
from hfstrat.strategies.base import Footprint, Strategy

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base


class Full(Strategy):
    """Every parameter learns, in float32 with a 16-bit forward where the hardware has one."""

    name: Literal["full"]
    unquantizable: ClassVar[str] = (
        "under strategy full every weight learns, and one of 4 or 8 bits cannot take a small step; take lora (then it is "
        "QLoRA), partial or head, or a base that is not quantized"
    )
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(2e-5, "Llama 2 (arXiv 2307.09288, section 3.1) and Stanford Alpaca fine-tune at 2e-5"),
    }

    def build_model(self, base: Base) -> nn.Module:
        base.model.requires_grad_(True)
        return base.model

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.models.load import cast_weights

        cast_weights(model, base.own_dtype)

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        total = sum(prod(shape) for shape in shapes.values())
        return Footprint(total, total)
