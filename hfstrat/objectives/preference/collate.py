"""Batches of preferences: the two sequences of each row, one after the other."""

from __future__ import annotations

from typing import Any

import torch

from hfstrat.data.collate import TokenCollator
from hfstrat.data.packing import Bin, PackingCollator
from hfstrat.data.preference_rows import DESIRABLE, two
from hfstrat.data.render import IGNORED

REFERENCE = "reference_logps"  # the column of the reference's summed log-probabilities, `[2]` of each row
OF_THE_LOSS = ("pair_sequence", "pair_tokens", "pair_answer", REFERENCE, DESIRABLE, "pair_divergence", "pair_share")
"""The keywords of a batch that the loss takes and the model does not know."""
OTHERS = "other_"  # begins the names of a batch of the second sequences of answers with labels


class PreferenceCollator(TokenCollator):
    """Collates token rows of preferences.

    Batches have what `Collator` gives for their sequences (of pairs chosen, rejected, chosen, ...), `labels` (int64 `[P, 2]`,
    of which the Trainer counts one item for each row), and for the loss: `pair_sequence` (int64 `[n]`, the sequence of each
    position with loss), `pair_tokens` (int64 `[S]`, the tokens of the answers), `pair_answer` (bool `[n]`, with
    `trains_prompts`: whether the position belongs to an answer) and `reference_logps` (float32 `[P, 2]`).

    A batch of answers with labels has their first sequences, `desirable` (bool `[P]`), and the second sequences as a batch of
    their own, whose names begin with `OTHERS`.

    Args:
        plain: collates the sequences, as `Collator`; it selects the positions with loss.
        trains_prompts: whether the prompt of the first sequence has loss too, as in ORPO.
        unpaired: whether the rows are answers with labels.
    """

    selects_rows = True
    is_paired = True

    def __init__(self, plain: Any, trains_prompts: bool = False, unpaired: bool = False) -> None:
        self.plain, self.trains_prompts, self.unpaired = plain, trains_prompts, unpaired
        self.pad_token_id, self.multiple = plain.pad_token_id, plain.multiple
        self.packs, self.reads_images = plain.packs and not unpaired, getattr(plain, "reads_images", False)
        if not plain.packs:
            self.unpacked_because = plain.unpacked_because
        self.settings = [type(plain).__name__, *getattr(plain, "settings", [])]  # what cached columns depend on

    @property
    def processor(self) -> Any:
        """Of the images of the sequences."""
        return self.plain.processor

    def of_sequences(self) -> Any:
        return self.plain

    def with_sequences(self, plain: Any) -> PreferenceCollator:
        return PreferenceCollator(plain, self.trains_prompts, self.unpaired)

    def sequence(self, row: dict[str, Any]) -> dict[str, Any]:
        return two(row)[0]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = self.sequences(rows)
        batch = self.with_loss(rows, sequences, self.plain(sequences))
        if not self.unpaired:
            return batch
        others = [two(row)[1] for row in rows]
        return batch | {f"{OTHERS}{name}": tensor for name, tensor in self._of(others, self.plain(others)).items()}

    def packed(self, flatten: bool, few_widths: bool = True) -> PackingCollator:  # type: ignore[override]
        return PackedPreferences(self, flatten, few_widths)

    def sequences(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The sequences of some rows; `answers` marks the tokens of an answer where the prompt has loss as well."""
        if self.unpaired:
            return [two(row)[0] for row in rows]
        found = [part for row in rows for part in two(row)]
        return [_with_prompt(each, place % 2 == 0) for place, each in enumerate(found)] if self.trains_prompts else found

    def with_loss(
        self, rows: list[dict[str, Any]], sequences: list[dict[str, Any]], batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A batch of the sequences with what the loss needs, in place of token labels."""
        found = self._of(sequences, batch)
        if self.trains_prompts:
            found["pair_answer"] = torch.tensor([mark for each in sequences for mark in _marks(each)])
        if REFERENCE in rows[0]:
            found[REFERENCE] = torch.tensor([row[REFERENCE] for row in rows], dtype=torch.float32)
        if self.unpaired:
            found[DESIRABLE] = torch.tensor([row[DESIRABLE] == 1 for row in rows])
        found["labels"] = torch.tensor([[IGNORED, 0]]).repeat(len(rows), 1)  # whichever labels are shifted: one item each
        return found

    @staticmethod
    def _of(sequences: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        supervised = torch.tensor([_count(each["labels"]) for each in sequences])
        found = {name: tensor for name, tensor in batch.items() if name != "labels"}
        found["pair_sequence"] = torch.repeat_interleave(torch.arange(len(sequences)), supervised)
        found["pair_tokens"] = torch.tensor([_count(each.get("answers", each["labels"])) for each in sequences])
        return found


def split_others(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch without the second sequences of answers with labels, and the batch of these; empty if there are none."""
    others = {name.removeprefix(OTHERS): value for name, value in batch.items() if name.startswith(OTHERS)}
    return {name: value for name, value in batch.items() if not name.startswith(OTHERS)}, others


def _with_prompt(sequence: dict[str, Any], is_chosen: bool) -> dict[str, Any]:
    """A sequence with `answers`, its labels, and of a chosen answer with labels for the prompt too, but for its images."""
    labels = sequence["labels"]
    if not is_chosen:
        return {**sequence, "answers": labels}
    trained, spans = [IGNORED, *sequence["input_ids"][1:]], sequence.get("spans", [])
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        trained[start:end] = [IGNORED] * (end - start)
    return {**sequence, "labels": trained, "answers": labels}


def _count(labels: Any) -> int:
    """The tokens that are predicted: the first one never is."""
    return sum(int(label) != IGNORED for label in labels[1:])


def _marks(sequence: dict[str, Any]) -> list[bool]:
    """Whether each position with loss belongs to the answer."""
    pairs = zip(sequence["labels"][1:], sequence["answers"][1:], strict=True)
    return [answer != IGNORED for label, answer in pairs if label != IGNORED]


class PackedPreferences(PackingCollator):
    """Collates bins of rows, each of which becomes two examples of its bin; rows that are not packed as `plain` does."""

    plain: Any

    def __init__(self, plain: PreferenceCollator, flatten: bool, few_widths: bool = True) -> None:
        super().__init__(plain, flatten, few_widths)  # type: ignore[arg-type]

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        if not isinstance(items[0], Bin):
            batch: dict[str, torch.Tensor] = self.plain(items)
            return batch
        rows = [row for each in items for row in each.rows]
        inner = [Bin(self.plain.sequences(each.rows), each.width) for each in items]
        sequences = [row for each in inner for row in each.rows]
        found: dict[str, torch.Tensor] = self.plain.with_loss(rows, sequences, self.collate_bins(inner))
        return found
