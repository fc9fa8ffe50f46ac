"""Whole runs of a classifier: what is promised at the end holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifiers import labelled, make_any, write_recipe

from hfstrat.loading import load_recipe
from hfstrat.train import run

UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_any(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture
def classify(tmp_path: Path, bodies: Any) -> Callable[..., Any]:
    """`classify("bert", "strategy=full", many=True)` loads a small recipe."""

    def load(family: str, *overrides: str, **rows: Any) -> Any:
        return load_recipe(str(write_recipe(tmp_path, bodies(family), labelled(tmp_path, **rows))), list(overrides))

    return load


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_ends_with_a_verified_classifier(classify: Any, family: str) -> None:
    report = run(classify(family))
    result = report["result"]
    print(json.dumps(result, indent=1)[:3000])
    assert result["verified"]["bit_equal"]
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
