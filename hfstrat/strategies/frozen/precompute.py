"""Hidden states at the end of a frozen prefix, cached as a column of the data: whether that saves time, and computing them.

A run with the column equals the run without it. States computed in batches of the same shape as in training are equal bit for
bit; in a batch of another width other kernels sum in another order, and the last bit may differ (in float32 within 1e-5 of what
follows). Examples are computed longest first, `micro_batch` at a time, in a fixed order, so that computing them again gives the
same column, also after an interruption. Evaluation examples are computed in the batches of an evaluation. Packed examples have
the states of unpacked ones, so runs with and without packing share them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hfstrat.data import cache
from hfstrat.data.splits import column, distinct
from hfstrat.errors import UserError, first_line
from hfstrat.models import router_loss
from hfstrat.models.blocks import evaluating
from hfstrat.models.quantization import elements
from hfstrat.recipe.format import file_size, plural
from hfstrat.strategies.description import PAYS
from hfstrat.strategies.frozen.boundary import (
    COLUMN,
    RAW,
    Batch,
    Boundary,
    Prefix,
    Refused,
    Still,
    can_precompute,
    find_prefix,
    named_blocks,
)
from hfstrat.trainer import distributed
from hfstrat.trainer.cached_columns import (
    CachedColumnCollator,
    Collate,
    WithColumn,
    cache_inputs,
    digest_of_rows,
    digest_of_weights,
    groups_of,
    read_column,
    sample_batch,
    write_column,
)
from hfstrat.trainer.train_data import TrainData

KEY = "strategy.precompute"
TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a number: allowed difference of outputs with cached states
Mode = bool | Literal["auto"]


def precompute(data: TrainData, model: nn.Module, mode: Mode, still: bool = False) -> TrainData:
    """Cache the hidden states of the frozen prefix, if that is possible and saves time.

    Args:
        mode: `auto` decides, and reports the reason; `true` makes a reason against it an error.
        still: keep the frozen part in evaluation mode, without dropout, whether it is cached or not.

    Raises:
        UserError: `true`, and it is not possible; or `still`, and the frozen part is unknown.
    """
    if mode is False and not still:
        return data
    if distributed.is_sharded():
        return _not_cached(data, mode, "no process has the full model on its device")
    if getattr(data.collate, "varies", False):
        return _not_cached(data, mode, "training examples are augmented in each epoch (augmentation)")
    if getattr(data.collate, "generates", False):
        return _not_cached(data, mode, "the answers change with the model")
    model.to(data.device)
    with data.autocast():
        try:
            batch = sample_batch(data)
            prefix = find_prefix(model, batch)
        except Refused as refusal:
            if still:
                raise UserError(f"strategy.frozen_dropout: false: {refusal}; remove it") from None
            return _not_cached(data, mode, str(refusal))
        if still:
            data = data.with_undo(Still(list(prefix.modules.values())).release)
        try:
            if mode is False:
                raise Refused("precompute: false")
            if data.is_streamed:
                raise Refused("rows are read while training (data.streaming)")
            if getattr(data.collate, "is_paired", False):
                raise Refused("an example is a pair of sequences")
            if router_loss.coefficient(model):
                raise Refused("the load-balancing loss of this mixture of experts needs the routers of all layers")
            return _cache_prefix(data, prefix, batch, mode)
        except Refused as refusal:
            prefix.boundary.unbind()
            return data if mode is False else _not_cached(data, mode, str(refusal))


def _not_cached(data: TrainData, mode: Mode, reason: str) -> TrainData:
    if mode is True:
        raise UserError(f"{KEY}: true, but {reason}; set auto or false")
    data.say(f"{'cache':<9} frozen hidden states are not cached: {reason}")
    return replace(data, facts={"not_precomputed": reason})


def _cache_prefix(data: TrainData, prefix: Prefix, batch: Batch, mode: Mode) -> TrainData:
    """The data with cached states. Raises Refused with a reason against it."""
    if getattr(data.collate, "pads", True) and "input_ids" not in batch:
        raise Refused("recordings have different lengths, for which the model makes its own masks")
    if reason := can_precompute(prefix, batch):
        raise Refused(reason)
    speedup = None if data.is_endless else predicted_gain(data.unpacked, prefix)
    if speedup is None and mode == "auto":
        raise Refused("with max_time the number of epochs is unknown; set precompute: true to cache them anyway")
    if speedup is not None and speedup < PAYS and mode == "auto":
        raise Refused(f"it would not save time (predicted {speedup:.2f}x over {data.epochs:.3g} epochs)")
    states = prefix.boundary.take(batch)
    if states.dim() != 3:
        raise Refused("its hidden states are no sequence")
    parts = {name: _Part.of(rows) for name, rows in (("train", data.unpacked.train), ("eval", data.eval))}
    if not getattr(data.collate, "pads", True):  # every example has as many states
        parts = {name: part._replace(lengths=np.full_like(part.lengths, states.shape[1])) for name, part in parts.items()}
    needed = sum(int(part.lengths.sum()) for part in parts.values()) * states.shape[2] * states.dtype.itemsize
    text = f"hidden states of {plural(sum(len(part.first) for part in parts.values()), 'example')}"
    if reason := _lack_of_room(data, needed, text):
        raise Refused(reason)
    more = "" if speedup is None else f", predicted {speedup:.1f}x over {data.epochs:.3g} epochs"
    data.say(f"{'cache':<9} {text} after {prefix.frozen} of {prefix.blocks} blocks: {file_size(needed)}{more}")
    return _add_states(data, prefix, parts, states, {"predicted_gain": speedup})


def _lack_of_room(data: TrainData, needed: int, text: str) -> str | None:
    """The reason why this does not fit on the disk of one of the machines, or None."""
    try:
        cache.check_free_space(needed, text)
        mine = None
    except UserError as error:
        mine = str(error)
    return next((reason for reason in data.group.gather(mine) if reason), None)


class _Part(NamedTuple):
    """The distinct examples of a dataset: their places and lengths, and the one that each example equals."""

    rows: Any
    first: np.ndarray
    lengths: np.ndarray
    which: np.ndarray

    @classmethod
    def of(cls, rows: Any) -> _Part:
        first, which = distinct(rows)
        return cls(rows, first, column(rows, "length")[first], which)


def _add_states(
    data: TrainData, prefix: Prefix, parts: dict[str, _Part], states: torch.Tensor, facts: dict[str, Any]
) -> TrainData:
    """The data with the states of all examples, which are like `states` (`[B, T, H]`)."""
    weights, built, size, started = digest_of_weights(prefix.boundary.model), list[str](), 0, time.monotonic()
    made: dict[str, WithStates] = {}
    for name, part in parts.items():
        entry, places = _fetch_states(data, prefix, name, part, states, weights, built)
        made[name] = WithStates(part.rows, States(entry.path, states.shape[2]), places)
        size += entry.size
    seconds = time.monotonic() - started
    with_them = data.with_rows(StatesCollator(data.collate, prefix.boundary, states.dtype), made["train"], made["eval"])
    _check(with_them, made["train"], prefix.boundary.model)
    data.say(f"{'cache':<9} {f'computed in {seconds:.1f} s' if built else 'loaded from disk'}")
    facts |= {
        "rows": {name: len(part.first) for name, part in parts.items()},
        "bytes": size,
        "seconds": seconds,
        "built": built,
        "blocks": [prefix.frozen, prefix.blocks],
    }
    return replace(with_them, facts={"precomputed": facts}).with_undo(prefix.boundary.unbind)


def _fetch_states(
    data: TrainData, prefix: Prefix, name: str, part: _Part, states: torch.Tensor, weights: str, built: list[str]
) -> tuple[cache.Entry, np.ndarray]:
    """The cached states of the distinct examples, and the place in it of each example; adds `name` to `built` if computed."""
    boundary, dtype = prefix.boundary, states.dtype
    unpacked = data.unpacked  # with or without packing, examples have the same states
    batch_size = data.plan.micro_batch if name == "train" else data.plan.eval_batch
    # evaluations take their examples in order, longest first
    order = np.lexsort((part.first, -part.lengths)) if name == "train" else np.argsort(part.first)
    inputs = {
        "weights": weights,
        "rows": digest_of_rows(part.rows, part.first[order]),
        "boundary": boundary.skipped[-1].name,
        "batch": batch_size,
        **cache_inputs(unpacked, boundary.model, dtype),
    }

    def build(target: Path | None) -> None:
        built.append(name)
        write(target, _compute_states(unpacked, boundary, part, order, batch_size, whole=name == "train"), dtype)

    needed = int(part.lengths.sum()) * states.shape[2] * dtype.itemsize
    text = f"hidden states of {plural(len(part.first), 'row')} after {boundary.skipped[-1].name}"
    entry = data.group.fetch("hidden_states", cache.fingerprint(inputs), text, build, needed)
    return entry, np.argsort(order)[part.which]


def _compute_states(data: TrainData, boundary: Boundary, part: _Part, order: np.ndarray, size: int, whole: bool) -> Any:
    """The states of each batch; the last batch is filled up to the full size if `whole`."""

    def take(group: list[int]) -> list[torch.Tensor]:
        filled = group + group[-1:] * (size - len(group)) if whole else group
        states = boundary.take(data.batch([int(part.first[i]) for i in filled], part.rows))
        return [states[place, : part.lengths[i]].cpu() for place, i in enumerate(group)]

    with torch.no_grad(), evaluating(boundary.model):
        yield from data.each(groups_of(order, size), take, "computing frozen hidden states")


def _check(data: TrainData, rows: WithStates, model: nn.Module) -> None:
    """Compare the outputs with and without cached states, on the longest, the shortest and two other examples.

    With packing also on the first packed batch.

    Raises Refused: the outputs differ.
    """
    by_length = np.argsort(-column(rows.rows, "length"), kind="stable")
    chosen = by_length[np.unique(np.linspace(0, len(by_length) - 1, min(4, data.plan.micro_batch)).astype(int))]
    _compare(data, data.batch([int(i) for i in chosen], rows), model)
    if data.plan.bins:
        _compare(data, data.batch(list(range(data.plan.bins_at_once)), data.train), model)


def _compare(data: TrainData, batch: Batch, model: nn.Module) -> None:
    with torch.no_grad(), evaluating(model):
        try:
            stored = model(**batch)
        except Exception as error:  # blocks may pass anything to each other
            raise Refused(f"its blocks pass more than hidden states ({type(error).__name__}: {first_line(error)})") from error
        whole = model(**{name: value for name, value in batch.items() if name != COLUMN})
    for name, value in whole.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        ours, theirs = (_unpadded(tensor, batch.get("attention_mask")).float() for tensor in (stored[name], value))
        allowed = TOLERANCE[min(4, data.dtype.itemsize)] * max(1.0, float(theirs.abs().max()))
        if not float((ours - theirs).abs().max()) <= allowed:
            raise Refused(
                f"with cached hidden states the outputs of {type(model).__name__} change ({name} differs by "
                f"{float((ours - theirs).abs().max()):.2g}): its blocks pass more than hidden states"
            )


def _unpadded(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The tensor without padded positions, if it has positions."""
    return tensor[mask.bool()] if mask is not None and tensor.shape[:2] == mask.shape else tensor


def predicted_gain(data: TrainData, prefix: Prefix) -> float:
    """The predicted speedup of `E` epochs: `E (Ff + 3 Ft) / (Ff + 3 E Ft)`.

    `Ff` is the forward pass of the frozen part and `Ft` that of the rest, whose backward pass costs twice as much, or once
    where its weights are frozen too. Duplicates in the data are computed once.
    """
    model, length = prefix.boundary.model, float(np.mean(column(data.train, "length")))
    blocks = [block.module for block in named_blocks(model)]
    once = sum(_forward_cost(block, length, model.config) for block in blocks[: prefix.frozen])
    after = blocks[prefix.frozen :]
    rest = sum(_forward_cost(block, length, model.config) * (2 + _trainable_share(block)) for block in after)
    rest += _head_cost(data, model)
    return gain(once, rest, data.epochs, data.distinct_rows / len(data.train))


def gain(once: float, rest: float, epochs: float, share: float = 1.0) -> float:
    """The formula; `rest` is forward and backward of the part that is not frozen, `share` that of distinct examples."""
    return epochs * (once + rest) / (share * once + epochs * rest)


def _forward_cost(block: nn.Module, length: float, config: Any) -> float:
    """Operations per token: two for each weight, and those of attention."""
    width = getattr(config.get_text_config(), "hidden_size", 0)
    return 2.0 * sum(elements(p) for p in block.parameters()) + 4.0 * length * width


def _trainable_share(module: nn.Module) -> float:
    sizes = [(elements(p), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trainable in sizes if trainable) / max(1, sum(n for n, _ in sizes))


def _head_cost(data: TrainData, model: Any) -> float:
    """Operations per token of the LM head, which only supervised tokens pass; heads of classifiers are neglected."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return 0.0 if weight is None else 2.0 * weight.numel() * data.supervised_share * (2 + weight.requires_grad)


def write(target: Path | None, batches: Iterable[list[torch.Tensor]], dtype: torch.dtype) -> None:
    """Write hidden states `[T, H]` as lists of `T * H` numbers; 16-bit floats are stored as the integers of their bits."""
    kind = pa.from_numpy_dtype(RAW[dtype])

    def array(batch: list[torch.Tensor]) -> pa.Array:
        ends = np.cumsum([0, *(row.numel() for row in batch)])
        flat = torch.cat([row.flatten() for row in batch])
        values = flat.view(torch.int16) if dtype != torch.float32 else flat
        return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(values.numpy(), kind))

    write_column(target, COLUMN, pa.large_list(kind), map(array, batches))


class States:
    """The file of `write`, memory-mapped: `states[i]` is `[T, H]`, of the type in `RAW`."""

    def __init__(self, file: Path, width: int) -> None:
        chunks = read_column(file, COLUMN).chunks
        self.width = width
        self.parts = [(chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=True)) for chunk in chunks]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        offsets, values = self.parts[part]
        place = index - int(self.starts[part])
        return values[offsets[place] : offsets[place + 1]].reshape(-1, self.width)


class WithStates(WithColumn):
    """Examples with their hidden states; `places` has the index in `states` for each example."""

    def __init__(self, rows: Any, states: States, places: np.ndarray) -> None:
        super().__init__(rows, COLUMN, states.__getitem__, places)


class StatesCollator(CachedColumnCollator):
    """Adds the hidden states of each token, and zeros for padding, while the boundary takes them.

    Padded positions reach no other position: attention masks them, or with packing they are an example of their own; they
    carry no loss.
    """

    column = COLUMN

    def __init__(self, collate: Collate, boundary: Boundary, dtype: torch.dtype) -> None:
        super().__init__(collate)
        self.boundary, self.dtype = boundary, dtype

    def added(self, values: list[list[np.ndarray]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.boundary.is_bound:
            return {}
        length, width = (int(size) for size in values[0][0].shape)
        shape = batch["input_ids"].shape if "input_ids" in batch else (len(values), length)
        padded: np.ndarray = np.zeros((*shape, width), dtype=RAW[self.dtype])
        if shape[0] < len(values):  # bins that are flattened into one row
            values = [[row for rows in values for row in rows]]
        for index, rows in enumerate(values):
            start = 0
            for row in rows:
                padded[index, start : start + len(row)] = row
                start += len(row)
        return {COLUMN: torch.from_numpy(padded).view(self.dtype)}
