"""Rows of a classification as tensors."""

from __future__ import annotations

from typing import Any

import torch

from hfstrat.data.batches import rounded

TEACHER_TYPES = "teacher_types"


def has_token_types(model: Any) -> bool:
    """Whether a model tells two texts apart by `token_type_ids`."""
    return (getattr(model.config, "type_vocab_size", 0) or 0) > 1


class ClassCollator:
    """Pads rows on the right to one of few widths (`batches.rounded`).

    Gives `input_ids`, `attention_mask` (int64 `[B, T]`), `token_type_ids` for models that tell two texts apart by them, and
    `labels`: int64 `[B]`, or float `[B, labels]` of 0 and 1 where a row may have several.

    Args:
        has_types: whether the model tells two texts apart by `token_type_ids`.
        teacher_has_types: whether its teacher does, to whom they go as `teacher_types`.
        labels: how many there are, where a row may have several; None for one a row.
    """

    selects_rows = False  # every row has loss

    def __init__(
        self, pad_token_id: int, multiple: int, has_types: bool, labels: int | None = None, teacher_has_types: bool = False
    ) -> None:
        self.pad_token_id, self.multiple, self.has_types, self.labels = pad_token_id, multiple, has_types, labels
        self.types = [name for name, wanted in (("token_type_ids", has_types), (TEACHER_TYPES, teacher_has_types)) if wanted]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = rounded(max(len(row["input_ids"]) for row in rows), self.multiple)
        shape = (len(rows), width)
        batch = {"input_ids": torch.full(shape, self.pad_token_id), "attention_mask": torch.zeros(shape, dtype=torch.long)}
        for name in self.types:
            batch[name] = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            for name in self.types if row["token_type_ids"] else ():
                batch[name][index, :length] = torch.as_tensor(row["token_type_ids"])
        batch["labels"] = self._labels([row["label"] for row in rows])
        return batch

    def _labels(self, given: list[Any]) -> torch.Tensor:
        if self.labels is None:
            return torch.tensor(given, dtype=torch.long)
        marks = torch.zeros(len(given), self.labels)
        for index, labels in enumerate(given):
            marks[index, labels] = 1.0
        return marks
