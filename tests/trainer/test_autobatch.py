"""Batch sizes from measured memory: the largest that fits, and the measurement has no side effects. The device is simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hfstrat.data.collate import Collator
from hfstrat.errors import UserError
from hfstrat.models import blocks, fused_loss
from hfstrat.models.load import Base
from hfstrat.recipe.schema import Training
from hfstrat.tasks import TASKS, CausalLM
from hfstrat.trainer import autobatch
from hfstrat.trainer.plan import Plan, make_plan
from hfstrat.trainer.train_data import TrainData

DATA: Any = SimpleNamespace(lengths=np.array([40, 12, 33, 8]), eval_lengths=np.array([50, 20]))


def fitted(trained: Any, room: dict[str, int], **training: Any) -> tuple[Plan, list[int]]:
    """The plan for memory for this many examples of a step, a step with recomputed activations, and an evaluation."""
    settings = Training(max_steps=5, global_batch_size=16, **training)
    plan = make_plan(settings, DATA.lengths, DATA.eval_lengths, processes=1)
    tried: list[int] = []

    def fits(attempt: Callable[[int], None]) -> Callable[[int], bool]:
        def inner(count: int) -> bool:
            tried.append(count)
            attempt(min(count, 2))  # it really runs
            recomputed = any(getattr(block, "gradient_checkpointing", False) for block in blocks.checkpointable(trained))
            kind = "eval" if "forward" in attempt.__name__ else "recomputed" if recomputed else "step"
            return count <= room[kind]

        return inner

    collate = Collator(0, 8, masks_logits=False, selects_rows=True)
    base = Base(trained, TASKS["causal-lm"], "", None, [], torch.float32, torch.float32)
    loss, worst_row = CausalLM.metrics.loss, CausalLM.rows.worst_row
    rows = TrainData(None, None, collate, plan, torch.float32, torch.device("cpu"), Console())
    made = autobatch.fit_to_memory(settings, rows, trained, base, DATA, loss, worst_row, fits)
    return made, tried


@pytest.fixture
def trained(tiny: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(tiny)
    assert fused_loss.bind_head_loss(loaded) is None
    return loaded


def test_the_largest_that_fits_is_taken_and_nothing_is_left_behind(trained: Any) -> None:
    before = {name: p.clone() for name, p in trained.named_parameters()}
    made, tried = fitted(trained, {"step": 5, "recomputed": 9, "eval": 3})
    assert (made.micro_batch, made.accumulation, made.eval_batch, made.checkpointing) == (4, 4, 2, False)
    assert tried[:3] == [16, 8, 4]
    assert all(p.grad is None for p in trained.parameters())
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())


def test_activations_are_recomputed_where_not_one_row_fits(trained: Any) -> None:
    made, _ = fitted(trained, {"step": 0, "recomputed": 9, "eval": 64})
    assert (made.micro_batch, made.checkpointing) == (8, True)


def test_explicit_settings_are_kept(trained: Any) -> None:
    with pytest.raises(UserError, match="a single sequence"):
        fitted(trained, {"step": 0, "recomputed": 9, "eval": 64}, activation_checkpointing=False)
    room = {"step": 0, "recomputed": 0, "eval": 0}
    made, tried = fitted(trained, room, per_device_train_batch_size=2, per_device_eval_batch_size=3)
    assert (made.micro_batch, made.eval_batch, tried) == (2, 3, [])


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_are_saved_as_they_were(trained: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    before = trained(input_ids=ids).logits
    names = list(trained.state_dict())
    assert "4 blocks are compiled" in blocks.compile_blocks(trained)
    torch.testing.assert_close(trained(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert list(trained.state_dict()) == names


def test_features_need_no_fitting(tmp_path: Path) -> None:
    """Examples that are features already have no tokens for a worst step; set-up does not measure them."""
    from hfstrat.strategies.head.head_model import FeatureCollator

    assert not FeatureCollator.pads
