"""Batches of prompts for an evaluation: padded on the left, with what their answers are scored by."""

from __future__ import annotations

import json
from typing import Any

import torch

from hfstrat.data.collate import Collator, TokenCollator
from hfstrat.data.prompts import GIVEN
from hfstrat.data.render import IGNORED


class PromptCollator(TokenCollator):
    """Collates token rows of prompts.

    A batch has `input_ids` and `attention_mask` (int64 `[P, T]`, padded on the left), `given` (uint8 `[P, bytes]`, JSON, padded
    with spaces) and `labels`, of which the Trainer counts one item for each prompt.

    A row with loss stands for a prompt with its answers: copies of it, as the training step computes them.

    Args:
        plain: collates complete sequences.
        answers: to each prompt.
    """

    selects_rows = True
    packs = False
    generates = True
    unpacked_because = "each prompt has answers of its own"

    def __init__(self, plain: Collator, answers: int) -> None:
        self.plain, self.answers = plain, answers
        self.pad_token_id, self.multiple = plain.pad_token_id, plain.multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if any(label != IGNORED for label in rows[0]["labels"]):
            return self.plain([row for row in rows for _ in range(self.answers)])
        width = max(len(row["input_ids"]) for row in rows)
        gaps = [width - len(row["input_ids"]) for row in rows]
        texts = [row[GIVEN].encode() for row in rows]
        most = max(map(len, texts))
        return {
            "input_ids": torch.tensor(
                [[self.pad_token_id] * gap + list(row["input_ids"]) for gap, row in zip(gaps, rows, strict=True)]
            ),
            "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
            GIVEN: torch.tensor([list(text.ljust(most)) for text in texts], dtype=torch.uint8),
            "labels": torch.tensor([[IGNORED, 0]]).repeat(len(rows), 1),
        }


def prompts_of(batch: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """The prompts of a batch without padding, and what their answers are scored by."""
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return ids, [json.loads(bytes(row.tolist())) for row in batch[GIVEN].cpu()]
