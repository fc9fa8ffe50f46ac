"""The stored scores of the evaluation examples add up to the metrics of the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.classifiers import labeled, make_encoder, write_recipe
from helpers.runs import run

from hfstrat.evaluation import intervals
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import TASKS

UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)


def check(report: dict[str, Any], folder: Path, task: str) -> dict[str, np.ndarray]:
    """The metric by which runs are compared equals that of the report, and the curve that of the history."""
    found, after, quality = intervals.read_rows(folder), report["result"]["metrics_after"], TASKS[task].metrics.quality
    assert found[quality.above].sum() / found[quality.below].sum() == pytest.approx(after[quality.metric], rel=1e-6)
    assert found["nll"].sum() / found["items"].sum() == pytest.approx(after["loss"], rel=1e-6)
    assert (np.diff(found["row"]) > 0).all()
    curve = report["result"]["curve"]
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert curve[0]["eval_loss"] == pytest.approx(report["result"]["metrics_before"]["loss"])
    for name in ("seconds", "tokens"):
        assert all(a[name] <= b[name] for a, b in itertools.pairwise(curve))
    assert curve[-1]["tokens"] == report["result"]["tokens"]
    assert report["result"]["setup_seconds"] > 0
    return found


def test_of_a_language_model(recipe: Any) -> None:
    """The pieces of a split example are summed; bits per byte are those of the report."""
    loaded = recipe("data.overflow=split", "data.max_length=16")
    report = run(loaded)
    assert report is not None
    folder = Path(loaded.recipe.output_dir)
    found = check(report, folder, "causal-lm")
    assert 0 < len(found["row"]) < 12  # as many pieces were held out
    bits = found["bits"].sum() / found["bytes"].sum()
    assert bits == pytest.approx(report["result"]["metrics_after"]["bits_per_byte"], rel=1e-6)
    assert (found["right"] <= found["items"]).all()


def test_the_same_rows_are_held_out_under_any_seed(recipe: Any) -> None:
    """With data.eval_seed; without it the seed decides."""
    from conftest import make_tokenizer

    from hfstrat.data.prepare import prepare

    tokenizer = make_tokenizer()

    def held(*overrides: str) -> set[int]:
        loaded = recipe(*overrides).recipe
        return set(prepare(loaded.data, tokenizer, loaded.seed).eval["row"])

    assert held("seed=1") != held("seed=2")
    assert held("seed=1", "data.eval_seed=5") == held("seed=2", "data.eval_seed=5") == held("seed=5")


@pytest.mark.parametrize("many", [False, True])
def test_of_a_classifier(tmp_path: Path, many: bool) -> None:
    file = write_recipe(tmp_path, make_encoder(tmp_path / "model", "bert"), labeled(tmp_path, many=many))
    report = run(load_recipe(str(file)))
    assert report is not None
    found = check(report, tmp_path / "run", "text-classification")
    assert ("true" in found) == (not many)
    if not many:
        assert np.array_equal(found["right"], found["true"] == found["predicted"])
        matrix = np.array(report["result"]["evaluation"]["confusion"]["counts"])
        assert np.trace(matrix) == found["right"].sum()


def test_a_file_that_is_not_whole_is_none(tmp_path: Path) -> None:
    assert intervals.read_rows(tmp_path) == {}
    for content in (b"", b"PK\x03\x04 cut off", json.dumps({}).encode()):
        (tmp_path / intervals.ROWS_FILE).write_bytes(content)
        assert intervals.read_rows(tmp_path) == {}
