"""How examples become batches: packed, grouped by length or in random order, depending on model, data and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from hfstrat.data.collate import BatchOrder
from hfstrat.data.packing import (
    InOrder,
    PackedRows,
    PackingCollator,
    count_bins,
    find_leak,
    packed_padding_share,
    padding_share,
)
from hfstrat.errors import UserError
from hfstrat.models.load import Base
from hfstrat.recipe.schema import Recipe
from hfstrat.trainer.distributed import is_sharded
from hfstrat.trainer.plan import CPU_MULTIPLE, Plan

MIN_SAVING = 0.05  # share of the positions that packing must save to be chosen
MIN_UNGROUPED = 16  # examples per step from which random order is preferred to grouping by length
GPU_MULTIPLE = 8  # of the widths of batches


@dataclass
class Batches:
    """The batches of the Trainer. `order` has the examples of each step; `sampler` indexes `rows`, which may be packed."""

    order: BatchOrder
    rows: Any
    sampler: Sampler[int]
    collate: Any
    plan: Plan
    line: str


def multiple_for(device: torch.device) -> int:
    return CPU_MULTIPLE if device.type == "cpu" else GPU_MULTIPLE


def groups_by_length(wish: str, global_batch_size: int) -> bool:
    """Whether a step consists of examples of similar length.

    The examples of a step are sorted by length in any case, so that micro-batches of a large step have little padding. Grouping
    them by length as well saves a few percent and costs some loss, since steps of short and of long examples have equal weight.
    """
    return wish == "group_by_length" or (wish == "auto" and global_batch_size < MIN_UNGROUPED)


def make_batches(
    recipe: Recipe,
    plan: Plan,
    rows: Any,
    lengths: np.ndarray,
    base: Base,
    others: Sequence[Any],
    collate: Any,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Batches:
    """The batches, with a line that explains the choice. A resumed run keeps the choice of its start.

    Args:
        others: further models that are given the batches, such as a teacher.
        dtype: of the forward pass.

    Raises:
        UserError: `packing: true`, but packed examples of this model attend to each other, or this cannot be tested.
    """
    training = recipe.training
    wish = training.packing if plan.packed is None else plan.packed
    grouped = groups_by_length(training.train_sampling_strategy, plan.global_batch_size)
    order = BatchOrder(lengths, plan.global_batch_size, plan.steps, recipe.seed, group_by_length=grouped)
    if not collate.pads:  # features: nothing pads
        return Batches(order, rows, order, collate, plan, "examples of one size")
    padding = padding_share(order, plan.micro_batch, collate.multiple)
    words = "examples grouped by length" if grouped else "examples in random order"
    plain = Batches(order, rows, order, collate, plan, f"{words}, {padding:.0%} padding")
    if wish is False:
        return plain
    if is_sharded() and device.type != "cpu":  # packing is tested on the complete model
        if wish is True:
            raise UserError(
                "training.packing: true: packing is tested on the complete model, but the model is sharded; set auto or false"
            )
        return plain
    if wish == "auto" and device.type == "cpu":
        plain.line += "; not packed, since packing is slower on a CPU"
        return plain
    packed = _pack(plain, recipe.seed, recipe.data.max_length, base, collate)
    saved = padding - packed_padding_share(packed.rows)
    if wish == "auto" and saved < MIN_SAVING:
        plain.line += f"; not packed, since it would save only {max(saved, 0):.0%}"
        return plain
    if reason := _reason_against(recipe, base, others, packed, dtype):
        if wish is True:
            raise UserError(f"training.packing: true: examples cannot be packed for this model: {reason}; set auto or false")
        plain.line += f"; not packed: {reason}"
        return plain
    packed.line = (
        f"packed into {packed.plan.bins} rows per step, {packed_padding_share(packed.rows):.0%} padding (else {padding:.0%}); "
        "tested on this model: packed examples do not attend to each other"
    )
    return packed


def _reason_against(recipe: Recipe, base: Base, others: Sequence[Any], packed: Batches, dtype: torch.dtype) -> str | None:
    if not recipe.strategy.packs:
        return f"strategy {recipe.strategy.name} needs each example in a row of its own"
    if not packed.collate.plain.selects_rows:
        return "packing needs our loss bound to the model"
    flatten = packed.collate.flatten
    if reason := find_leak(base.model, flatten, dtype):
        return reason
    return next((f"the teacher: {reason}" for one in others if (reason := find_leak(one, flatten, dtype))), None)


def _pack(plain: Batches, seed: int, most: int, base: Base, collate: Any) -> Batches:
    """The examples of the same steps in bins of at most `most` tokens and of what one unpacked pass holds.

    Examples are in random order, not grouped by length, so that all steps have similar numbers of tokens.
    """
    plan, longest = plain.plan, int(plain.order.lengths.max())
    order = BatchOrder(plain.order.lengths, plan.global_batch_size, plan.steps, seed)
    capacity = max(longest, min(most, plan.micro_batch * longest))
    at_once = max(1, plan.micro_batch * longest // capacity)
    bins = count_bins(order, capacity, plan.processes * at_once)
    rows = PackedRows(plain.rows, order, bins, collate.multiple)
    flatten = "flash" in str(base.model.config._attn_implementation)
    collator = PackingCollator(collate, flatten)
    return Batches(order, rows, InOrder(len(rows)), collator, replace(plan, bins=bins, bins_at_once=at_once), "")
