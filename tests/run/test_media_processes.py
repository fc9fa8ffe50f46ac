"""Runs on images, boxes and recordings: killed at a checkpoint and resumed, and on two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import detectors, images, sounds
from helpers.distributed import in_world, same
from helpers.runs import run, weights

from hfstrat.recipe.load import load_recipe

AUGMENTED: dict[str, dict[str, Any]] = {
    "image-classification": {"image": {"mixup": 0.3}},
    "object-detection": {},
    "audio-classification": {"audio": {"augmentation": "on"}},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`recipe_of(task, folder)` writes the recipe of a full fine-tuning, augmented."""
    root = tmp_path_factory.mktemp("media")
    made = {
        "image-classification": (
            images.image_recipe,
            images.make_image_model(root / "vit", "vit"),
            images.folder_of_classes(root / "images"),
        ),
        "object-detection": (
            detectors.box_recipe,
            detectors.make_detector(root / "yolos", "yolos", detectors.CLASSES),
            detectors.folder_of_boxes(root / "boxes", 16),
        ),
        "audio-classification": (
            sounds.audio_recipe,
            sounds.make_audio_model(root / "whisper", "whisper"),
            sounds.folder_of_classes(root / "sounds", 14),
        ),
    }

    def write(task: str, folder: Path) -> Path:
        recipe, model, data = made[task]
        return Path(recipe(folder, model, data, **AUGMENTED[task]))

    return write


@pytest.mark.parametrize("task", AUGMENTED)
def test_a_killed_run_resumes_bit_for_bit(task: str, recipe_of: Callable[..., Path], tmp_path: Path) -> None:
    """kill -9 while the second checkpoint is written or later."""
    steps = ("training.max_steps=8", "training.save_steps=1", "training.load_best_model_at_end=false")
    run(load_recipe(str(recipe_of(task, tmp_path / "whole")), list(steps)))
    file = recipe_of(task, tmp_path / "killed")
    words = [sys.executable, "-m", "hfstrat", "train", str(file), *steps]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    end = time.monotonic() + 240
    while len(list((tmp_path / "killed").glob("run/checkpoint-*"))) < 2 and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert child.poll() is None
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    report = run(load_recipe(str(file), list(steps)))
    assert report["result"]["resumed_from"]
    one, other = (weights(tmp_path / name / "run") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("task", AUGMENTED)
def test_two_processes_are_one(task: str, recipe_of: Callable[..., Path], tmp_path: Path) -> None:
    """The files of a step on two processes, of detectors with as many boxes as they happen to have, give the same run."""
    options = ["model.dtype=float32", "training.load_best_model_at_end=false", "training.learning_rate=1e-4"]
    file = str(recipe_of(task, tmp_path))
    asked = [{"name": "two", "recipe": file, "overrides": [*options, f"output_dir={tmp_path / 'two'}"]}]
    two = in_world(tmp_path, asked, HFSTRAT_CACHE=str(tmp_path / "cache"))["two"]["result"]
    report = run(load_recipe(file, [*options, f"output_dir={tmp_path / 'one'}"]))
    same(report["result"], two, (tmp_path / "one", tmp_path / "two"))
    assert two["metrics_after"] == pytest.approx(report["result"]["metrics_after"], rel=1e-3)
