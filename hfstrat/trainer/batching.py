"""How rows become batches: packed, grouped by length, or as they come; decided for this model, these rows, this device."""

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

WORTH = 0.05  # share of the positions that packing has to save to be chosen
FAIR = 16  # rows of a step from which it is worth taking them as they come
MULTIPLE = 8  # widths, where kernels are not compiled for each


@dataclass
class Batches:
    """What the Trainer gets. `order` says which rows make up a step; `sampler` runs over `rows`, which may be bins."""

    order: BatchOrder
    rows: Any
    sampler: Sampler[int]
    collate: Any
    plan: Plan
    line: str


def multiple_for(device: torch.device) -> int:
    return CPU_MULTIPLE if device.type == "cpu" else MULTIPLE


def groups_by_length(wish: str, global_batch_size: int) -> bool:
    """Whether steps are made of rows of like length.

    A step of many rows is sorted in itself, so that its micro-batches pad little; grouping it too saves a few percent and
    costs some loss, since steps of short and of long rows weigh the same.
    """
    return wish == "group_by_length" or (wish == "auto" and global_batch_size < FAIR)


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
    """Decide, and say why. A resumed run goes on as it began.

    Args:
        others: further models that are given the batches, such as a teacher.
        dtype: of the forward pass.

    Raises:
        UserError: `packing: true`, and this model's examples see each other when packed, or cannot be shown not to.
    """
    training = recipe.training
    wish = training.packing if plan.packed is None else plan.packed
    grouped = groups_by_length(training.train_sampling_strategy, plan.global_batch_size)
    order = BatchOrder(lengths, plan.global_batch_size, plan.steps, recipe.seed, group_by_length=grouped)
    if not collate.pads:  # features: nothing pads
        return Batches(order, rows, order, collate, plan, "rows of one size")
    padding = padding_share(order, plan.micro_batch, collate.multiple)
    words = "batches of like length" if grouped else "batches as they come"
    plain = Batches(order, rows, order, collate, plan, f"{words}, {padding:.0%} padding")
    if wish is False:
        return plain
    if is_sharded() and device.type != "cpu":  # what packing does can only be shown where the whole model is
        if wish is True:
            raise UserError(
                "training.packing: true: it has to be shown on the whole model, which no process has; set auto or false"
            )
        return plain
    if wish == "auto" and device.type == "cpu":
        plain.line += "; not packed: on a CPU that is slower"
        return plain
    packed = _pack(plain, recipe.seed, recipe.data.max_length, base, collate)
    saved = padding - packed_padding_share(packed.rows)
    if wish == "auto" and saved < WORTH:
        plain.line += f"; not packed: it would save {max(saved, 0):.0%}"
        return plain
    if reason := _reason_against(recipe, base, others, packed, dtype):
        if wish is True:
            raise UserError(f"training.packing: true: rows of this model cannot be packed: {reason}; set auto or false")
        plain.line += f"; not packed: {reason}"
        return plain
    packed.line = (
        f"packed into {packed.plan.bins} rows per step, {packed_padding_share(packed.rows):.0%} padding (else {padding:.0%}); "
        "tested on this model: packed examples do not see each other"
    )
    return packed


def _reason_against(recipe: Recipe, base: Base, others: Sequence[Any], packed: Batches, dtype: torch.dtype) -> str | None:
    if not recipe.strategy.packs:
        return f"strategy {recipe.strategy.name} goes by rows"
    if not packed.collate.plain.selects_rows:
        return "it needs the loss bound to the model"
    flatten = packed.collate.flatten
    if reason := find_leak(base.model, flatten, dtype):
        return reason
    return next((f"the teacher: {reason}" for one in others if (reason := find_leak(one, flatten, dtype))), None)


def _pack(plain: Batches, seed: int, most: int, base: Base, collate: Any) -> Batches:
    """The same steps' rows side by side, in bins of at most `most` tokens and what one pass holds without packing.

    They are taken as they come, not grouped by length, so that all steps have like numbers of tokens.
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
