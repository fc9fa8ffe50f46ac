"""A run killed with -9 at any moment and restarted has the result of an uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import preferences, rewarded
from helpers.encoder_families import make_encoder_family
from helpers.kill_runs import Soak
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SETTINGS = ("training.max_steps=48", "training.eval_steps=8", "strategy.lora_dropout=0.1", "training.logging_steps=7")


def result_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "final").glob("*.safetensors")))


def start(recipe: Any, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "hfstrat", "train", recipe().source, *SETTINGS, f"output_dir={folder}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finished(recipe: Any, folder: Path) -> dict[str, torch.Tensor]:
    child = start(recipe, folder)
    printed, _ = child.communicate(timeout=240)
    assert child.returncode == 0, printed
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.mark.parametrize("seed", [1])  # many more kills are in test_soak.py, without the command line
def test_a_killed_run_resumes_bit_for_bit(recipe: Any, tmp_path: Path, seed: int) -> None:
    expected = finished(recipe, tmp_path / "whole")
    folder, chance = tmp_path / "killed", random.Random(seed)
    for _ in range(2):
        child = start(recipe, folder)
        before = len(list(folder.glob("checkpoint-*")))
        end = time.monotonic() + 120
        while len(list(folder.glob("checkpoint-*"))) <= before and child.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    found = finished(recipe, folder) if not (folder / "final").is_dir() else load_file(next(folder.glob("final/*.safetensors")))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "jamba", "mamba", "bert"])
def test_a_killed_run_of_each_kind_of_family(
    families: Any, recipe: Any, short_labeled: Path, tmp_path: Path, family: str
) -> None:
    """Models whose checkpoints transformers converts, with state spaces, and an encoder, each killed twice."""
    settings = ["strategy=full", "training.max_steps=20", "training.eval_steps=4", "evaluation.samples=0", "data.max_length=64"]
    if family == "bert":
        model = make_encoder_family(tmp_path / "model", family)
        settings += ["task=text-classification", f"data.train={short_labeled}", "data.eval_size=6"]
    else:
        model = families(family)
    soak = Soak(recipe().source, [f"model={model}", *settings], tmp_path / "soak", 1, result_of)
    soak.kills(2, random.Random(family))


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_a_killed_run_of_an_objective(models: Any, tmp_path: Path, objective: str) -> None:
    """With a cached reference, and with answers that are sampled while training; each killed twice."""
    if objective == "grpo":
        source = rewarded.recipe(tmp_path, models(), training={"max_steps": 10, "eval_steps": 4, "save_steps": 2})
    else:
        rows = preferences.labeled(40) if objective == "kto" else preferences.pairs(40)
        lengths = {"max_steps": 24, "eval_steps": 8, "save_steps": 4}
        source = preferences.recipe_for(tmp_path, models(), rows, objective, strategy="lora", training=lengths)
    soak = Soak(str(source), [], tmp_path / "soak", 1, result_of)
    soak.kills(2, random.Random(objective))
