"""Advice for preferences: the objective is named, its strategies are ranked, and the recipes train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import preferences

from hfstrat.advisor import data
from hfstrat.cli import advise
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import load_recipe
from hfstrat.run import preflight


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_advice_for_preferences(
    tmp_path: Path, models: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rows = preferences.labeled(60) if name == "kto" else preferences.pairs(60)
    file = preferences.write_rows(tmp_path / "rows.jsonl", rows)
    request = advise.Request(str(models()), str(file), memory="8GiB", time="5min", reports=None)
    advise.advise(request, tmp_path / "advised", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    able = {each["name"] for each in answer["strategies"] if each["can"]}
    assert able == {"partial", "lora", "full"}
    assert any(f"objective: {name}" in remark for remark in answer["data"]["remarks"])
    assert len(answer["recipes"]) == 3
    for written in answer["recipes"]:
        loaded = load_recipe(written)
        assert loaded.recipe.objective.name == name
        assert preflight.check(loaded, network=False) is not None


def test_lengths_are_of_both_sequences_and_max_length_of_one(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "chosen": "c " * 40, "rejected": "d"} for _ in range(30)]
    file = preferences.write_rows(tmp_path / "rows.jsonl", rows)
    found = data.survey(Data.model_validate({"train": str(file)}), None, 2048, None)
    assert found.objective == "dpo"
    assert found.lengths.max() > found.max_length >= 25  # about 80 bytes of the longer answer at 4 bytes per token
    assert found.limit == 2 * found.max_length
    assert found.cut_share == 0
