"""Packing: several rows of a step in one batch row. No number of the run changes, only padding disappears.

The rows of one optimizer step are packed together, so that a global batch has the same examples with and without packing.
Why not TRL's packing: it packs the data set before training, so that the examples of a step change, and it flattens a batch
into one row, whose attention costs the square of its length without flash attention (12.9 s against 8.7 s for 4 x 512 tokens).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hfstrat.data.collate import BatchOrder, Collator, loss_positions, rounded
from hfstrat.data.render import IGNORED
from hfstrat.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED_STEPS = 200  # steps from which the padding and the number of bins are computed
TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a weight: difference of packed to alone, relative to the largest hidden value


class Bin(NamedTuple):
    """The rows that form one packed batch row, and its width in tokens."""

    rows: list[dict[str, Any]]
    width: int


def balance(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Positions of the rows in each of `bins` bins: longest first, each into the emptiest bin (Graham 1969)."""
    filled = [(0, number) for number in range(bins)]
    content: list[list[int]] = [[] for _ in range(bins)]
    for position in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        tokens, emptiest = filled[0]
        heapq.heapreplace(filled, (tokens + int(lengths[position]), emptiest))
        content[emptiest].append(position)
    return content


class PackedRows(Dataset[Bin]):
    """The bins of every step, one after another: item `step * bins + k` is bin `k` of that step.

    Every step has the same number of bins, so that accumulation is constant; their width is the fullest one's, rounded.

    Args:
        order: of the examples, a `BatchOrder` or a `DenseOrder`.
    """

    def __init__(self, rows: Any, order: Any, bins: int, multiple: int) -> None:
        self.rows, self.order, self.bins, self.multiple = rows, order, bins, multiple
        self.step = lru_cache(maxsize=4)(self._step)

    def with_rows(self, rows: Any) -> PackedRows:
        """The same bins of other rows, for example of these with another column."""
        return type(self)(rows, self.order, self.bins, self.multiple)

    def _step(self, step: int) -> tuple[list[np.ndarray], int]:
        """The row indices of each bin, and the width of all of them."""
        rows = self.order.batch(step)
        lengths = self.order.lengths[rows]
        packed = balance(lengths.tolist(), self.bins)
        return [rows[each] for each in packed], rounded(max(int(lengths[each].sum()) for each in packed), self.multiple)

    def __getitem__(self, item: int) -> Bin:
        packed, width = self.step(item // self.bins)
        return Bin([self.rows[int(row)] for row in packed[item % self.bins]], width)

    def __len__(self) -> int:
        return self.order.steps * self.bins


class InOrder(Sampler[int]):
    """The items one after another: bins are stored in the order of their steps."""

    def __init__(self, items: int) -> None:
        self.items = items

    def begin(self, step: int) -> None:
        """Does nothing: the position of a step is known."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.items))

    def __len__(self) -> int:
        return self.items


class PackingCollator:
    """Collates bins: `input_ids`, `labels`, `position_ids` (int64 `[B, T]`), `loss_rows` and `targets` as `Collator` does.

    Position ids restart with each example and there is no attention mask: transformers distinguishes the examples by this.
    One bin stays one batch row, since attention costs the square of a row's length; kernels for variable lengths, which have no
    such cost, get a single row without padding between the bins (`flatten`). Padding is an example of its own. Rows that are
    not packed, those of the evaluation, are collated by `plain`.

    Args:
        few_widths: whether flattened rows have few distinct widths, for kernels that are compiled for each.
    """

    def __init__(self, plain: Collator, flatten: bool, few_widths: bool = True) -> None:
        self.plain, self.flatten, self.few_widths = plain, flatten, few_widths
        self.is_paired = plain.is_paired

    def width(self, tokens: int) -> int:
        """The width of a flattened row, also of one without examples."""
        tokens, multiple = max(tokens, 1), self.plain.multiple
        return rounded(tokens, multiple) if self.few_widths else -(-tokens // multiple) * multiple

    def positions(self, widths: Sequence[int], tokens: Sequence[int]) -> int:
        """Positions of a batch, padding included, from the width and the tokens of each of its bins."""
        return self.width(sum(tokens)) if self.flatten else sum(widths)

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        return self.collate_bins(items) if isinstance(items[0], Bin) else self.plain(items)

    def collate_bins(self, bins: list[Bin]) -> dict[str, torch.Tensor]:
        if self.flatten:
            rows = [row for each in bins for row in each.rows]
            bins = [Bin(rows, self.width(sum(len(row["input_ids"]) for row in rows)))]
        shape = (len(bins), bins[0].width)
        ids, labels = torch.full(shape, self.plain.pad_token_id), torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        for index, each in enumerate(bins):
            start = 0
            for row in each.rows:
                end = start + len(row["input_ids"])
                ids[index, start:end] = torch.as_tensor(row["input_ids"])
                labels[index, start + 1 : end] = torch.as_tensor(row["labels"][1:])  # nothing predicts the first token
                positions[index, start:end] = torch.arange(end - start)
                start = end
            positions[index, start:] = torch.arange(shape[1] - start)
        return {"input_ids": ids, "labels": labels, "position_ids": positions, **loss_positions(labels)}


def count_bins(order: BatchOrder, capacity: int, unit: int) -> int:
    """Bins per step, a multiple of `unit` (those of one pass of all processes), rarely fuller than `capacity` tokens."""
    steps = [order.lengths[order.batch(step)].tolist() for step in range(min(SAMPLED_STEPS, order.steps))]
    bins = -(-max(map(sum, steps)) // capacity)
    bins = -(-bins // unit) * unit
    while any(max(sum(step[place] for place in each) for each in balance(step, bins)) > capacity for step in steps):
        bins += unit  # with one row in each, the longest row is the fullest bin
    return bins


def padding_share(order: BatchOrder, micro_batch: int, multiple: int) -> float:
    """The share of positions that are padding in batches of `micro_batch` rows."""
    tokens = positions = 0
    for step in range(min(SAMPLED_STEPS, order.steps)):
        lengths = order.lengths[order.batch(step) % len(order.lengths)]
        tokens += int(lengths.sum())
        positions += sum(
            len(part) * rounded(int(part[0]), multiple)
            for part in np.split(lengths, range(micro_batch, len(lengths), micro_batch))
        )
    return 1 - tokens / positions


def packed_padding_share(rows: PackedRows, collate: PackingCollator, at_once: int) -> float:
    """The share of positions that are padding in packed batches of `at_once` bins."""
    tokens = positions = 0
    for step in range(min(SAMPLED_STEPS, rows.order.steps)):
        packed, width = rows.step(step)
        filled = [int(rows.order.lengths[each].sum()) for each in packed]
        tokens += sum(filled)
        for start in range(0, rows.bins, at_once):
            part = filled[start : start + at_once]
            positions += collate.positions([width] * len(part), part)
    return 1 - tokens / positions


@torch.no_grad()
def find_leak(model: PreTrainedModel, flatten: bool, dtype: torch.dtype = torch.float32) -> str | None:
    """Test on this model and its attention that packed examples do not see each other.

    Two bins of three random examples are run: each example must have the hidden states that it has alone, and when one
    example changes, those of every other must stay exactly the same.

    Args:
        dtype: of the forward pass in training.

    Returns:
        None, or what failed.
    """
    was_training, device = model.training, model.get_input_embeddings().weight.device.type
    model.eval()
    try:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return _find_leak(model, flatten, dtype)
    except Exception as error:  # an unforeseen architecture can fail in any way
        return f"its forward does not accept packed rows ({type(error).__name__}: {first_line(error)})"
    finally:
        model.train(was_training)


def _find_leak(model: PreTrainedModel, flatten: bool, dtype: torch.dtype) -> str | None:
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    collate = PackingCollator(Collator(0, 1, masks_logits=False), flatten)

    def example(length: int) -> list[int]:
        return torch.randint(0, weight.shape[0], (length,), generator=generator).tolist()

    def hidden(bins: list[list[list[int]]], width: int) -> list[list[torch.Tensor]]:
        items = [Bin([{"input_ids": ids, "labels": ids} for ids in each], width) for each in bins]
        batch = {k: v.to(weight.device) for k, v in collate(items).items() if k in ("input_ids", "position_ids")}
        out = model.base_model(**batch, use_cache=False).last_hidden_state
        filled = [sum(map(len, each)) for each in bins]
        rows = out[0, : sum(filled)].split(filled) if flatten else [row[:n] for row, n in zip(out, filled, strict=True)]
        return [list(row.split([len(ids) for ids in each])) for row, each in zip(rows, bins, strict=True)]

    bins = [[example(n) for n in lengths] for lengths in ((5, 7, 4), (9, 3, 6))]
    before = hidden(bins, 20)
    size = TOLERANCE[min(4, dtype.itemsize, before[0][0].dtype.itemsize)] * max(
        float(each.abs().max()) for row in before for each in row
    )
    for row, examples in enumerate(bins):
        for place, ids in enumerate(examples):
            alone = hidden([[ids]], len(ids))[0][0]
            if not float((alone - before[row][place]).abs().max()) <= size:
                return "a packed example does not have the hidden states that it has alone"
            changed = [[list(each) for each in other] for other in bins]
            changed[row][place] = example(len(ids))
            after = hidden(changed, 20)
            for r, p in ((r, p) for r in range(2) for p in range(3) if (r, p) != (row, place)):
                if not torch.equal(before[r][p], after[r][p]):
                    return "a packed example changes with its neighbor"
            if torch.equal(before[row][place], after[row][place]):
                return "a changed example has unchanged hidden states"
    return None
