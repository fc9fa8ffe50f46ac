"""Complete runs on recordings: strategies on families, resumes, cached states, and what other commands make of a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import folder_of, run, stop_at, weights
from helpers.sounds import CLASSES, FAMILIES, audio_recipe, bytes_of, folder_of_classes, make_audio_model, tone

from hfstrat.errors import RunError, UserError
from hfstrat.recipe.load import load_recipe

SCRATCH: dict[str, Any] = {
    "name": "scratch",
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "num_mel_bins": 32},
}
STRATEGIES: dict[str, Any] = {
    "full": "full",
    "head": "head",
    "head then full": {"name": "head", "then": "full"},
    "partial": {"name": "partial", "last_n_layers": 1},
    "lora": {"name": "lora", "r": 2},
}
FAST = (("wav2vec2-group", "full"), ("whisper", "head"), ("ast", "partial"))  # the others are slow tests
ROWS = "evaluation rows"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_classes(tmp_path_factory.mktemp("sounds") / "data", 14)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def get(family: str = "whisper", classes: int = 0) -> Path:
        if (family, classes) not in made:
            made[family, classes] = make_audio_model(tmp_path_factory.mktemp(family) / "model", family, classes)
        return made[family, classes]

    return get


def trained(folder: Path, model: Path | None, sounds: Path, *overrides: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, and its report."""
    loaded = load_recipe(str(audio_recipe(folder, model, sounds, **more)), list(overrides))
    return folder_of(loaded), run(loaded)


def cases() -> list[Any]:
    every = [(family, strategy) for family in FAMILIES for strategy in STRATEGIES]
    return [pytest.param(*one, marks=[] if one in FAST else [pytest.mark.slow]) for one in every]


@pytest.mark.parametrize(("family", "strategy"), cases())
def test_every_strategy_trains_every_family(
    family: str, strategy: str, model_of: Callable[..., Path], sounds: Path, tmp_path: Path
) -> None:
    """The result learns, loads with plain transformers or PEFT, and is the trained model bit for bit."""
    _, report = trained(tmp_path, model_of(family), sounds, strategy=STRATEGIES[strategy])
    verified = report["result"]["verified"]
    assert verified["bit_equal"], verified
    losses = [report["result"]["measured"][ROWS][when]["loss"]["value"] for when in ("before", "after")]
    assert losses[1] < losses[0] or (strategy == "head then full" and losses[1] == losses[0]), "then the solved head is kept"
    assert report["run"]["data"]["labels"]["training_rows"].keys() == set(CLASSES)
