"""What adapters of PEFT share: the base is frozen, and the result is a folder with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.strategies.base import S, Strategy

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.trainer.trainer import StrategyTrainer


class Adapter(Strategy[S]):
    """Adapters are trained, the base model is frozen (in 16 bits where the hardware supports it)."""

    has_pretrained_body = True

    def finish(self, model: nn.Module, base: Base) -> None:
        """Cast the modules to save to the precision of the base model, since PEFT loads them without a cast."""
        if base.pooling is not None:  # they become part of a complete model in float32
            return
        for module in model.modules():
            if type(module).__name__ == "ModulesToSaveWrapper":
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(base.compute_dtype)

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.write(trainer, folder, base)
        if trainer.args.should_save and base.pooling is None:
            base.task.model.write_config(base, folder)

    def write(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        """Write the adapter, or where it was merged the complete model."""
        super().save(trainer, folder, base)


def all_linear(base: Base) -> Any:
    """What `target_modules: all-linear` means in this model; says which layers are left out."""
    from hfstrat.models.linear_layers import all_linear

    found = all_linear(base.model)
    if found.left_out:
        base.say(f"all-linear leaves out {found.left_out}")
    return found
