"""The data of a Trainer: examples, and how they become batches: packed, grouped by length or in random order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import Dataset, Sampler

from hfstrat.data import packing
from hfstrat.data.collate import BatchOrder
from hfstrat.data.dense import DenseRows
from hfstrat.data.render import IGNORED
from hfstrat.data.splits import distinct
from hfstrat.errors import UserError
from hfstrat.models.load import Base
from hfstrat.recipe.schema import Recipe
from hfstrat.trainer import packed_attention
from hfstrat.trainer.collective import SINGLE, ProcessGroup
from hfstrat.trainer.distributed import is_sharded
from hfstrat.trainer.packed_attention import Attention
from hfstrat.trainer.plan import CPU_MULTIPLE, ENDLESS, Plan, dense_order
from hfstrat.trainer.streamed import StreamedSteps, StreamOrder

SAMPLED = 200  # examples from which the share of supervised tokens is estimated


@dataclass(frozen=True)
class TrainData:
    """Examples, how they become batches, and the run that they belong to."""

    train: Any
    eval: Any
    collate: Any
    plan: Plan
    dtype: torch.dtype
    device: torch.device
    screen: Console
    facts: dict[str, Any] = field(default_factory=dict)  # for the report
    undo: tuple[Callable[[], None], ...] = ()  # removes what was bound to the model; called before the result is saved
    group: ProcessGroup = SINGLE  # the processes that share work which is computed once

    @property
    def is_streamed(self) -> bool:
        """Whether examples are read while training, so that nothing can be computed of all of them."""
        return isinstance(self.train, StreamedSteps)

    @property
    def epochs(self) -> float:
        return self.plan.epochs

    @property
    def is_endless(self) -> bool:
        return self.plan.steps >= ENDLESS

    @property
    def unpacked(self) -> TrainData:
        """The same examples, not packed, in batches of `micro_batch`."""
        if not self.plan.bins:
            return self
        return replace(self, train=self.train.rows, collate=self.collate.plain, plan=replace(self.plan, bins=None, dense=None))

    def with_rows(self, collate: Any, train: Any, evaluated: Any = None) -> TrainData:
        """The same data with a further column (packed, if it is packed) and a collator for it."""
        train = self.train.with_rows(train) if self.plan.bins else train
        return replace(self, train=train, eval=self.eval if evaluated is None else evaluated, collate=collate)

    @property
    def distinct_rows(self) -> int:
        """The number of training examples without duplicates."""
        return len(distinct(self.train).first)

    @property
    def supervised_share(self) -> float:
        """The share of supervised tokens, estimated from a sample of examples."""
        step = max(1, len(self.train) // SAMPLED)
        labels = [self.train[index].get("labels") for index in range(0, len(self.train), step)]
        counted = np.concatenate([np.atleast_1d(row) for row in labels if row is not None] or [np.zeros(1)])
        return float((counted != IGNORED).mean())

    def say(self, line: str) -> None:
        self.screen.print(line)

    def with_undo(self, undo: Callable[[], None]) -> TrainData:
        return replace(self, undo=(*self.undo, undo))

    def batch(self, places: list[int], rows: Any = None) -> dict[str, torch.Tensor]:
        """A collated batch of evaluation (or the given) examples on the device, without labels."""
        rows = self.eval if rows is None else rows
        batch = self.collate([rows[place] for place in places])
        return {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the Trainer's forward passes."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def each(self, items: list[Any], compute: Callable[[Any], Any], title: str, for_all: bool = False) -> Iterator[Any]:
        """`ProcessGroup.each`, with a progress bar on a terminal."""
        with Progress(console=self.screen, transient=True, disable=not self.screen.is_terminal) as bar:
            task = bar.add_task(title, total=-(-len(items) // self.group.size))

            def advance(item: Any) -> Any:
                result = compute(item)
                bar.advance(task)
                return result

            yield from self.group.each(items, advance, for_all)


class EpochRows(Dataset[dict[str, Any]]):
    """Training examples that vary between epochs: index `epoch * rows + row` is that row as `collate` has it in that epoch."""

    def __init__(self, rows: Any, collate: Any) -> None:
        self.rows, self.collate = rows, collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, row = divmod(int(index), len(self.rows))
        return self.collate.of_epoch(self.rows, row, epoch)  # type: ignore[no-any-return]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


MIN_SAVING = 0.05  # share of the positions that packing must save to be chosen
MIN_UNGROUPED = 16  # examples per step from which random order is preferred to grouping by length
GPU_MULTIPLE = 8  # of the widths of batches


@dataclass
class Batches:
    """The batches of the Trainer. `order` has the examples of each step; `sampler` indexes `rows`, which may be packed."""

    order: Any  # BatchOrder, DenseOrder or StreamOrder
    rows: Any
    sampler: Sampler[int]
    collate: Any
    plan: Plan
    line: str

    def because(self, reason: str) -> Batches:
        """These batches, not packed for a reason."""
        return replace(self, line=f"{self.line}; not packed: {reason}")


def multiple_for(device: torch.device) -> int:
    return CPU_MULTIPLE if device.type == "cpu" else GPU_MULTIPLE


def groups_by_length(sampling: str, global_batch_size: int) -> bool:
    """Whether a step consists of examples of similar length.

    The examples of a step are sorted by length in any case, so that micro-batches of a large step have little padding. Grouping
    them by length as well saves a few percent and costs some loss, since steps of short and of long examples have equal weight.
    """
    return sampling == "group_by_length" or (sampling == "auto" and global_batch_size < MIN_UNGROUPED)


def make_batches(recipe: Recipe, data: TrainData, lengths: np.ndarray, base: Base, others: Sequence[Any]) -> Batches:
    """The batches of `data`, with a line that explains the choice. A resumed run keeps the choice of its start.

    Args:
        others: further models that are given the batches, such as a teacher.

    Raises:
        UserError: `packing: true`, but packed examples of this model attend to each other, or this cannot be tested.
    """
    training, plan, collate = recipe.training, data.plan, data.collate
    packing_mode = training.packing if plan.packed is None or plan.dense else plan.packed
    must_pack, wanted = packing_mode in (True, "dense"), f"training.packing: {str(packing_mode).lower()}"
    grouped = groups_by_length(training.train_sampling_strategy, plan.global_batch_size)
    varies, of_one_size = getattr(collate, "varies", False), not collate.pads and collate.sizes_batches
    grouped = grouped and not of_one_size  # rows of equal length would be grouped by their place in the data
    order = BatchOrder(lengths, plan.global_batch_size, plan.steps, recipe.seed, grouped, varies)
    if plan.dense and not (collate.pads and collate.packs):
        reason = collate.unpacked_because if collate.pads else "they are features of one size"
        raise UserError(f"{wanted}: these examples are not packed: {reason}; set auto or false, and global_batch_size")
    rows, changed = (EpochRows(data.train, collate), ", augmented in each epoch") if varies else (data.train, "")
    if not collate.pads:  # features and images: nothing pads
        return Batches(order, rows, order, collate, plan, f"examples of one size{changed}")
    padding = packing.padding_share(order, plan.micro_batch, collate.multiple)
    sampled = "examples grouped by length" if grouped else "examples in random order"
    plain = Batches(order, rows, order, collate, plan, f"{sampled}, {padding:.0%} padding{changed}")
    if packing_mode is False:
        return plain
    if not collate.packs:
        return plain.because(collate.unpacked_because)
    if is_sharded() and data.device.type != "cpu":  # packing is tested on the complete model
        if must_pack:
            raise UserError(f"{wanted}: packing is tested on the complete model, but the model is sharded; set auto or false")
        return plain
    if packing_mode == "auto" and data.device.type == "cpu":
        return plain.because("packing is slower on a CPU")
    packed, saved = (_pack_densely if plan.dense else _pack)(plain, recipe, data.device), 0.0
    packed_padding = packing.packed_padding_share(packed.rows, packed.collate, packed.plan.bins_at_once)
    if packing_mode == "auto" and (saved := padding - packed_padding) < MIN_SAVING:
        return plain.because(f"it would save only {max(saved, 0):.0%}")
    try:
        attention = _attention(recipe, data, lengths, [base.model, *others], must_pack)
    except packed_attention.Refused as error:
        if must_pack:
            raise UserError(f"{wanted}: examples cannot be packed for this model: {error}; set auto or false") from None
        return plain.because(str(error))
    packed.collate.flatten = attention.flatten
    packed_padding = packing.packed_padding_share(packed.rows, packed.collate, packed.plan.bins_at_once)
    packed.plan = replace(packed.plan, attention=attention.name, attention_because=attention.because)
    packed.line = (
        f"packed into {packed.plan.bins} rows per step, {packed_padding:.0%} padding (else {padding:.0%}); "
        "tested on this model: packed examples do not attend to each other"
    )
    return packed


def stream_batches(data: TrainData, stream: Any, position: dict[str, Any] | None) -> Batches:
    """The batches of examples that are read while training, from a stored position on; not packed."""
    plan = data.plan
    rows = StreamedSteps(stream, plan.global_batch_size, plan.steps)
    if position is not None:
        rows.restore(position)
    order = StreamOrder(rows)
    return Batches(order, rows, order, data.collate, plan, "examples in the order in which they are read")


def _attention(recipe: Recipe, data: TrainData, lengths: np.ndarray, models: list[Any], must_pack: bool) -> Attention:
    """The attention of packed rows, set on the models. Raises Refused: they cannot be packed."""
    if not recipe.strategy.packs:
        raise packed_attention.Refused(f"strategy {recipe.strategy.name} needs each example in a row of its own")
    if not data.collate.selects_rows:
        raise packed_attention.Refused("packing needs our loss bound to the model")
    wanted, before = recipe.model.attn_implementation, data.plan.attention
    if before is None and (data.plan.packed or is_sharded()):  # started before the attention was chosen, or cannot be changed
        before = str(models[0].config._attn_implementation)
    return packed_attention.choose(wanted, models, data.device, data.dtype, int(lengths.max()), before, must_pack)


def _pack(plain: Batches, recipe: Recipe, device: torch.device) -> Batches:
    """The examples of the same steps in bins of at most `data.max_length` tokens and of what one unpacked pass holds.

    Examples are in random order, not grouped by length, so that all steps have similar numbers of tokens.
    """
    seed, max_length = recipe.seed, recipe.data.max_length
    plan, longest = plain.plan, int(plain.order.lengths.max())
    order = BatchOrder(plain.order.lengths, plan.global_batch_size, plan.steps, seed)
    capacity = max(longest, min(max_length, plan.micro_batch * longest))
    at_once = max(1, plan.micro_batch * longest // capacity)
    bins = packing.count_bins(order, capacity, plan.processes * at_once)
    rows = packing.PackedRows(plain.rows, order, bins, plain.collate.multiple)
    return _packed(plain, rows, recipe, device, replace(plan, bins=bins, bins_at_once=at_once))


def _pack_densely(plain: Batches, recipe: Recipe, device: torch.device) -> Batches:
    """The examples in steps of `training.global_batch_tokens`."""
    plan = plain.plan
    order = dense_order(recipe.training, plain.order.lengths, plan.processes, recipe.seed, plan.dense)
    assert order is not None
    order.steps = plan.steps
    rows = DenseRows(plain.rows, order, order.shape.bins, plain.collate.multiple)
    return _packed(plain, rows, recipe, device, replace(plan, bins=order.shape.bins))


def _packed(plain: Batches, rows: packing.PackedRows, recipe: Recipe, device: torch.device, plan: Plan) -> Batches:
    make = plain.collate.packed or partial(packing.PackingCollator, plain.collate)
    collator = make(device.type == "cuda", few_widths=device.type != "cuda" or recipe.training.torch_compile)
    return Batches(rows.order, rows, packing.InOrder(len(rows)), collator, plan, "")
