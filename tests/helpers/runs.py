"""Runs that are stopped on purpose, and what they leave."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hfstrat.recipe.load import Loaded
from hfstrat.run import train
from hfstrat.trainer import checkpoints

UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


def run(loaded: Loaded, overwrite: bool = False) -> Any:
    """Train; returns the report as report.json has it, None on other processes than the first."""
    freeze_libraries()
    report = train.run(loaded, overwrite)
    if report is None:
        return None
    undeclared = [part.model_extra for part in (report, report.run, report.finished, report.environment) if part.model_extra]
    assert not undeclared, "the report's model has to declare every part that a strategy adds"
    return report.model_dump(mode="json")


@functools.cache
def freeze_libraries() -> None:
    """Without the libraries' objects, the garbage collections of each run take half of its time less."""
    import peft  # noqa: F401

    import hfstrat.publish.card
    import hfstrat.run.setup  # noqa: F401

    gc.collect()
    gc.freeze()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "final").glob("*.safetensors")))


def folder_of(loaded: Any) -> Path:
    return Path(loaded.recipe.output_dir)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, trainer: Any = None) -> None:
    """The process dies in the middle of an optimizer step of this class, by default of any."""
    from hfstrat.trainer.trainer import StrategyTrainer

    trainer = trainer or StrategyTrainer
    original = trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", training_step)


def log_history(report: dict[str, Any]) -> list[dict[str, Any]]:
    folder = Path(report["run"]["recipe"]["output_dir"])
    newest = checkpoints.all_checkpoints(folder)[-1]
    history: list[dict[str, Any]] = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return history
