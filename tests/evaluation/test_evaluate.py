"""Measurements: equal for any batch size, with correct intervals, and equal to the report of the training run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from helpers.classifiers import labeled, make_any, write_recipe
from helpers.runs import run

from hfstrat.errors import UserError
from hfstrat.evaluation import table
from hfstrat.evaluation.evaluate import Request, evaluate
from hfstrat.evaluation.intervals import Measurement, draws, means, wilson, with_intervals
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks.base import ratios
from hfstrat.tasks.text_classification.scores import of_sums, score_of

UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


@pytest.fixture(scope="module")
def trained(models: Callable[..., Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run in float32, with all measurements that need no further library."""
    folder = tmp_path_factory.mktemp("measured")
    recipe = folder / "recipe.yaml"
    questions = [{"query": f"the cat {n}", "choices": ["sat on the mat", "ran", f"red {n}"], "gold": n % 3} for n in range(12)]
    choices = write_jsonl(folder / "questions.jsonl", questions)
    recipe.write_text(
        f"model: {{name_or_path: {models()}, dtype: float32}}\nstrategy: {{name: lora, r: 4}}\n"
        f"data: {{train: {rows}, max_length: 128, eval_size: 12}}\n"
        "training: {max_steps: 6, global_batch_size: 8, learning_rate: 3e-2}\n"
        f"evaluation: {{samples: 2, max_new_tokens: 6, metrics: [exact_match, f1], choices: [{choices}]}}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
        run(load_recipe(str(recipe)))
    return folder / "run"


def report_of(run_folder: Path) -> Any:
    return json.loads((run_folder / "report.json").read_text())["result"]


# intervals


def test_a_bootstrap_is_that_of_drawn_rows() -> None:
    """Compared with a slow one that draws examples and computes the metric again."""
    source = np.random.default_rng(0)
    nll, tokens = source.exponential(3, 40), source.integers(1, 9, 40)
    score = ratios({"nll": nll, "tokens": tokens}, {"loss": lambda s: s["nll"] / s["tokens"]})
    found = with_intervals(None, Measurement(40, score))["after"]["loss"]
    again = np.random.default_rng((20240401, 40))
    slow = [(lambda rows: nll[rows].sum() / tokens[rows].sum())(again.integers(0, 40, 40)) for _ in range(1000)]
    assert found["value"] == pytest.approx(nll.sum() / tokens.sum())
    assert [found["low"], found["high"]] == pytest.approx(list(np.quantile(slow, [0.025, 0.975])))


def test_a_difference_is_paired() -> None:
    """If two models differ equally on all examples, the interval of the difference is narrow, however much examples differ."""
    values = np.random.default_rng(1).normal(5, 3, 60)
    before, after = (Measurement(60, means({"loss": values + shift}), order="x") for shift in (0.0, -0.25))
    found = with_intervals(before, after)
    difference = found["difference"]["loss"]
    assert [difference[name] for name in ("value", "low", "high")] == pytest.approx([-0.25] * 3)
    assert found["after"]["loss"]["high"] - found["after"]["loss"]["low"] > 1
    other = with_intervals(Measurement(60, means({"loss": values}), order="y"), after)["difference"]["loss"]
    assert other["low"] is None  # other rows, or in another order


def test_a_share_of_rows_has_an_interval_even_at_its_ends() -> None:
    assert wilson(1.0, 10) == pytest.approx(
        (0.7225, 1.0), abs=1e-4
    )  # as statsmodels' proportion_confint(10, 10, method="wilson")
    assert wilson(0.3, 50) == pytest.approx((0.1910, 0.4375), abs=1e-4)


@pytest.mark.parametrize("many", [False, True], ids=["one label", "several"])
def test_a_classifiers_score_of_weights_is_that_of_repeated_rows(many: bool) -> None:
    source = np.random.default_rng(2)
    sums = np.stack([source.exponential(1, 50), np.ones(50)], axis=1)
    marks = source.integers(0, 4, (50, 3)).astype(np.int8) if many else source.integers(0, 3, (50, 2))
    names = ("a", "b", "c")
    weights = next(draws(50))
    rows = np.repeat(np.arange(50), weights.astype(int))
    expected, _ = of_sums(sums[rows], marks[rows], names)
    expected.pop("rows")
    assert score_of(sums, marks, 3)(weights) == pytest.approx(expected)


# the command, and the training run


@pytest.mark.slow
def test_the_command_reports_the_same_as_the_run(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = report_of(trained)
    whole = evaluate(Request(str(trained), "base", output=str(tmp_path / "out.json")))
    assert whole is not None
    own, theirs = whole["measured"], result["measured"]
    assert own.keys() == theirs.keys() == {"evaluation rows", "answers", "questions.jsonl", "control text"}
    for name, side in ((name, side) for name in own for side in ("before", "after", "difference")):
        for metric, entry in own[name][side].items():
            for key, value in entry.items():
                assert value == pytest.approx(theirs[name][side][metric][key], rel=1e-4, abs=1e-5), (name, side, metric, key)
    for metric in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
        assert own["evaluation rows"]["after"][metric]["value"] == pytest.approx(result["metrics_after"][metric], rel=1e-5)
    assert [answer["after"] for answer in whole["answers"]] == [answer["after"] for answer in result["answers"]]
    assert [answer["before"] for answer in whole["answers"]] == [answer["before"] for answer in result["answers"]]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["measured"]["evaluation rows"]["after"]["loss"] == own["evaluation rows"]["after"]["loss"]
    printed = capsys.readouterr().out
    assert "gain and cost: loss -" in printed
    assert max(map(len, table.lines(own, "base", str(trained)))) <= table.WIDTH


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_no_batch_size_changes_a_result(trained: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = report_of(trained)["measured"]
    whole = evaluate(Request(str(trained), overrides=[f"evaluation.batch_tokens={tokens}"]))
    assert whole is not None
    for name, one in whole["measured"].items():
        for metric, entry in one["after"].items():
            assert entry["value"] == pytest.approx(expected[name]["after"][metric]["value"], rel=1e-5), (name, metric)


def test_other_rows_have_the_masks_of_training(trained: Path, rows: Path) -> None:
    """All examples as a file, which contains the run's own evaluation examples: their sums agree."""
    whole = evaluate(Request(str(trained), data=str(rows), overrides=["evaluation.control=off", "evaluation.choices=[]"]))
    assert whole is not None
    entry = whole["measured"]["evaluation rows"]
    account = json.loads((trained / "report.json").read_text())["run"]["data"]["train"]
    assert entry["rows"] == 60
    assert entry["tokens"] == account["supervised"]


def test_a_model_alone_is_measured_on_the_control_text(tiny: Path) -> None:
    whole = evaluate(Request(str(tiny)))
    assert whole is not None
    assert whole["measured"].keys() == {"control text"}
    assert 4 < whole["measured"]["control text"]["after"]["loss"]["value"] < 8  # ln 320 = 5.8: random weights
    assert whole["measured"]["control text"]["after"]["loss"]["low"] is not None


def test_a_classifier_and_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    body = make_any(tmp_path / "bert", "bert")
    rows = labeled(tmp_path)
    recipe = write_recipe(tmp_path, body, rows)
    run(load_recipe(str(recipe), ["model.dtype=float32", "strategy={name: lora, r: 4}"]))
    result = report_of(tmp_path / "run")
    whole = evaluate(Request(str(tmp_path / "run")))
    assert whole is not None
    own = whole["measured"]["evaluation rows"]
    assert own["after"]["macro_f1"]["value"] == pytest.approx(result["metrics_after"]["macro_f1"])
    assert own["after"]["accuracy"]["low"] < own["after"]["accuracy"]["value"] + 1e-9
    assert own["details"]["labels"] == result["evaluation"]["labels"]
    assert "confusion" in own["details"]
    asked = evaluate(Request(str(tmp_path / "run" / "final"), data=str(rows)))
    assert asked is not None
    assert asked["measured"]["evaluation rows"]["rows"] == 90
    printed = capsys.readouterr().out
    assert "lowest F1" in printed
    assert "precision" in printed
    assert "true / predicted" in printed
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"text": "a b", "label": "bird"}, {"text": "c", "label": "cat"}])
    with pytest.raises(UserError, match="the model predicts cat, dog, fish"):
        evaluate(Request(str(tmp_path / "run"), data=str(odd)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"overrides": ["training.max_steps=3"]}, "only data"),
        ({"overrides": ["evaluation.metric=[f1]"]}, "did you mean"),
        ({"overrides": ["evaluation.metrics=[regex]"]}, "needs a pattern"),
        ({"overrides": ["evaluation.choices=[nowhere.jsonl]"]}, "no such file"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"against": "./nowhere"}, "no such folder"),
    ],
)
def test_mistakes_are_answered_before_anything_is_loaded(trained: Path, words: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request(str(trained), **words).check()


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(trained: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hfstrat", "evaluate", str(trained), "--against", "base", "--metric", "f1", "--json"]
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        subprocess.run([*words, str(output), "--num-processes", str(count)], check=True, capture_output=True)
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, block in one["measured"].items():
        for side in ("before", "after", "difference"):
            for metric, entry in block[side].items():
                assert two["measured"][name][side][metric] == pytest.approx(entry, rel=1e-5, abs=1e-6), (name, side, metric)
    assert one["answers"] == two["answers"]


def test_a_long_measurement_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    from hfstrat.evaluation import forward

    clock, printed = [0.0], StringIO()
    monkeypatch.setattr(forward.time, "monotonic", lambda: clock[0])
    with forward.Progress(Console(file=printed, width=80), "questions", 100) as shown:
        for clock[0] in (5.0, 20.0, 22.0, 80.0):
            shown.advance(20)
    assert printed.getvalue().splitlines() == ["questions: 40%, 0:30 left", "questions: 80%, 0:20 left"]


def test_a_page_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("kept")
    for name, sentence in (("mine.json", "the page beside .* exists already"), ("new.html", "is the name of the page")):
        with pytest.raises(UserError, match=f"--json: .*{sentence}"):
            Request("run", output=str(tmp_path / name))._check_page()
    Request("run", output=str(tmp_path / "new.json"))._check_page()
