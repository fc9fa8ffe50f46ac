"""Dense packing: a batch in tokens, each row once per epoch and whole, the loss of a step over its own tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences, write_jsonl
from helpers.runs import folder_of, run, stop_at, weights
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hfstrat.data.collate import BatchOrder, Collator
from hfstrat.data.dense import DenseOrder, DenseRows, Shape, best_fit, shape_of
from hfstrat.data.packing import PackedRows, PackingCollator, packed_padding_share
from hfstrat.errors import UserError
from hfstrat.models import fused_loss
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Training
from hfstrat.trainer.plan import ENDLESS, make_plan

LENGTHS = st.lists(st.integers(1, 60), min_size=16, max_size=300)


@given(LENGTHS, st.integers(60, 200))
def test_best_fit_puts_each_row_whole_into_the_fullest_bin_with_room(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(place for each in bins for place in each) == list(range(len(lengths)))
    filled = sorted(sum(lengths[place] for place in each) for each in bins)
    assert filled[-1] <= capacity
    slow: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [place for place, tokens in enumerate(slow) if tokens + length <= capacity]
        if fits:
            slow[max(fits, key=lambda place: slow[place])] += length
        else:
            slow.append(length)
    assert filled == sorted(slow)
    assert len(bins) <= 1.7 * -(-sum(lengths) // capacity) + 1  # Johnson et al. 1974


@given(LENGTHS, st.integers(60, 600), st.integers(0, 3))
def test_every_row_is_seen_once_per_epoch_and_no_step_has_more_tokens(lengths: list[int], tokens: int, seed: int) -> None:
    shape = shape_of(tokens, max(lengths), 1)
    assume(shape.bins <= len(lengths))
    assert shape.bins * shape.capacity <= tokens
    assert max(lengths) <= shape.capacity < 2 * max(lengths) + shape.bins
    order = DenseOrder(lengths, shape, ENDLESS, seed)
    step = 0
    for epoch in range(2):
        seen: list[int] = []
        for _ in range(order.steps_of(epoch)):
            packed = order.bins_of(step)
            assert len(packed) == shape.bins
            assert max(sum(lengths[row] for row in each) for each in packed) <= shape.capacity
            assert 0 < order.tokens(step) <= tokens
            seen += order.batch(step).tolist()
            step += 1
        assert sorted(seen) == list(range(len(lengths)))
    assert order.steps_in(2) == step
    again = DenseOrder(lengths, shape, ENDLESS, seed)  # a resumed run starts in the middle
    assert [each.tolist() for each in again.bins_of(step - 1)] == [each.tolist() for each in order.bins_of(step - 1)]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 500)
    first, other = (DenseOrder(lengths, Shape(4, 120), ENDLESS, seed) for seed in (0, 1))
    assert first.batch(0).tolist() != other.batch(0).tolist()
    assert first.batch(0).tolist() != first.batch(first.steps_of(0)).tolist()


def test_steps_are_nearly_full_and_fuller_than_rows_of_the_same_step() -> None:
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(5.5, 0.9, 20_000).astype(int) + 4)
    shape = shape_of(65_536, int(lengths.max()), 1)
    dense = DenseOrder(lengths, shape, ENDLESS, 0)
    tokens = [dense.tokens(step) for step in range(dense.steps_of(0))]
    assert min(tokens) > 0.95 * 65_536
    assert np.mean(tokens) > 0.99 * 65_536
    dense.steps = len(tokens)
    rows, collate = [{"input_ids": range(n)} for n in lengths], PackingCollator(Collator(0, 8, masks_logits=False), False)
    ours = packed_padding_share(DenseRows(rows, dense, shape.bins, 8), collate, 1)
    order = BatchOrder(lengths, 195, 90, 0)  # as many rows per step on average, packed step by step
    theirs = packed_padding_share(PackedRows(rows, order, shape.bins, 8), collate, 1)
    assert ours < 0.01 < theirs


def test_processes_have_the_same_steps() -> None:
    assert len({shape_of(65_536, 1_500, processes) for processes in (1, 2, 4, 8)}) == 1
    assert shape_of(65_536, 1_500, 3).bins == 42
    with pytest.raises(UserError, match=r"global_batch_tokens: 2,000 tokens over 2 process.*set at least 3,000"):
        shape_of(2_000, 1_500, 2)
    with pytest.raises(UserError, match=r"global_batch_tokens: a step has 8 packed rows.*\(3\); lower it to at most 300"):
        DenseOrder([5, 6, 7], Shape(8, 100), 1, 0)


def dense(**training: Any) -> Training:
    given = {"packing": "dense", "global_batch_tokens": 1_000, "num_train_epochs": 2, **training}
    return Training.model_validate(given)


def test_the_plan_counts_steps_of_whole_epochs() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 500)
    plan = make_plan(dense(), lengths, [20], 2)
    order = DenseOrder(lengths, Shape(*plan.dense), ENDLESS, 0)  # type: ignore[misc]
    assert plan.steps == order.steps_in(2) == order.steps_of(0) + order.steps_of(1)
    assert plan.epochs == pytest.approx(2, rel=0.05)
    assert plan.rows_at_once * plan.accumulation * 2 == plan.per_step == order.shape.bins
    assert make_plan(dense(num_train_epochs=None, max_steps=7), lengths, [20], 1).steps == 7
    assert make_plan(dense(per_device_train_batch_size=4), lengths, [20], 1).rows_at_once == 4
    with pytest.raises(UserError, match=r"per_device_train_batch_size: 3 does not divide the 16 packed rows.*1, 2, 4, 8, 16"):
        make_plan(dense(per_device_train_batch_size=3), lengths, [20], 1)
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*16 packed rows per step, which 3 processes"):
        make_plan(dense(), lengths, [20], 3, {"dense": [16, 62]})


@pytest.mark.parametrize("flatten", [False, True])
def test_equal_splits_have_equal_gradients(models: Callable[..., Path], flatten: bool) -> None:
    """Also with bins that are empty, against each row alone, normalized by the supervised tokens of the step."""
    model = AutoModelForCausalLM.from_pretrained(models()).double().eval()
    assert fused_loss.bind_head_loss(model) is None
    generator = np.random.default_rng(0)
    rows = []
    for length in [30, 29, 28, 30, 30, 6, 5, 4, 7, 3]:
        ids = generator.integers(3, 300, size=length).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    lengths = [len(row["input_ids"]) for row in rows]
    order = DenseOrder(lengths, Shape(4, 32), ENDLESS, 0)
    order.steps = order.steps_of(0)
    packed, plain = DenseRows(rows, order, 4, 8), Collator(0, 8, masks_logits=False, selects_rows=True)
    collate = PackingCollator(plain, flatten)

    def gradient(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        model.zero_grad()
        supervised = sum(len(batch["targets"]) for batch in batches)
        for batch in batches:
            given = {name: tensor for name, tensor in batch.items() if name != "labels"}
            model(**given, num_items_in_batch=supervised).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for step in range(order.steps):
        bins = [packed[4 * step + place] for place in range(4)]
        alone = gradient([plain([rows[row]]) for row in order.batch(step)])
        for at_once in (1, 2, 4):
            split = [collate(bins[start : start + at_once]) for start in range(0, 4, at_once)]
            torch.testing.assert_close(gradient(split), alone, rtol=1e-9, atol=1e-12)
    few = DenseOrder([30] * 5, Shape(4, 32), ENDLESS, 0)
    sizes = [[len(each) for each in few.bins_of(step)] for step in range(few.steps_of(0))]
    assert sorted(map(sum, sizes)) == [2, 3]  # shared evenly, with empty bins
    empty = DenseRows(rows, few, 4, 8)
    batch = collate([empty[place] for place in range(4) if not empty[place].rows][:1])
    gradient([batch, plain([rows[0]])])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, models: Callable[..., Path]) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("dense")
    pairs = zip(sentences(72), sentences(72, seed=1), strict=True)
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {models()}, dtype: float32}}\nstrategy: full\ndata: {{train: {rows}, eval_size: 12}}\n"
        "training: {packing: dense, global_batch_tokens: 600, num_train_epochs: 2, learning_rate: 1e-2, eval_steps: 4,\n"
        "  logging_steps: 1, per_device_train_batch_size: 2}\nevaluation: {samples: 0, control: 'off'}\n"
    )
    return lambda output, *words: load_recipe(str(folder / "recipe.yaml"), [f"output_dir={output}", *words])


@pytest.fixture(scope="module")
def whole(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    loaded = recipe(tmp_path_factory.mktemp("whole"))
    return loaded, run(loaded)["result"]


def curve(result: Any) -> list[float]:
    return [entry["loss"] for entry in result["losses"]]


@pytest.mark.slow
def test_a_resumed_run_is_the_same(recipe: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, result = whole
    plan = result["plan"]
    assert plan["bins"] == plan["dense"][0]
    assert plan["epochs"] == pytest.approx(2, rel=0.1)
    assert result["steps"] == plan["steps"] == len(result["losses"])
    broken = recipe(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, plan["steps"] - 2)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    assert run(broken)["result"]["resumed_from"]
    expected = weights(folder_of(loaded))
    for name, tensor in weights(folder_of(broken)).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_split_of_a_step_changes_no_loss(recipe: Any, whole: Any, tmp_path: Path) -> None:
    _, result = whole
    other = run(recipe(tmp_path, "training.per_device_train_batch_size=4"))["result"]
    assert other["plan"]["accumulation"] < result["plan"]["accumulation"]
    assert curve(other) == pytest.approx(curve(result), rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(recipe: Any, whole: Any, tmp_path: Path) -> None:
    loaded, result = whole
    words = [loaded.source, f"output_dir={tmp_path}", "--accelerate-config", "cpu_ddp", "--num-processes", "2"]
    command = [sys.executable, "-m", "hfstrat", "train", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    other = json.loads((tmp_path / "report.json").read_text())["result"]
    assert other["plan"]["processes"] == 2
    assert other["plan"]["dense"] == result["plan"]["dense"]
    assert curve(other) == pytest.approx(curve(result), rel=1e-4)
