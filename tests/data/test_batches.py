"""The order of rows is a function of seed and position; batches have few widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfstrat.data.collate import BatchOrder, Collator, rounded, shift
from hfstrat.errors import UserError
from hfstrat.recipe.schema import Training
from hfstrat.trainer.plan import largest_that_fits, make_plan
from hfstrat.trainer.train_data import groups_by_length

LENGTHS = np.random.default_rng(0).integers(4, 90, size=37)


def order(steps: int = 20, size: int = 8, seed: int = 3) -> BatchOrder:
    return BatchOrder(LENGTHS, size, steps, seed)


def test_every_row_is_seen_once_an_epoch_before_any_is_seen_again() -> None:
    stream = list(order())
    for epoch in range(len(stream) // len(LENGTHS)):
        first, last = epoch * len(LENGTHS), (epoch + 1) * len(LENGTHS)
        inside = [row for step in range(-(-first // 8), last // 8) for row in order().batch(step)]
        assert len(set(inside)) == len(inside)
    counts = np.bincount(stream, minlength=len(LENGTHS))
    assert counts.max() - counts.min() <= 1


def test_a_batch_depends_on_seed_and_step_only() -> None:
    assert (order(steps=20).batch(7) == order(steps=9).batch(7)).all()
    assert (order(seed=3).batch(7) != order(seed=4).batch(7)).any()
    assert sorted(order(size=8).batch(0).tolist() + order(size=8).batch(1).tolist()) == sorted(order(size=16).batch(0).tolist())


def test_within_a_batch_the_longest_come_first() -> None:
    for step in range(5):
        lengths = LENGTHS[order().batch(step)]
        assert (np.diff(lengths) <= 0).all()
        assert order().tokens(step) == lengths.sum()


@pytest.mark.parametrize(("rows", "size"), [(1000, 4), (37, 8), (1003, 64), (9, 300)])
def test_grouping_by_length_takes_the_same_rows_an_epoch(rows: int, size: int) -> None:
    lengths = np.random.default_rng(1).integers(4, 900, size=rows)
    plain, grouped = (BatchOrder(lengths, size, 10**6, 0, group_by_length=on) for on in (False, True))
    for epochs in (1, 2, 5):
        steps = -(-epochs * rows // size)  # of a recipe with this many epochs
        seen = [np.bincount(np.concatenate([o.batch(s) for s in range(steps)]), minlength=rows) for o in (plain, grouped)]
        assert (seen[0] == seen[1]).all()
    assert all((np.diff(lengths[grouped.batch(s)]) <= 0).all() for s in range(6))
    fresh = BatchOrder(lengths, size, 7, 0, group_by_length=True)
    assert (fresh.batch(6) == grouped.batch(6)).all()  # a function of seed and step only


def test_grouped_batches_pad_little() -> None:
    lengths = np.random.default_rng(1).exponential(150, size=4000).astype(int) + 4

    def padded(order: BatchOrder) -> float:
        batches = [lengths[order.batch(s)] for s in range(500)]
        return sum(len(b) * b.max() for b in batches) / sum(b.sum() for b in batches) - 1

    assert padded(BatchOrder(lengths, 4, 1000, 0)) > 0.7
    assert padded(BatchOrder(lengths, 4, 1000, 0, group_by_length=True)) < 0.1


def test_widths_are_few_and_pad_little() -> None:
    for multiple in (8, 16):
        widths = [rounded(length, multiple) for length in range(1, 4097)]
        assert all(w >= n and w % multiple == 0 and w - n < max(multiple, n / 8) for n, w in enumerate(widths, 1))
        assert len(set(widths)) <= 8 * 10


def test_a_batch_larger_than_the_data_repeats_rows() -> None:
    rows = BatchOrder([5, 6, 7], 8, 1, 0).batch(0)
    assert sorted(np.bincount(rows)) == [2, 3, 3]


def test_collator_pads_by_position_and_rounds_widths() -> None:
    batch = Collator(pad_token_id=2, multiple=8, masks_logits=True)(
        [{"input_ids": [2, 5, 2], "labels": [-100, 5, 2]}, {"input_ids": [7] * 9, "labels": [-100] * 8 + [7]}]
    )
    assert batch["input_ids"].shape == (2, 16)
    assert batch["labels"][0].tolist() == [-100, 5, 2] + [-100] * 13  # the end token is trained though it also pads
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["logits_to_keep"][0].nonzero().flatten().tolist() == [0, 1]
    assert torch.equal(batch["logits_to_keep"], shift(batch["labels"]) != -100)


def plan(processes: int = 1, **training: object) -> object:
    return make_plan(Training(**({"max_steps": 10} | training)), LENGTHS.tolist(), [20, 10], processes)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", ["auto", 1, 2])
def test_the_global_batch_is_constant(processes: int, micro: object) -> None:
    made = plan(processes, global_batch_size=16, per_device_train_batch_size=micro)
    assert made.micro_batch * made.accumulation * made.processes == 16  # type: ignore[attr-defined]


def test_a_batch_that_cannot_be_split_names_the_nearest_sizes() -> None:
    with pytest.raises(UserError, match="nearest sizes are 15 and 18"):
        plan(3, global_batch_size=16)
    with pytest.raises(UserError, match="expected one of 1, 2, 4, 8"):
        plan(2, global_batch_size=16, per_device_train_batch_size=3)


def test_lengths_of_a_run() -> None:
    assert plan(max_steps=None, num_train_epochs=2.0, global_batch_size=8).steps == 10  # type: ignore[attr-defined]
    assert plan(max_steps=4, num_train_epochs=2.0, global_batch_size=8).steps == 4  # type: ignore[attr-defined]
    made = plan(max_steps=None, max_time="2min", eval_steps=0.5)
    assert (made.time_limit, made.eval_share) == (120.0, 0.5)  # type: ignore[attr-defined]
    assert plan(max_steps=40, eval_steps=0.25).eval_every == 10  # type: ignore[attr-defined]
    assert plan(max_steps=40, eval_steps=10, save_steps=4).save_every == 4  # type: ignore[attr-defined]
    assert plan(max_steps=None, max_time="2min", save_steps=50).save_every == 50  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="the number of steps is unknown; give a whole number"):
        plan(max_steps=None, max_time="2min", save_steps=0.5)


def test_the_measured_micro_batch_is_the_largest_that_fits() -> None:
    tried: list[int] = []

    def fits(micro: int) -> bool:
        tried.append(micro)
        return micro <= 5

    assert largest_that_fits(16, fits) == 4
    assert tried == [16, 8, 4]
    with pytest.raises(UserError, match="activation_checkpointing"):
        largest_that_fits(4, lambda micro: False)


def test_a_stored_micro_batch_is_reused() -> None:
    training = Training(max_steps=5, global_batch_size=16)
    assert make_plan(training, LENGTHS.tolist(), [20], 1, {"micro_batch": 2}).micro_batch == 2
    moved = make_plan(training, LENGTHS.tolist(), [20], 4, {"micro_batch": 16})  # resumed with more processes
    assert moved.micro_batch * moved.accumulation * 4 == 16


def test_steps_of_many_rows_are_not_grouped_by_length() -> None:
    assert [groups_by_length("auto", size) for size in (1, 4, 15, 16, 64)] == [True, True, True, False, False]
    assert groups_by_length("group_by_length", 64)
    assert not groups_by_length("random", 1)
