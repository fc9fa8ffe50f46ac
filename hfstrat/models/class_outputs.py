"""Gives the head of a classifier other outputs: rows of its last linear layer in another order, without some, with new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hfstrat.errors import UserError
from hfstrat.models.blocks import body_name


def last_layers(model: Any) -> dict[str, nn.Linear]:
    """The last linear layers of a classification model, by name: one, or also the copies that PEFT trains and keeps.

    Raises:
        UserError: the head is no linear layer.
    """
    body, outputs = body_name(model), int(model.config.num_labels)
    found: dict[str, tuple[str, nn.Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(f"{body}.") and module.out_features == outputs:
            found[_copy_of(name)] = (name, module)  # the last one of each copy
    if not found:
        raise UserError(f"model.name_or_path: the head of {type(model).__name__} is no linear layer for {outputs} outputs")
    return dict(found.values())


def _copy_of(name: str) -> str:
    """Which copy of a module a name belongs to, where PEFT keeps the original one beside those that are trained."""
    before, trained, after = name.partition("modules_to_save.")
    return f"{before}{trained}{after.partition('.')[0]}" if trained else "original"


@torch.no_grad()
def arrange(model: Any, sources: Sequence[int | None], names: Sequence[str]) -> None:
    """Give a classification model the outputs `names`, in place.

    Args:
        sources: for each of them the present output that it is; None for a new one with random weights.
    """
    for path, old in last_layers(model).items():
        new = type(old)(old.in_features, len(sources), old.bias is not None, old.weight.device, old.weight.dtype)
        model._init_weights(new)
        for place, source in enumerate(sources):
            if source is not None:
                new.weight[place] = old.weight[source]
                if old.bias is not None:
                    new.bias[place] = old.bias[source]
        new.requires_grad_(old.weight.requires_grad).train(old.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    set_names(model, names)


def set_names(model: Any, names: Sequence[str]) -> None:
    """Name the outputs of a classification model."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    if hasattr(model, "num_labels"):
        model.num_labels = len(names)
