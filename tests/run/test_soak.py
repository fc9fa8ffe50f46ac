"""A run killed with -9 repeatedly, at any moment, has the result of an uninterrupted run, bit for bit.

20 kills in all, in preparing, computing once, saving and anywhere else; `make soak` does 200 (HFSTRAT_SOAK=N for others).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.kill_runs import Soak
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("HFSTRAT_SOAK", "20"))
RUN = [
    "training.max_steps=60",
    "training.eval_steps=6",
    "training.logging_steps=7",
    "evaluation.samples=0",
    "data.max_length=64",
]
SHAPE = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"
CASES = {  # strategy, processes, share of the kills
    "lora": ("{name: lora, r: 4, lora_dropout: 0.1}", 1, 4),
    "full": ("full", 1, 3),
    "scratch": (f"{{name: scratch, config: {SHAPE}}}", 1, 3),
    "distill": ("{name: distill, teacher: TEACHER, student: full, baseline: false, teacher_cache: {form: hidden}}", 1, 4),
    "partial": ("{name: partial, last_n_layers: 1, precompute: true}", 1, 3),
    "two": ("{name: lora, r: 4, lora_dropout: 0.1}", 2, 3),
}


def result_of(folder: Path) -> Any:
    return load_file(next((folder / "final").glob("*.safetensors")))


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(recipe: Any, models: Callable[..., Path], tmp_path: Path, case: str) -> None:
    strategy, processes, share = CASES[case]
    settings = [f"strategy={strategy.replace('TEACHER', str(models(tied=True)))}", *RUN]
    if case == "scratch":
        settings += [f"model={{tokenizer: {models()}}}"]
    soak = Soak(recipe().source, settings, tmp_path / "soak", processes, result_of)
    soak.kills(-(-KILLS * share // 20), random.Random(f"{KILLS} {case}"))
