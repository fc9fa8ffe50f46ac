"""A frozen body, a pooling and a head; with features as input only the head runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import SequenceClassifierOutput

from hfstrat.models import output_scale
from hfstrat.models.pooling import pool
from hfstrat.strategies.head.features import INPUTS, Body
from hfstrat.strategies.head.linear import Linear, Scale
from hfstrat.strategies.head.own_pooling import OwnPooling


class Standardize(nn.Module):
    """`(x - mean) / spread` with fixed buffers, which eases training; it is folded into the next layer at the end."""

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.register_buffer("mean", scale.mean.float())
        self.register_buffer("spread", scale.spread.float())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.spread


class HeadModel(nn.Module):
    """Logits `[B, K]` of features `[B, H]`, or of the inputs of the body.

    Only the head is trained, in float32, and saved in checkpoints.

    Args:
        config: of the classifier, with its labels.
        is_solved: whether the head is solved, rather than trained step by step.
    """

    def __init__(self, body: Body, layer: int, pooling: str, head: nn.Sequential, config: Any, is_solved: bool) -> None:
        super().__init__()
        self.body, self.head = body.model.requires_grad_(False), head
        self.layer, self.pooling, self.is_solved = layer, pooling, is_solved
        self.config, self.parts = config, body

    def forward(
        self, features: torch.Tensor | None = None, labels: torch.Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        if features is None:
            features = self.pooled({name: value for name, value in inputs.items() if name in INPUTS and value is not None})
        with torch.autocast(features.device.type, enabled=False):
            return SequenceClassifierOutput(logits=self.head(features.to(next(self.head.parameters()).dtype)))

    def pooled(self, given: dict[str, Any]) -> torch.Tensor:
        """The features of the inputs of the body, `[B, H]`."""
        if isinstance(self.parts, OwnPooling):
            return self.parts.pooled(given)
        mask = given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        return pool(self.body(**given).last_hidden_state, mask, self.pooling)

    def train(self, mode: bool = True) -> HeadModel:
        super().train(mode)
        self.body.eval()  # the features were computed without dropout
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {f"head.{name}": value for name, value in self.head.state_dict().items()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.head.load_state_dict({name.removeprefix("head."): value for name, value in state.items()})

    def fold(self) -> None:
        """Fold the standardization into the first linear layer; the outputs stay the same."""
        output_scale.fold(self.head)
        first = self.head[0]
        if not isinstance(first, Standardize):
            return
        linear: nn.Linear = self.head[1]  # type: ignore[assignment]
        scale = Scale(first.mean.double(), first.spread.double())
        folded = scale.fold(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        set_linear(linear, folded)
        self.head = nn.Sequential(*list(self.head)[1:])


def make_head(width: int, classes: int, hidden: int | None, scale: Scale | None, bias: bool = True) -> nn.Sequential:
    """A linear layer, or one on top of `hidden` GELUs. The last layer starts at zero, so all classes are equally likely."""
    layers: list[nn.Module] = [] if scale is None else [Standardize(scale)]
    if hidden is not None:
        layers += [nn.Linear(width, hidden), nn.GELU()]
    last = nn.Linear(hidden or width, classes, bias=bias)
    nn.init.zeros_(last.weight)
    if bias:
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


@torch.no_grad()
def set_linear(layer: nn.Linear, solved: Linear) -> None:
    """Copy a solved head into a layer, in whose parameters targets may be standardized."""
    weight, bias = solved
    if isinstance(layer, output_scale.ScaledLinear):
        weight, bias = layer.units.to_standardized(weight, bias, layer.constant)
    output_scale.write(layer, weight, bias)


class FeatureRows(Dataset[dict[str, torch.Tensor]]):
    """Features `[n, H]` with their labels (`[n]` or `[n, K]`), indexed by batch; `units` of numbers.

    Args:
        views: how many rows each example has, as `Pooled` orders them.
    """

    def __init__(
        self, features: torch.Tensor, labels: torch.Tensor, units: output_scale.Units | None = None, views: int = 1
    ) -> None:
        self.features, self.labels, self.units, self.views = features, labels, units, views

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(indices)
        return {"features": self.features[chosen], "labels": self.labels[chosen]}


class FeatureCollator:
    """The collator of `FeatureRows`, whose batches are tensors already."""

    pads = selects_rows = sizes_batches = False

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch
