"""Gives a detector other classes: rows of its class layers in another order, without some, with new ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hfstrat.models.class_outputs import set_names

OF_CLASSES = re.compile(r"class|score")  # in the names of layers with an output, or an embedding, for each class


def class_layers(model: Any) -> dict[str, nn.Module]:
    """The layers with a row for each class, and perhaps one for no object, by name; the same layer once."""
    counts = (model.config.num_labels, model.config.num_labels + 1)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        rows = (
            module.out_features
            if isinstance(module, nn.Linear)
            else module.num_embeddings
            if isinstance(module, nn.Embedding)
            else 0
        )
        if rows in counts and OF_CLASSES.search(name):
            found[name] = module
    return found


@torch.no_grad()
def arrange(model: Any, sources: Sequence[int | None], names: Sequence[str]) -> None:
    """Give a detector the classes `names`, in place.

    Args:
        sources: for each of them the present class that it is; None for a new one with random weights.
    """
    before, done = int(model.config.num_labels), set[int]()
    for module in class_layers(model).values():
        for key, old in list(module.named_parameters(recurse=False)):
            if id(old) in done:
                continue
            made = nn.Parameter(_rows(old, sources, before), requires_grad=old.requires_grad)
            _replace(model, old, made)
            done.add(id(made))
            rows = len(made)
            if key == "weight" and isinstance(module, nn.Linear):
                module.out_features = rows
            elif key == "weight" and isinstance(module, nn.Embedding):
                module.num_embeddings = rows
                if module.padding_idx is not None:
                    module.padding_idx = rows - 1
    for module in model.modules():  # layers that share their parameters with those
        if isinstance(module, nn.Linear) and module.out_features != len(module.weight):
            module.out_features = len(module.weight)
    set_names(model, names)


def _rows(old: torch.Tensor, sources: Sequence[int | None], before: int) -> torch.Tensor:
    """The rows of the classes, and after them those of no object. New ones are like the present ones at random."""
    spread = old[:before].std() if old.dim() > 1 and before * old.shape[1] > 1 else old.new_zeros(())
    middle = old[:before].mean(0)
    made = [
        old[source] if source is not None else (torch.randn_like(old[0]) * spread if old.dim() > 1 else middle)
        for source in sources
    ]
    return torch.cat([torch.stack(made), old[before:]])


def _replace(model: Any, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever it is shared."""
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, key, new)
