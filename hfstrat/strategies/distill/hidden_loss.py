"""Layers of the student brought near to layers of the teacher, as in TinyBERT (arXiv 1909.10351)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from hfstrat.recipe.distill import check_pairs, even_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfstrat.models.load import Base
    from hfstrat.recipe.distill import LayerPairs

NAME = "distill_projections"  # of the submodule that learns beside the student and is not saved


class LayerMatch:
    """Mean squared or cosine distance of chosen pairs of layers, summed over rows.

    Args:
        pairs: numbers of a student's and a teacher's layer, counted from 0.
        kind: `mse` is the mean over the width; `cosine` is 1 - cosine.
        weight: factor of the mean over pairs.
        projections: `[H, H']` for each pair, from the student's width to the teacher's; None where both are one.
    """

    def __init__(
        self, pairs: list[tuple[int, int]], kind: Literal["mse", "cosine"], weight: float, projections: nn.ParameterList | None
    ) -> None:
        self.pairs, self.kind, self.weight, self.projections = pairs, kind, weight, projections

    def __call__(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
        """The summed loss; each list has the embeddings first, then every layer's states `[n, H]`, the last one's after the
        model's last norm."""
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


def bring_together(wish: LayerPairs, base: Base, distiller: Any, teacher: PreTrainedModel) -> None:
    """Have the student's layers compared with its teacher's, through projections where the widths differ.

    Raises:
        UserError: a layer that is not there.
    """
    ours, theirs = (model.config.get_text_config() for model in (base.model, teacher))
    counts = ours.num_hidden_layers, theirs.num_hidden_layers
    pairs = [(pair[0], pair[1]) for pair in wish.layers] if wish.layers else even_pairs(*counts)
    check_pairs(pairs, *counts)
    projections = None
    if ours.hidden_size != theirs.hidden_size:
        projections = new_projections(len(pairs), ours.hidden_size, theirs.hidden_size)
        base.model.add_module(NAME, projections)
    distiller.match = LayerMatch(pairs, wish.loss, wish.weight, projections)


def new_projections(count: int, student: int, teacher: int) -> nn.ParameterList:
    """Orthogonal, in float32; `[student, teacher]` each."""
    return nn.ParameterList(nn.init.orthogonal_(torch.empty(student, teacher)) for _ in range(count))


def take_off(model: Any) -> None:
    """The student without its projections, as it is saved; also where there are none."""
    for module in model.modules():
        if NAME in module._modules:
            del module._modules[NAME]
