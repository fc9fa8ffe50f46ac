"""A prediction is made by the command before the run, and reaches the report of this run alone."""

from __future__ import annotations

from typing import Any

import pytest

from hfstrat.advisor import memory, recipes, speed
from hfstrat.advisor.speed import Rate
from hfstrat.run import prediction
from hfstrat.tasks.report_parts import Predicted


def test_a_prediction_reaches_its_own_run(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, other = recipe(), recipe("output_dir=elsewhere")
    given = {"seconds": 3.0, "seconds_band": (2.0, 4.0), "memory_bytes": 5.0, "verdict": "not of a report"}
    for name, value in prediction.for_environment(loaded.recipe, given).items():
        monkeypatch.setenv(name, value)
    assert prediction.of_environment(loaded.recipe) == Predicted(seconds=3.0, seconds_band=(2.0, 4.0), memory_bytes=5.0)
    assert prediction.of_environment(other.recipe) is None
    for broken in ("", "{}", "[1]", '{"output_dir": 1, "predicted": 2}'):
        monkeypatch.setenv(prediction.VARIABLE, broken)
        assert prediction.of_environment(loaded.recipe) is None


def test_a_run_is_predicted_without_timing_the_machine(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stored rate the time is left out, with the reason; with one it is the advisor's own."""
    loaded = recipe()
    monkeypatch.setattr(speed, "time_product", lambda machine: pytest.fail("a run does not wait for this"))
    monkeypatch.setattr(speed, "stored_rate", lambda: None)
    without = recipes.before_run(loaded)
    assert without["memory_bytes"] > 0
    assert "seconds" not in without
    assert "hfstrat advise" in without["reason"]
    rate = Rate(1e10, "stored", 0.5, 2e10)
    monkeypatch.setattr(speed, "stored_rate", lambda: rate)
    found, expected = recipes.before_run(loaded), recipes.predict_one(loaded.recipe, rate)[0]
    assert {name: found[name] for name in ("seconds", "seconds_band", "memory_bytes")} == {
        name: expected[name]
        for name in ("seconds", "seconds_band", "memory_bytes")  # type: ignore[literal-required]
    }
    assert "stored" in found["source"]


def test_no_failure_of_a_prediction_ends_a_run(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "predict", lambda *given: 1 / 0)
    assert "ZeroDivisionError" in recipes.before_run(recipe())["reason"]
    monkeypatch.setattr(recipes, "predict_one", lambda *given: pytest.fail("nothing is downloaded for it"))
    for remote in ("model=somebody/some-model", "data.train=somebody/some-data"):
        assert recipes.before_run(recipe(remote)) == {"reason": recipes.REMOTE}
