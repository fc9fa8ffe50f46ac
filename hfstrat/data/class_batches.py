"""Rows of a classification as tensors."""

from __future__ import annotations

from typing import Any

import torch


class ClassCollator:
    """Pads rows on the right to a rounded width.

    Gives `input_ids`, `attention_mask` (int64 `[B, T]`), `token_type_ids` for models that tell two texts apart by them, and
    `labels`: int64 `[B]`, or float `[B, labels]` of 0 and 1 where a row may have several.

    Args:
        labels: how many there are, where a row may have several; None for one a row.
    """

    def __init__(self, pad_token_id: int, multiple: int, has_types: bool, labels: int | None = None) -> None:
        self.pad_token_id, self.multiple, self.has_types, self.labels = pad_token_id, multiple, has_types, labels

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        shape = (len(rows), width)
        batch = {"input_ids": torch.full(shape, self.pad_token_id), "attention_mask": torch.zeros(shape, dtype=torch.long)}
        if self.has_types:
            batch["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            if self.has_types and row["token_type_ids"]:
                batch["token_type_ids"][index, :length] = torch.as_tensor(row["token_type_ids"])
        batch["labels"] = self._labels([row["label"] for row in rows])
        return batch

    def _labels(self, given: list[Any]) -> torch.Tensor:
        if self.labels is None:
            return torch.tensor(given, dtype=torch.long)
        marks = torch.zeros(len(given), self.labels)
        for index, labels in enumerate(given):
            marks[index, labels] = 1.0
        return marks
