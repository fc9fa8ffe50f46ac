"""Hidden states at the end of a frozen prefix, cached as a column of the data: whether that saves time, and computing them.

A run with the column equals the run without it. States computed in batches of the same shape as in training are equal bit for
bit; in a batch of another width other kernels sum in another order, and the last bit may differ (in float32 within 1e-5 of what
follows). Examples are computed longest first, `micro_batch` at a time, in a fixed order, so that computing them again gives the
same column, also after an interruption. Evaluation examples are computed in the batches of an evaluation. Packed examples have
the states of unpacked ones, so runs with and without packing share them.
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
from hfstrat.models import router_loss
from hfstrat.models.quantization import elements
from hfstrat.recipe.format import file_size
from hfstrat.strategies.description import PAYS
from hfstrat.strategies.frozen.boundary import COLUMN, Batch, Boundary, Still, evaluating, named_blocks
from hfstrat.strategies.frozen.prefix import Prefix, Refused, can_precompute, find_prefix
from hfstrat.strategies.frozen.states import (
    States,
    StatesCollator,
    WithStates,
    batches_of,
    cache_inputs,
    digest_of_rows,
    digest_of_weights,
    write,
)
from hfstrat.trainer import distributed

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.strategies.frozen.prefix import Prefix
    from hfstrat.trainer.train_data import TrainData


def predicted_gain(feed: TrainData, prefix: Prefix) -> float:
    """The predicted speedup of `E` epochs: `E (Ff + 3 Ft) / (Ff + 3 E Ft)`.

    `Ff` is the forward pass of the frozen part and `Ft` that of the rest, whose backward pass costs twice as much, or once
    where its weights are frozen too. Duplicates in the data are computed once.
    """
    length = float(np.mean(column(feed.train, "length")))
    blocks = named_blocks(prefix.boundary.model)
    costs = [_forward_cost(block.module, length, prefix.boundary.model.config) for block in blocks]
    once = sum(costs[: prefix.frozen])
    rest = sum(
        cost * (2 + _trainable_share(b.module)) for cost, b in zip(costs[prefix.frozen :], blocks[prefix.frozen :], strict=True)
    )
    rest += _head_cost(feed, prefix.boundary.model)
    return gain(once, rest, feed.epochs, feed.distinct_rows / len(feed.train))


def gain(once: float, rest: float, epochs: float, share: float = 1.0) -> float:
    """The formula; `rest` is forward and backward of the part that is not frozen, `share` that of distinct examples."""
    return epochs * (once + rest) / (share * once + epochs * rest)


def _forward_cost(block: nn.Module, length: float, config: Any) -> float:
    """Operations per token: two for each weight, and those of attention."""
    width = getattr(config.get_text_config(), "hidden_size", 0)
    return 2.0 * sum(elements(p) for p in block.parameters()) + 4.0 * length * width


def _trainable_share(module: nn.Module) -> float:
    sizes = [(elements(p), p.requires_grad) for p in module.parameters()]
    return sum(n for n, learns in sizes if learns) / max(1, sum(n for n, _ in sizes))


def _head_cost(feed: TrainData, model: Any) -> float:
    """Operations per token of the LM head, which only supervised tokens pass; heads of classifiers are neglected."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return 0.0
    return 2.0 * weight.numel() * feed.supervised_share * (2 + weight.requires_grad)


KEY = "strategy.precompute"
TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a number: allowed difference of outputs with cached states
__all__ = ["Refused", "can_precompute", "find_prefix", "precompute"]
Wish = bool | Literal["auto"]


def precompute(feed: TrainData, model: nn.Module, wish: Wish, still: bool = False) -> TrainData:
    """Cache the hidden states of the frozen prefix, if that is possible and saves time.

    Args:
        wish: `auto` decides, and reports the reason; `true` makes a reason against it an error.
        still: keep the frozen part in evaluation mode, without dropout, whether it is cached or not.

    Raises:
        UserError: `on`, and it is not possible; or `still`, and the frozen part is unknown.
    """
    if wish is False and not still:
        return feed
    if distributed.is_sharded():
        return _not_cached(feed, wish, "no process has the full model on its device")
    model.to(feed.device)
    with feed.autocast():
        try:
            batch = feed.batch([len(feed.eval) - 1, 0] if len(feed.eval) > 1 else [0])
            prefix = find_prefix(model, batch)
        except Refused as refusal:
            if still:
                raise UserError(f"strategy.frozen_dropout: false: {refusal}; remove it") from None
            return _not_cached(feed, wish, str(refusal))
        if still:
            feed = feed.with_undo(Still(list(prefix.modules.values())).release)
        try:
            if wish is False:
                raise Refused("precompute: false")
            if router_loss.coefficient(model):
                raise Refused("the load-balancing loss of this mixture of experts needs the routers of all layers")
            return _cache_prefix(feed, prefix, batch, wish)
        except Refused as refusal:
            prefix.boundary.unbind()
            return feed if wish is False else _not_cached(feed, wish, str(refusal))


def _not_cached(feed: TrainData, wish: Wish, reason: str) -> TrainData:
    if wish is True:
        raise UserError(f"{KEY}: true, but {reason}; set auto or false")
    feed.say(f"{'cache':<9} frozen hidden states are not cached: {reason}")
    return replace(feed, facts={"not_precomputed": reason})


def _cache_prefix(feed: TrainData, prefix: Prefix, batch: Batch, wish: Wish) -> TrainData:
    """The data with cached states. Raises Refused with a reason against it."""
    if reason := can_precompute(prefix, batch):
        raise Refused(reason)
    if not feed.is_endless:
        gain = predicted_gain(feed.unpacked, prefix)
        if gain < PAYS and wish == "auto":
            raise Refused(f"it would not save time (predicted {gain:.2f}x over {feed.epochs:.3g} epochs)")
    elif wish == "auto":
        raise Refused("with max_time the number of epochs is unknown; set precompute: true to cache them anyway")
    states = prefix.boundary.take(batch)
    width, size = states.shape[2], states.dtype.itemsize
    parts = {name: _Part.of(rows) for name, rows in (("train", feed.unpacked.train), ("eval", feed.eval))}
    needed = sum(int(part.lengths.sum()) for part in parts.values()) * width * size
    text = f"hidden states of {sum(map(len, parts.values())):,} examples"
    if reason := _lack_of_room(feed, needed, text):
        raise Refused(reason)
    more = "" if feed.is_endless else f", predicted {gain:.1f}x over {feed.epochs:.3g} epochs"
    feed.say(f"{'cache':<9} {text} after {prefix.frozen} of {prefix.blocks} blocks: {file_size(needed)}{more}")
    return _add_states(feed, prefix, parts, states.dtype, width)


def _lack_of_room(feed: TrainData, needed: int, text: str) -> str | None:
    """The reason why this does not fit on the disk of one of the machines, or None."""
    try:
        cache.check_free_space(needed, text)
        mine = None
    except UserError as error:
        mine = str(error)
    return next((reason for reason in feed.group.gather(mine) if reason), None)


@dataclass
class _Part:
    """The distinct examples of a dataset: their places and lengths, and the one that each example equals."""

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


def _add_states(feed: TrainData, prefix: Prefix, parts: dict[str, _Part], dtype: torch.dtype, width: int) -> TrainData:
    weights, built, size, started = digest_of_weights(prefix.boundary.model), [], 0, time.monotonic()
    unpacked = feed.unpacked  # with or without packing, examples have the same states
    made: dict[str, Any] = {}
    for name, part in parts.items():
        batch_size = feed.plan.micro_batch if name == "train" else feed.plan.eval_batch
        # evaluations take their examples in order, longest first
        order = np.lexsort((part.first, -part.lengths)) if name == "train" else np.argsort(part.first)
        inputs = {
            "weights": weights,
            "rows": digest_of_rows(part.rows, part.first[order]),
            "boundary": prefix.boundary.skipped[-1].name,
            "batch": batch_size,
            **cache_inputs(unpacked, prefix.boundary.model, dtype),
        }

        def build(
            target: Path | None, name: str = name, part: _Part = part, order: Any = order, size: int = batch_size
        ) -> None:
            built.append(name)
            write(target, _compute_states(unpacked, prefix.boundary, part, order, size, whole=name == "train"), dtype)

        needed = int(part.lengths.sum()) * width * dtype.itemsize
        text = f"hidden states of {len(part):,} rows after {prefix.boundary.skipped[-1].name}"
        entry = feed.group.fetch("hidden_states", cache.fingerprint(inputs), text, build, needed)
        places = np.argsort(order)[part.which]
        made[name] = WithStates(part.rows, States(entry.path, width), places)
        size += entry.size
    seconds = time.monotonic() - started
    with_them = feed.with_rows(StatesCollator(feed.collate, prefix.boundary, dtype), made["train"], made["eval"])
    _check(with_them, made["train"], prefix.boundary.model)
    feed.say(f"{'cache':<9} {f'computed in {seconds:.1f} s' if built else 'loaded from disk'}")
    facts = {
        "rows": {name: len(part) for name, part in parts.items()},
        "bytes": size,
        "seconds": seconds,
        "built": built,
        "blocks": [prefix.frozen, prefix.blocks],
        "predicted_gain": None if feed.is_endless else predicted_gain(unpacked, prefix),
    }
    return replace(with_them, facts={"precomputed": facts}).with_undo(prefix.boundary.unbind)


def _compute_states(feed: TrainData, boundary: Boundary, part: _Part, order: np.ndarray, size: int, whole: bool) -> Any:
    """The states of each batch; the last batch is filled up to the full size if `whole`."""

    def take(group: list[int]) -> list[torch.Tensor]:
        filled = group + group[-1:] * (size - len(group)) if whole else group
        states = boundary.take(feed.batch([int(part.first[i]) for i in filled], part.rows))
        return [states[place, : part.lengths[i]].cpu() for place, i in enumerate(group)]

    with torch.no_grad(), evaluating(boundary.model):
        yield from feed.each(list(batches_of(order, size)), take, "computing frozen hidden states")


def _check(feed: TrainData, rows: WithStates, model: nn.Module) -> None:
    """Compare the outputs with and without cached states, on the longest, the shortest and two other examples.

    With packing also on the first packed batch.

    Raises:
        Refused: the outputs differ.
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
        ours, theirs = (_unpadded(tensor, batch.get("attention_mask")).float() for tensor in (stored[name], value))
        allowed = TOLERANCE[min(4, feed.dtype.itemsize)] * max(1.0, float(theirs.abs().max()))
        if not float((ours - theirs).abs().max()) <= allowed:
            raise Refused(
                f"with cached hidden states the outputs of {type(model).__name__} change ({name} differs by "
                f"{float((ours - theirs).abs().max()):.2g}): its blocks pass more than hidden states"
            )


def _unpadded(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The tensor without padded positions, if it has positions."""
    return tensor[mask.bool()] if mask is not None and tensor.shape[:2] == mask.shape else tensor
