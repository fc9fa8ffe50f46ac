"""The different rows of a data set: rows with a weight stand in it more than once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Distinct(NamedTuple):
    """The place of each different row's first appearance, and which of them each row is, `[len(rows)]`."""

    first: np.ndarray
    which: np.ndarray


def distinct(rows: Any) -> Distinct:
    """Of a Dataset, whose repeated rows are repeated indices; in anything else every row is its own."""
    indices = getattr(rows, "_indices", None)
    numbers = np.arange(len(rows)) if indices is None else indices.column(0).to_numpy()
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    return Distinct(first, which)
