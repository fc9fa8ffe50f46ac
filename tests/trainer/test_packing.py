"""Packing changes no number, and is used only if a test shows that packed examples do not attend to each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences, write_jsonl
from helpers.runs import run
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from hfstrat.data.collate import BatchOrder, Collator
from hfstrat.data.packing import (
    PackedRows,
    PackingCollator,
    balance,
    count_bins,
    find_leak,
    packed_padding_share,
    padding_share,
)
from hfstrat.errors import UserError
from hfstrat.models import fused_loss
from hfstrat.models.load import Base
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import TASKS
from hfstrat.trainer.plan import make_plan
from hfstrat.trainer.train_data import TrainData, make_batches


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8))
def test_every_row_is_in_one_bin_and_no_bin_is_much_fuller_than_it_must_be(lengths: list[int], bins: int) -> None:
    packed = balance(lengths, bins)
    assert sorted(position for each in packed for position in each) == list(range(len(lengths)))
    fullest = max(sum(lengths[p] for p in each) for each in packed)
    least = max(max(lengths), -(-sum(lengths) // bins))
    assert fullest <= least * 2


def some_rows(count: int = 40) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for length in generator.integers(3, 30, size=count):
        ids = generator.integers(3, 300, size=length).tolist()
        prompt = int(generator.integers(0, length - 1))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_batches_give_the_same_loss_and_gradient(
    models: Callable[..., Path], family: str, attention: str, flatten: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models(family=family), attn_implementation=attention).double().eval()
    assert find_leak(model, flatten) is None
    assert fused_loss.bind_head_loss(model) is None
    rows = some_rows()
    order = BatchOrder([len(row["input_ids"]) for row in rows], 8, 5, seed=0)
    plain = Collator(0, 8, masks_logits=False, selects_rows=True)
    packed = PackedRows(rows, order, 3, 8)
    collate = PackingCollator(plain, flatten)

    def step(batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for batch in batches:
            counted = int((batch["labels"][..., 1:] != -100).sum())  # as Trainer counts
            assert counted == len(batch["targets"])
            loss = model(**{k: v for k, v in batch.items() if k != "labels"}, num_items_in_batch=1).loss
            loss.backward()
            total += float(loss)
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    for number in range(3):
        here, grad = step([plain([rows[i] for i in order.batch(number)])])
        there, packed_grad = step([collate([packed[number * 3], packed[number * 3 + 1]]), collate([packed[number * 3 + 2]])])
        assert here == pytest.approx(there, rel=1e-12)
        assert torch.allclose(grad, packed_grad, rtol=1e-9, atol=1e-12)


def test_models_whose_examples_see_each_other_are_found_out(models: Callable[..., Path]) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    assert find_leak(model, False) is not None
    window = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    assert find_leak(MistralForCausalLM(window).eval(), False) is None
    assert "a packed example" in str(find_leak(careless(models()), False))


def careless(folder: Path) -> Any:
    """A model that attends to the complete row, as a custom one may do."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    body = model.base_model
    whole = body.forward
    body.forward = lambda input_ids, **kwargs: whole(input_ids, **kwargs | {"attention_mask": torch.ones_like(input_ids)})
    return model


def test_shares_of_padding_are_what_the_batches_hold() -> None:
    rows = some_rows()
    order = BatchOrder([len(row["input_ids"]) for row in rows], 8, 5, seed=0)
    real = sum(order.tokens(step) for step in range(5))
    plain = Collator(0, 8, masks_logits=False)
    numbers = list(order)
    held = sum(plain([rows[i] for i in numbers[k : k + 4]])["input_ids"].numel() for k in range(0, 40, 4))
    assert padding_share(order, 4, 8) == pytest.approx(1 - real / held)
    packed = PackedRows(rows, order, 3, 8)
    for collate in (
        PackingCollator(plain, False),
        PackingCollator(plain, True),
        PackingCollator(plain, True, few_widths=False),
    ):
        groups = [
            [packed[k] for k in range(start, min(start + 2, step + 3))]
            for step in range(0, 15, 3)
            for start in (step, step + 2)
        ]
        held = sum(collate(group)["input_ids"].numel() for group in groups)
        assert packed_padding_share(packed, collate, 2) == pytest.approx(1 - real / held)


def recipe(folder: Path, model: Path, **training: Any) -> list[str]:
    pairs = zip(sentences(80), sentences(80, seed=1), strict=True)
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {model}, dtype: float32}}\nstrategy: lora\ndata: {{train: {rows}, eval_size: 12}}\n"
        "training: {max_steps: 6, global_batch_size: 8, per_device_train_batch_size: 2, learning_rate: 1e-2, eval_steps: 3,\n"
        "  logging_steps: 1}\nevaluation: {samples: 0}\n"
    )
    return [f"training.{name}={value}" for name, value in training.items()]


@pytest.mark.slow
def test_a_packed_run_is_the_run_that_is_not_packed(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {}
    for packing in (True, False):
        words = recipe(tmp_path, tiny, packing=packing, train_sampling_strategy="random")
        report = run(load_recipe(str(tmp_path / "recipe.yaml"), [*words, f"output_dir={tmp_path / str(packing)}"]))
        assert report is not None
        curves[packing] = [entry["loss"] for entry in report["result"]["losses"]]
        assert report["result"]["plan"]["bins"] == (4 if packing else None)
        assert report["result"]["metrics_after"]["tokens"] > 0
    assert curves[True] == pytest.approx(curves[False], rel=1e-5)
    printed = capsys.readouterr().out
    assert "packed into 4 rows per step" in printed
    assert "do not attend to each other" in printed


def batches(
    model: Any, packing: bool | str, device: str, stored: dict[str, Any] | None = None, others: tuple[Any, ...] = ()
) -> Any:
    rows = some_rows()
    lengths = np.array([len(row["input_ids"]) for row in rows])
    words = {"max_steps": 5, "global_batch_size": 8, "packing": packing}
    recipe = Recipe.model_validate(
        {"model": "m", "strategy": {"name": "lora"}, "data": {"train": "rows"}, "training": words, "output_dir": "run"}
    )
    plan = make_plan(recipe.training, lengths, lengths, processes=1, stored=stored)
    base = Base(model, TASKS["causal-lm"], "", None, [], torch.float32, torch.float32)
    collate = Collator(0, 8, masks_logits=False, selects_rows=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the weights are on the CPU in either case
    data = TrainData(rows, None, collate, plan, dtype, torch.device(device), Console())
    return make_batches(recipe, data, lengths, base, others)


def test_packing_that_cannot_be_shown_is_refused_or_left_out(tiny: Path) -> None:
    sound = AutoModelForCausalLM.from_pretrained(tiny)
    assert batches(sound, True, "cpu").plan.bins
    assert "packing is slower on a CPU" in batches(sound, "auto", "cpu").line
    made = batches(careless(tiny), "auto", "cuda")
    assert made.plan.bins is None
    assert "not packed: a packed example" in made.line
    with pytest.raises(UserError, match=r"training\.packing: true: .*cannot be packed.*set auto or false"):
        batches(careless(tiny), True, "cpu")


def test_a_teacher_has_to_keep_examples_apart_too(tiny: Path) -> None:
    made = batches(AutoModelForCausalLM.from_pretrained(tiny), "auto", "cuda", others=(careless(tiny),))
    assert made.plan.bins is None
    assert "not packed: the teacher: a packed example" in made.line


def test_a_resumed_run_is_packed_if_it_was_packed_before(tiny: Path) -> None:
    sound = AutoModelForCausalLM.from_pretrained(tiny)
    packed, plain = (
        batches(sound, "auto", "cpu", stored={"packed": True}),
        batches(sound, "auto", "cpu", stored={"packed": False}),
    )
    assert packed.plan.bins
    assert plain.plan.bins is None
    with pytest.raises(UserError, match="cannot be packed"):
        batches(careless(tiny), "auto", "cpu", stored={"packed": True})


def test_no_bin_is_wider_than_what_was_measured() -> None:
    lengths = [60, 60, 60, 60, 5, 5, 5, 5] * 10  # two of 60 would fit in one bin of 100
    order = BatchOrder(lengths, 8, 10, seed=0)
    bins = count_bins(order, 100, 1)
    for step in range(10):
        rows = order.lengths[order.batch(step)].tolist()
        assert max(sum(rows[place] for place in each) for each in balance(rows, bins)) <= 100
