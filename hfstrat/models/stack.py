"""A model of files as a stack of equal blocks over positions: what predictions of memory and time are made from. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from hfstrat.recipe.section import Shapes


class Stem(NamedTuple):
    """The layers before the blocks, for each position of the blocks.

    operations: floating-point operations of a forward pass.
    numbers: that autograd stores where these layers are trained.
    """

    operations: float = 0.0
    numbers: float = 0.0


class Stack(NamedTuple):
    """A body and its head.

    sizes: by the common keys of `parameter_names.CONFIG_KEYS` (hidden_size, intermediate_size, num_hidden_layers,
        num_attention_heads), and dropout.
    body: the parameters of the body.
    head: those of the head, with as many outputs as there are labels.
    """

    sizes: dict[str, Any]
    body: Shapes
    head: Shapes
    stem: Stem = Stem()


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    """The parameters of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
