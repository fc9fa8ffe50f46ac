"""Rows that bring along what was computed about them, so that no order of rows can mix it up, and the batches made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hfstrat.data.packing import Bin

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class WithColumn(Dataset[dict[str, Any]]):
    """Rows with one column more.

    Args:
        rows: the tokenised rows.
        name: of the column.
        values: gives a value by its number.
        places: the number of each row's value, `[len(rows)]`.
    """

    def __init__(self, rows: Any, name: str, values: Callable[[int], Any], places: np.ndarray) -> None:
        self.rows, self.name, self.values, self.places = rows, name, values, places

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], self.name: self.values(int(self.places[index]))}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class Bringing(ABC):
    """A collator for rows with such a column: batches as before, and what `added` makes of the column's values.

    Rows without the column (of another part of the data) are collated as before. Where rows are packed, each item is a bin.
    """

    column: str

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        bins = [item.rows if isinstance(item, Bin) else [item] for item in items]
        batch = self.collate(items)
        if not all(self.column in row for rows in bins for row in rows):
            return batch
        return batch | self.added([[row[self.column] for row in rows] for rows in bins], batch)

    @abstractmethod
    def added(self, values: list[list[Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the values of a batch's rows are as tensors; `values` are those of each batch row, left to right."""
