"""Which rows form which batch, and how they become tensors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import repeat
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Sampler

from hfstrat.data.render import IGNORED

WINDOW_ROWS = 256  # rows that are sorted by length together
TEACHER_TYPES = "teacher_types"


class BatchOrder(Sampler[int]):
    """The complete run as one stream of row indices, a function of seed and position only.

    Step `s` takes positions `s*G ... (s+1)*G` of an endless sequence of seeded permutations, so that every optimizer step has
    exactly `G` rows for any number of processes and any micro-batch, and a resumed run finds its position without reading a
    row. Within a step rows are sorted by length, longest first: micro-batches have little padding, processes get similar work,
    and the gradient, a sum over the tokens of the step, is the same.

    With `group_by_length` the rows of several steps (WINDOW_ROWS of them, never across the end of an epoch) are first sorted
    by length together, and the resulting steps are shuffled: every row is still seen once per epoch.

    With `numbers_epochs` an index is `epoch * rows + row`, for data that are augmented in each epoch (`EpochRows`).
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        global_batch_size: int,
        steps: int,
        seed: int,
        group_by_length: bool = False,
        numbers_epochs: bool = False,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.global_batch_size = global_batch_size
        self.steps = steps
        self.seed, self.numbers_epochs = seed, numbers_epochs
        self.first = 0  # step at which this session starts
        self.window = max(1, WINDOW_ROWS // global_batch_size) if group_by_length else 1  # steps
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._grouped = lru_cache(maxsize=2)(self._group)

    def _permute(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        if self.numbers_epochs:
            return order + epoch * len(order)
        return order.astype(np.int32) if len(order) < 2**31 else order  # those of two epochs are cached

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Row indices at positions `start ... stop` of the sequence of permutations."""
        epochs, places = np.divmod(np.arange(start, stop), len(self.lengths))
        return np.concatenate([self._permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.lexsort((rows, -self.lengths[rows % len(self.lengths)]))]

    def _group(self, first: int, stop: int) -> np.ndarray:
        """Rows of the steps `first ... stop`, sorted together and distributed again: `[stop - first, G]`."""
        size = self.global_batch_size
        steps = self._longest_first(self._stream(first * size, stop * size)).reshape(-1, size)
        return np.random.default_rng((self.seed, first, 1)).permutation(steps)

    def batch(self, step: int) -> np.ndarray:
        """Row indices of one optimizer step, longest first: shape `[global_batch_size]`."""
        size, rows = self.global_batch_size, len(self.lengths)
        if self.window == 1:
            return self._longest_first(self._stream(step * size, (step + 1) * size))
        epoch = step * size // rows
        begin, end = -(-epoch * rows // size), -(-(epoch + 1) * rows // size)  # steps; windows end where epochs do
        first = begin + (step - begin) // self.window * self.window
        grouped: np.ndarray = self._grouped(first, min(first + self.window, end))
        return grouped[step - first]

    def tokens(self, step: int) -> int:
        """Tokens of one optimizer step without padding, over all processes."""
        return int(self.lengths[self.batch(step) % len(self.lengths)].sum())

    def begin(self, step: int) -> None:
        """Start at this step. The stream still has its full length, but the positions before the step are not computed, since
        a resumed run skips them."""
        self.first = step

    def __iter__(self) -> Iterator[int]:
        yield from repeat(0, self.first * self.global_batch_size)
        for step in range(self.first, self.steps):
            yield from self.batch(step).tolist()

    def __len__(self) -> int:
        return self.steps * self.global_batch_size


class TokenCollator(ABC):
    """Pads rows of token ids on the right to one of few widths (`rounded`).

    Every collator states whether it pads (`pads`; one of features does not) and whether its batches name the positions with
    loss (`selects_rows`: `loss_rows` and `targets`, which a model with our loss bound to it takes).
    """

    pads = True
    sizes_batches = True  # whether examples run through the complete model, so that memory limits their number
    varies = False  # whether an example is another one in each epoch, so that nothing of it can be cached
    views = 1  # of each example whose features are computed once
    selects_rows = False
    units: Any = None  # of the model's outputs, where they are numbers and no logits
    is_paired = False  # whether an example is two sequences
    generates = False  # whether the model answers an example, so that no states of it can be cached
    packs = True  # whether several examples may share a sequence
    labels: int | None = None  # the number of labels, where a row may have several
    unpacked_because = "an answer and the one it is compared with are batches of their own"  # where `packs` is False
    packed: Any = None  # makes the collator of bins of these examples, where it is not `packing.PackingCollator`
    pad_token_id: int
    multiple: int

    @abstractmethod
    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]: ...

    def pad(self, rows: list[dict[str, Any]], **fill: int) -> dict[str, torch.Tensor]:
        """Columns of the rows by name, padded with the given number, and `attention_mask`: int64 `[B, T]` each."""
        shape = (len(rows), rounded(max(len(row["input_ids"]) for row in rows), self.multiple))
        batch = {name: torch.full(shape, number) for name, number in {**fill, "attention_mask": 0}.items()}
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            for name in fill:
                batch[name][index, :length] = torch.as_tensor(row[name])
        return batch

    def of_epoch(self, rows: Any, place: int, epoch: int) -> dict[str, Any]:
        """The row at a place as it is in an epoch, for a collator that `varies`; or in a view, for one with several."""
        return {**rows[place], "epoch": epoch}

    def encode_labels(self, values: list[Any]) -> torch.Tensor:
        """The `label` of rows as they are in a batch."""
        if self.labels is None:
            return torch.tensor(values, dtype=torch.long)
        marks = torch.zeros(len(values), self.labels)
        for index, labels in enumerate(values):
            marks[index, labels] = 1.0
        return marks


class Collator(TokenCollator):
    """Collates rows of a causal language model.

    Batches have `input_ids`, `attention_mask`, `labels` (int64 `[B, T]`, `labels` -100 where there is no loss) and the
    positions whose next token has loss, since only these go through the LM head: for a model with our loss bound to it as
    `loss_rows` (int64 `[n]`, indices into B*T) and `targets` (int64 `[n]`, the next tokens), computed here so that no device
    has to synchronize to count them; else, for models that accept it, as `logits_to_keep` (bool `[B, T]`).
    """

    def __init__(self, pad_token_id: int, multiple: int, masks_logits: bool, selects_rows: bool = False) -> None:
        self.pad_token_id, self.multiple = pad_token_id, multiple
        self.masks_logits, self.selects_rows = masks_logits, selects_rows

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.pad(rows, input_ids=self.pad_token_id, labels=IGNORED)
        if self.selects_rows:
            return batch | loss_positions(batch["labels"])
        if self.masks_logits:
            batch["logits_to_keep"] = shift(batch["labels"]) != IGNORED
        return batch


def rounded(length: int, multiple: int) -> int:
    """A width of at least `length`: a multiple of `multiple` and of an eighth of the power of two below it.

    There are few widths, so that kernels compiled for a shape (by oneDNN or `torch.compile`) and cached memory are reused;
    beyond `multiple`, padding is never more than an eighth.
    """
    step = max(multiple, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def in_full_precision() -> AbstractContextManager[None]:
    """No autocast on the CPU, where processors compute: a batch may be made where a forward pass is to have 16 bits."""
    return torch.autocast("cpu", enabled=False)


def shift(labels: torch.Tensor) -> torch.Tensor:
    """What each position predicts: the label to its right (`[B, T]`, -100 at the end)."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def loss_positions(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """`loss_rows` (int64 `[n]`, indices into B*T) and `targets` (int64 `[n]`) of labels `[B, T]`."""
    targets = shift(labels).flatten()
    rows = (targets != IGNORED).nonzero()[:, 0]
    return {"loss_rows": rows, "targets": targets[rows]}


def has_token_types(model: Any) -> bool:
    """Whether a model distinguishes the two texts of a pair by `token_type_ids`."""
    return (getattr(model.config, "type_vocab_size", 0) or 0) > 1


class ClassCollator(TokenCollator):
    """Collates rows of a classification.

    Batches have `input_ids`, `attention_mask` (int64 `[B, T]`), `token_type_ids` for models that distinguish two texts by
    them, and `labels`: int64 `[B]`, or float `[B, labels]` of 0 and 1 where a row may have several.

    Args:
        has_types: whether the model uses `token_type_ids`.
        labels: the number of labels, where a row may have several; None for one per row.
    """

    def __init__(self, pad_token_id: int, multiple: int, has_types: bool, labels: int | None = None) -> None:
        self.pad_token_id, self.multiple, self.has_types, self.labels = pad_token_id, multiple, has_types, labels
        self.types = ["token_type_ids"] if has_types else []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.pad(rows, input_ids=self.pad_token_id)
        for name in self.types:
            batch[name] = torch.zeros_like(batch["input_ids"])
            for index, row in enumerate(rows):
                batch[name][index, : len(row["token_type_ids"])] = torch.as_tensor(row["token_type_ids"])
        batch["labels"] = self.encode_labels([row["label"] for row in rows])
        return batch

    def with_teacher(self, has_types: bool) -> Self:
        """The same for a teacher, which gets `teacher_types` if it distinguishes two texts by token types."""
        found = copy.copy(self)
        found.types = [*self.types, TEACHER_TYPES] if has_types else self.types
        return found
