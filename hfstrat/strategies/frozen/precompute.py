"""Does it pay to compute what is frozen once? Floating-point operations, counted from parameters and lengths.

What a frozen part computes, computed once: the hidden states at its end become a column of the data.

Promised: a run with the column is the run without it. Rows computed in batches of the shape that training uses are the same
bit for bit; where a row shares a batch with others than it was computed with, the batch may be of another width, for which
other kernels add up in another order, and the last bit may differ (in float32 within 1e-5 of what follows). Rows are computed
longest first, `micro_batch` at a time, in a fixed order, so that building again, after a kill or on another day, gives the
same column, and so does resuming with it. Evaluation rows are computed in the very batches that evaluations use. Where rows
are packed their states stand side by side as their tokens do; they are computed as rows that stand alone, so that runs that
pack and runs that do not share them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hfstrat.data import cache
from hfstrat.data.splits import column, distinct
from hfstrat.errors import UserError
from hfstrat.models.quantization import elements
from hfstrat.recipe.format import file_size
from hfstrat.strategies.frozen.boundary import COLUMN, Batch, Boundary, Still, evaluating, named_blocks
from hfstrat.strategies.frozen.prefix import Prefix, Refused, can_precompute, find_prefix
from hfstrat.strategies.frozen.states import (
    States,
    StatesCollator,
    WithStates,
    digest_of_rows,
    digest_of_weights,
    in_batches,
    surroundings,
    write,
)
from hfstrat.trainer import distributed

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.strategies.frozen.prefix import Prefix
    from hfstrat.trainer.train_data import TrainData


def predicted_gain(feed: TrainData, prefix: Prefix) -> float:
    """How many times faster `E` epochs are: `E (Ff + 3 Ft) / (Ff + 3 E Ft)`.

    `Ff` is the forward pass of the frozen part and `Ft` that of the rest, whose backward pass costs twice as much, or once
    where its weights are frozen too. Rows that stand in the data more than once are computed once.
    """
    length = float(np.mean(column(feed.train, "length")))
    blocks = named_blocks(prefix.boundary.model)
    costs = [_forward(block.module, length, prefix.boundary.model.config) for block in blocks]
    once = sum(costs[: prefix.frozen])
    rest = sum(
        cost * (2 + _learning(b.module)) for cost, b in zip(costs[prefix.frozen :], blocks[prefix.frozen :], strict=True)
    )
    rest += _head(feed, prefix.boundary.model)
    return gain(once, rest, feed.epochs, feed.distinct_rows / len(feed.train))


def gain(once: float, rest: float, epochs: float, share: float = 1.0) -> float:
    """The formula; `rest` is forward and backward of what is not frozen, `share` that of the rows that are different ones."""
    return epochs * (once + rest) / (share * once + epochs * rest)


def _forward(block: nn.Module, length: float, config: Any) -> float:
    """Operations a token: two for each weight, and those of attention."""
    width = getattr(config.get_text_config(), "hidden_size", 0)
    return 2.0 * sum(elements(p) for p in block.parameters()) + 4.0 * length * width


def _learning(module: nn.Module) -> float:
    sizes = [(elements(p), p.requires_grad) for p in module.parameters()]
    return sum(n for n, learns in sizes if learns) / max(1, sum(n for n, _ in sizes))


def _head(feed: TrainData, model: Any) -> float:
    """Operations a token of the LM head, through which only tokens go that carry loss; heads of classifiers cost nothing."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return 0.0
    return 2.0 * weight.numel() * feed.supervised_share * (2 + weight.requires_grad)


KEY = "strategy.precompute"


PAYS = 1.1  # predicted gain below which the room on the disk and the wait are not worth it


TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a number: how far the whole model may be from the model with stored states


__all__ = ["Refused", "can_precompute", "find_prefix", "precompute"]


Wish = bool | Literal["auto"]


def precompute(feed: TrainData, model: nn.Module, wish: Wish, still: bool = False) -> TrainData:
    """Compute what is frozen once, if that can be done and pays, and give the rows with it.

    Args:
        wish: `auto` decides, and says so; `True` makes a reason against it an error.
        still: keep the frozen part in evaluation mode, without dropout, whether it is computed once or not.

    Raises:
        UserError: `on`, and it cannot be; or `still`, and nobody knows what is frozen.
    """
    if wish is False and not still:
        return feed
    if distributed.is_sharded():
        return _refuse(feed, wish, "no process has the whole model on its device")
    model.to(feed.device)
    with feed.computing():
        try:
            batch = feed.batch([len(feed.eval) - 1, 0] if len(feed.eval) > 1 else [0])
            prefix = find_prefix(model, batch)
        except Refused as refusal:
            if still:
                raise UserError(f"strategy.frozen_dropout: false: {refusal}; remove it") from None
            return _refuse(feed, wish, str(refusal))
        if still:
            feed = feed.with_undo(Still(list(prefix.modules.values())).release)
        try:
            if wish is False:
                raise Refused("precompute: off")
            return _once(feed, prefix, batch, wish)
        except Refused as refusal:
            prefix.boundary.unbind()
            return feed if wish is False else _refuse(feed, wish, str(refusal))


def _refuse(feed: TrainData, wish: Wish, reason: str) -> TrainData:
    if wish is True:
        raise UserError(f"{KEY}: on, but {reason}; set auto or off, or change that")
    feed.say(f"{'once':<9} nothing frozen is computed once: {reason}")
    return replace(feed, facts={"not_precomputed": reason})


def _once(feed: TrainData, prefix: Prefix, batch: Batch, wish: Wish) -> TrainData:
    """Raises Refused with a reason against it."""
    if reason := can_precompute(prefix, batch):
        raise Refused(reason)
    if not feed.is_endless:
        gain = predicted_gain(feed.unpacked, prefix)
        if gain < PAYS and wish == "auto":
            raise Refused(f"it would not pay (predicted {gain:.2f}x over {feed.epochs:.3g} epochs)")
    elif wish == "auto":
        raise Refused("max_time alone does not say how many epochs there will be; precompute: on does it all the same")
    states = prefix.boundary.take(batch)
    width, size = states.shape[2], states.dtype.itemsize
    parts = {name: _Part.of(rows) for name, rows in (("train", feed.unpacked.train), ("eval", feed.eval))}
    needed = sum(int(part.lengths.sum()) for part in parts.values()) * width * size
    text = f"hidden states of {sum(map(len, parts.values())):,} rows"
    if reason := _no_room(feed, needed, text):
        raise Refused(reason)
    more = "" if feed.is_endless else f", predicted {gain:.1f}x over {feed.epochs:.3g} epochs"
    feed.say(f"{'once':<9} {text} computed once, after {prefix.frozen} of {prefix.blocks} blocks: {file_size(needed)}{more}")
    return _with_states(feed, prefix, parts, states.dtype, width)


def _no_room(feed: TrainData, needed: int, text: str) -> str | None:
    """Why this does not fit on the disk of one of the machines."""
    try:
        cache.check_free_space(needed, text)
        mine = None
    except UserError as error:
        mine = str(error)
    return next((reason for reason in feed.group.gather(mine) if reason), None)


@dataclass
class _Part:
    """The different rows of a data set: which they are, their lengths, and which of them each row is."""

    rows: Any
    first: np.ndarray
    lengths: np.ndarray
    which: np.ndarray

    @classmethod
    def of(cls, rows: Any) -> _Part:
        first, which = distinct(rows)
        return cls(rows, first, column(rows, "length")[first], which)

    def __len__(self) -> int:
        return len(self.first)


def _with_states(feed: TrainData, prefix: Prefix, parts: dict[str, _Part], dtype: torch.dtype, width: int) -> TrainData:
    weights, built, size, started = digest_of_weights(prefix.boundary.model), [], 0, time.monotonic()
    unpacked = feed.unpacked  # packed or not, rows have the same states
    made: dict[str, Any] = {}
    for name, part in parts.items():
        batch_size = feed.plan.micro_batch if name == "train" else feed.plan.eval_batch
        # evaluations take their rows as they stand, longest first
        order = np.lexsort((part.first, -part.lengths)) if name == "train" else np.argsort(part.first)
        inputs = {
            "weights": weights,
            "rows": digest_of_rows(part.rows, part.first[order]),
            "boundary": prefix.boundary.skipped[-1].name,
            "batch": batch_size,
            **surroundings(unpacked, prefix.boundary.model, dtype),
        }

        def build(
            target: Path | None, name: str = name, part: _Part = part, order: Any = order, size: int = batch_size
        ) -> None:
            built.append(name)
            write(target, _computed(unpacked, prefix.boundary, part, order, size, whole=name == "train"), dtype)

        needed = int(part.lengths.sum()) * width * dtype.itemsize
        text = f"hidden states of {len(part):,} rows after {prefix.boundary.skipped[-1].name}"
        entry = feed.group.fetch("hidden_states", cache.fingerprint(inputs), text, build, needed)
        places = np.argsort(order)[part.which]
        made[name] = WithStates(part.rows, States(entry.path, width), places)
        size += entry.size
    seconds = time.monotonic() - started
    with_them = feed.with_rows(StatesCollator(feed.collate, prefix.boundary, dtype), made["train"], made["eval"])
    _check(with_them, made["train"], prefix.boundary.model)
    feed.say(f"{'once':<9} {f'computed in {seconds:.1f} s' if built else 'found in the cache'}")
    facts = {
        "rows": {name: len(part) for name, part in parts.items()},
        "bytes": size,
        "seconds": seconds,
        "built": built,
        "blocks": [prefix.frozen, prefix.blocks],
        "predicted_gain": None if feed.is_endless else predicted_gain(unpacked, prefix),
    }
    return replace(with_them, facts={"precomputed": facts}).with_undo(prefix.boundary.unbind)


def _computed(feed: TrainData, boundary: Boundary, part: _Part, order: np.ndarray, size: int, whole: bool) -> Any:
    """The states of each batch's rows; a last batch that is too small is filled up if `whole`."""

    def take(group: list[int]) -> list[torch.Tensor]:
        filled = group + group[-1:] * (size - len(group)) if whole else group
        states = boundary.take(feed.batch([int(part.first[i]) for i in filled], part.rows))
        return [states[place, : part.lengths[i]].cpu() for place, i in enumerate(group)]

    with torch.no_grad(), evaluating(boundary.model):
        yield from feed.each(list(in_batches(order, size)), take, "computing what is frozen")


def _check(feed: TrainData, rows: WithStates, model: nn.Module) -> None:
    """Compare the model with stored states with the whole model, on the longest, the shortest and two other rows.

    And on the first packed batch, where rows are packed.

    Raises:
        Refused: they do not say the same.
    """
    by_length = np.argsort(-column(rows.rows, "length"), kind="stable")
    chosen = by_length[np.unique(np.linspace(0, len(by_length) - 1, min(4, feed.plan.micro_batch)).astype(int))]
    _compare(feed, feed.batch([int(i) for i in chosen], rows), model)
    if feed.plan.bins:
        _compare(feed, feed.batch(list(range(feed.plan.bins_at_once)), feed.train), model)


def _compare(feed: TrainData, batch: Batch, model: nn.Module) -> None:
    with torch.no_grad(), evaluating(model):
        stored = model(**batch)
        whole = model(**{name: value for name, value in batch.items() if name != COLUMN})
    for name, value in whole.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        ours, theirs = (_real(tensor, batch.get("attention_mask")).float() for tensor in (stored[name], value))
        allowed = TOLERANCE[min(4, feed.dtype.itemsize)] * max(1.0, float(theirs.abs().max()))
        if not float((ours - theirs).abs().max()) <= allowed:
            raise Refused(
                f"with stored hidden states {type(model).__name__} says something else ({name} differs by "
                f"{float((ours - theirs).abs().max()):.2g}): its blocks pass on more than hidden states"
            )


def _real(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Without padded positions, where a tensor has positions."""
    return tensor[mask.bool()] if mask is not None and tensor.shape[:2] == mask.shape else tensor
