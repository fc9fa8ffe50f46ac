"""The result of training a classifier that pools as a sentence encoder does: complete, in float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hfstrat.tasks import sentence_transformers

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.trainer.trainer import StrategyTrainer


def complete(model: Any, base: Base) -> nn.Module:
    """The trained model in float32; an adapter is merged, since no library loads one beside a pooling. `model` is changed."""
    import torch

    from hfstrat.models.load import cast_weights

    cast_weights(model, torch.float32)
    if model is not base.model:
        base.model = model.merge_and_unload(safe_merge=True)
    return base.model


def save(trainer: StrategyTrainer, folder: Path, base: Base) -> None:
    """Write the body, the pooling and the head."""
    from torch import nn

    if not trainer.args.should_save:
        return
    model: Any = base.model
    parts: Any = SimpleNamespace(
        body=model.base_model, head=nn.Sequential(model.classifier), pooling=base.pooling.mode, config=model.config
    )
    sentence_transformers.save(
        parts, trainer.processing_class, folder, labels_of(base, model.config), length_of(trainer), base.own_dtype
    )


def labels_of(base: Base, config: Any) -> dict[str, Any]:
    """What the config has to hold of the labels."""
    return {key: getattr(config, key) for key in base.task.model.config_keys if hasattr(config, key)}


def length_of(trainer: StrategyTrainer) -> int:
    """The longest text in tokens."""
    tokenizer: Any = trainer.processing_class
    return min(int(trainer.marker_state["recipe"]["data"]["max_length"]), int(tokenizer.model_max_length))
