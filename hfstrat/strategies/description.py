"""What a strategy trains in a model, and what that takes, from the shapes of the parameters alone. No torch."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from hfstrat.recipe.section import Shapes

PAYS = 1.1  # predicted speedup below which cached hidden states are not worth disk space and waiting time
TRAINED_BYTES = 12  # of a trainable parameter in a checkpoint: its float32 weight and two Adam moments


class Footprint(NamedTuple):
    """Parameter counts: the trainable ones, and all that are in memory (adapters included)."""

    trainable: int
    total: int


class Description(NamedTuple):
    """What a strategy does with a model.

    Args:
        footprint: parameter counts.
        names: the model's own trainable parameters.
        shapes: the parameters of the model that is trained, by name.
        rank: of the adapters next to the parameters in `adapted`.
        unquantized: parameters of the base that must not be quantized, since they are trained.
        saves_model: whether a checkpoint holds all weights; else it holds the trainable ones only.
        body_once: the body runs once, and its outputs are cached.
        keeps_prefix: outputs of the blocks below the lowest trainable one may be cached too, if these have no dropout or it is
            off (`still`).
        teacher: parameters of a frozen model next to it.
        beside: parameters of another stack (a vision tower and its projector), whose outputs are inputs of the blocks.
    """

    footprint: Footprint
    names: frozenset[str]
    shapes: Shapes
    rank: int = 0
    adapted: frozenset[str] = frozenset()
    unquantized: frozenset[str] = frozenset()
    saves_model: bool = True
    body_once: bool = False
    keeps_prefix: bool = False
    still: bool = False
    teacher: int = 0
    beside: frozenset[str] = frozenset()

    def checkpoint_bytes(self, base: int | None = None) -> int:
        """The size of one checkpoint.

        Args:
            base: bytes of a quantized base model; by default all weights are saved in 16 bits.
        """
        saved = (2 * self.footprint.total if base is None else base) if self.saves_model else 0
        return saved + TRAINED_BYTES * self.footprint.trainable


def count(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(prod, shapes.values()))
