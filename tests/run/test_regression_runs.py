"""Complete runs of a regression: every command works on its recipe and its result, in the units of the data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from helpers.classifiers import make_any, measured, write_recipe
from helpers.runs import UNVERIFIED, run, stop_at, weights

from hfstrat.advisor import child
from hfstrat.advisor import data as survey
from hfstrat.cli import check
from hfstrat.cli.advise import Request as AdviceRequest
from hfstrat.cli.advise import advise
from hfstrat.cli.inference import predict
from hfstrat.comparison import text
from hfstrat.engine import entries
from hfstrat.errors import UserError
from hfstrat.evaluation.evaluate import Request, evaluate
from hfstrat.publish import merge
from hfstrat.recipe import library
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import task_of_files, task_of_rows


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without verification in a fresh process."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)


@pytest.fixture
def regress(tmp_path: Path) -> Callable[..., Any]:
    """`regress("bert", "strategy=full")` loads a small recipe."""

    def load(family: str, *overrides: str, targets: int = 1) -> Any:
        model = make_any(tmp_path / family, family)
        return load_recipe(str(write_recipe(tmp_path, model, measured(tmp_path, targets), "regression")), list(overrides))

    return load


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("bert", "full"), pytest.param("llama", "{name: lora, r: 4, lora_dropout: 0.1}", marks=pytest.mark.slow)],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    regress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, strategy: str
) -> None:
    """Also for a head without a bias, whose constant direction is computed again."""
    whole = run(regress(family, f"strategy={strategy}", f"output_dir={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(regress(family, f"strategy={strategy}"))
    again = run(regress(family, f"strategy={strategy}"))
    assert again["result"]["resumed_from"].endswith("checkpoint-2")
    assert again["result"]["metrics_after"] == whole["result"]["metrics_after"]
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_result_is_evaluated_merged_and_predicts_as_in_its_run(
    regress: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(regress("bert", "strategy={name: lora, r: 4}", "training.max_steps=8", targets=2))
    target, after = str(tmp_path / "run"), report["result"]["metrics_after"]
    found = evaluate(Request(target))
    assert found is not None
    for name in ("loss", "mae", "rmse", "pearson", "spearman"):
        value = found["measured"]["evaluation rows"]["after"][name]["value"]
        assert math.isclose(value, after[name], rel_tol=1e-4), name
    capsys.readouterr()
    merge.merge(target, tmp_path / "merged")
    line = capsys.readouterr().out
    assert "predictions of adapter and merged model differ by at most" in line
    assert "KL" not in line
    values = []
    for model in (target, str(tmp_path / "merged")):
        output = tmp_path / f"{len(values)}.jsonl"
        predict(model, ["the cat cat"], None, output)
        values.append(json.loads(output.read_text())["values"])
    assert task_of_files(tmp_path / "merged").name == "regression"
    assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-4), "16 bits would round 2,000 to a multiple of 8"
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "loss (MSE of standardized targets)" in card
    assert "type: pearsonr" in card
    assert "nats" not in card


def test_check_shows_examples_with_their_numbers(regress: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check.show(regress("bert", targets=2), rows=3)
    printed = capsys.readouterr().out
    assert printed.count("tokens, scores_0 20") == 3
    assert "target    scores_0: mean 20" in printed


VALUES = [0.5, 1.25, 2.0, 3.75]


@pytest.mark.parametrize("name", ["label", "score"])
def test_numbers_are_detected_as_a_regression(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `advise` and `compare`, in a column that is called `label` too; whole numbers there are classes."""
    rows = [{"text": f"row {n} has text", name: VALUES[n % 4]} for n in range(40)]
    model, file = make_any(tmp_path / "bert", "bert"), write_jsonl(tmp_path / "rows.jsonl", rows)
    advise(AdviceRequest(model=str(model), data=str(file), device="cpu"), tmp_path / "out", as_json=False)
    output = " ".join(capsys.readouterr().out.split())
    assert f"{name}: mean 1.875, standard deviation" in output
    assert "no quality is predicted: no runs of regressions are known" in output
    ranked = re.findall(r"\b(\d)\. (\w+) no quality", output)
    assert ranked[-1][1] == "scratch", "random weights are last where nothing is known"
    for recipe in (tmp_path / "out").glob("*.yaml"):
        assert load_recipe(str(recipe)).recipe.task == "regression"
    lineup = entries.line_up(
        entries.Request([], [], str(model), str(file), None, None, entries.parse_budget("20-steps"), 1, tmp_path / "c")
    )
    assert "regression (detected from the columns" in lineup.remarks[0]
    assert text.metric_name("loss", "regression") == "loss (MSE of standardized targets)"
    assert task_of_rows([{"text": "a", "label": n} for n in range(3)], "rows").name == "text-classification"
    assert task_of_rows([{"text": "a", "label": str(n / 2)} for n in range(3)], "rows.csv").name == "regression"


def test_numbers_that_do_not_vary_get_no_advice(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n}", "score": 2.5} for n in range(9)])
    with pytest.raises(UserError, match=r"'score' is 2\.5 in all training rows; expected numbers that vary"):
        survey.survey(Data.model_validate({"train": str(file)}), None, 64, None)


def test_the_probe_of_numbers_is_cross_validated() -> None:
    """R^2 is near 1 where the features determine the number, and not above 0 where they are noise."""
    torch.manual_seed(0)
    features, noise = torch.randn(120, 8), torch.randn(120, 8)
    numbers = (features @ torch.randn(8, 2)).double() * 5 + 2000
    assert child.cross_validate(features, numbers, 2) > 0.99
    assert child.cross_validate(noise, numbers, 2) < 0.1


@pytest.mark.parametrize("name", [name for name in library.names("recipes") if name.endswith("regression")])
@pytest.mark.slow
def test_the_bundled_recipes_run(name: str, tmp_path: Path) -> None:
    model, rows = make_any(tmp_path / "llama", "llama"), measured(tmp_path, offset=0.0)
    settings = [f"model={model}", f"data.train={rows}", f"data.eval={rows}", "data.max_length=64"]
    if not name.startswith("head"):
        settings.append("training.max_steps=2")
    report = run(load_recipe(str(library.find("recipes", name)), [*settings, f"output_dir={tmp_path / 'run'}"]))
    assert report["result"]["metrics_after"]["mae"] < 15
