"""report.html of a run: one valid document that loads nothing, whatever the report holds and whatever it lacks."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import page_reports
from helpers.page_reports import KINDS, report, stored
from helpers.pages import check, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.errors import UserError
from hfstrat.evaluation.intervals import ROWS
from hfstrat.pages import charts
from hfstrat.pages.blocks import BAD, GOOD, LONGEST, UNCLEAR
from hfstrat.pages.render import render, visible
from hfstrat.recipe import format
from hfstrat.run import advice, examples, page, verdict
from hfstrat.tasks.base import Pictures
from hfstrat.tasks.report import Report, Result, parse

JPEG = "data:image/jpeg;base64,/9j/4AAQ"
EVIL = "</p><script>alert('x')</script><img src=http://e.x/y onerror=z> \" ' & \x00\x1b[31m \u202edesrever\u2066 {{ 7 * 7 }} é"
LONG = 20_000  # characters
KEPT = {"status", "task", "name", "metric", "title", "pooling", "python"}  # of strings with a meaning of their own


def html(found: Report, pictures: Pictures | None = None) -> str:
    return render(page.page_of(found, pictures or Pictures()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_each_kind_keeps_the_laws(kind: str) -> None:
    """Each task, objective and strategy adds its own sections, and none is left out of the contents."""
    given = {"pictures": Pictures(JPEG, (JPEG,), (JPEG, JPEG)), "questions": Pictures("", (JPEG,), (), (JPEG, ""))}
    found = check(html(report(kind), given.get(kind)))
    titles = [text for tag, text in found.parts if tag == "h2"]
    own = {"dpo": "Preferences", "kto": "Preferences", "grpo": "Rewards in training", "distill": "Teacher and student"}
    own |= {"classes": "Largest mistakes", "head": "Frozen features", "numbers": "Targets", "pictures": "Largest mistakes"}
    own |= {"partial": "Frozen blocks", "sounds": "Largest mistakes"}
    assert titles[0] == "Result"
    assert own.get(kind, "Baselines") in titles
    expected = {"Curves", "Before and after", "Metrics", "Examples as the model sees them", "Data", "Predicted and measured"}
    assert expected | {"What to try next", "How it ran", "Recipe"} <= set(titles)
    assert len(found.named("img")) == {"pictures": 4, "questions": 2}.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_is_that_of_the_report(kind: str) -> None:
    found = report(kind)
    result, text = found.finished, html(found)
    tables, words = rows_of(text), check(text).words
    own = next(lines for caption, lines in tables.items() if caption.startswith("Evaluation examples"))
    shown = format.without_negative(result.metrics_after)
    assert len(own) == len(shown) + 1
    for name in shown:
        one = result.measured[ROWS]
        assert one.before is not None
        assert one.difference is not None
        cells = own[verdict.named(found, name)]
        shows = (format.metric, format.metric, format.difference)
        for cell, entry, show in zip(cells, (one.before, one.after, one.difference), shows, strict=True):
            estimate = entry[name]
            assert cell.startswith(f"{show(name, estimate.value)} ({show(name, estimate.low)} to {show(name, estimate.high)}")
    for one in result.simple_models:
        cells = tables["Baselines on the same evaluation examples, with 95% intervals"][one.name]
        assert cells[0].startswith(format.metric(one.metric, one.value.value))
        assert cells[1].startswith(format.difference(one.metric, one.difference.value))
    for label in result.evaluation.labels if result.evaluation else []:
        cells = tables["Scores of each label on the evaluation examples, the lowest F1 first"][label.label]
        assert cells[:3] == [format.percent(value) for value in (label.precision, label.recall, label.f1)]
        assert cells[-1] == f"{label.support:,}"
    predicted = tables["Before and after the run"]
    assert predicted["peak memory"] == ["1.00 GiB", "512 MiB to 2.00 GiB", "1.00 GiB", "1.00, within"]
    assert predicted["time to trained weights"] == ["10s", "7.0s to 15s", "12s", "1.20, within"]
    evaluations = tables["Evaluations during training"]
    for point in result.curve:
        assert format.metric("loss", point.eval_loss) in evaluations[f"{point.step:,}"]
    assert "Duplicates in training" in words


def test_the_verdict_is_what_the_intervals_say() -> None:
    """A difference beyond chance, one within it, a loss that rose, and a result below a baseline."""
    found = stored("classes")
    change = found["result"]["measured"][ROWS]["difference"]

    def tone(low: float, high: float, baseline: tuple[float, float] = (0.1, 0.2)) -> str:
        change["accuracy"] = {"value": (low + high) / 2, "low": low, "high": high}
        for one in found["result"]["simple_models"]:
            one["difference"] = {"value": sum(baseline) / 2, "low": baseline[0], "high": baseline[1]}
        return verdict.verdict(parse(found | {"schema_version": 1})).headline.tone

    assert tone(0.1, 0.3) == GOOD
    assert tone(-0.1, 0.3) == UNCLEAR
    assert tone(-0.3, -0.1) == BAD
    assert tone(0.1, 0.3, (-0.2, -0.1)) == BAD
    change["loss"] = {"value": -0.5, "low": -0.6, "high": -0.4}
    losses = stored("sft")
    assert verdict.verdict(parse(losses | {"schema_version": 1})).headline.tone == GOOD, "a loss that fell is an improvement"


def leaves(value: Any, key: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Each string in a JSON value: what holds it, where, and the key that it is under."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, each in items:
        name = place if isinstance(place, str) else key
        if isinstance(each, str):
            yield value, place, name
        yield from leaves(each, name)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_escaped(kind: str) -> None:
    """A report whose every text is markup, control characters and another direction: one document that shows them as text."""
    found = stored(kind)
    changed = 0
    for part in (found["result"], found["run"]["data"], found["environment"], found["run"]["origins"]):
        for holder, place, name in list(leaves(part)):
            if name not in KEPT and "metrics" not in name:
                holder[place] = EVIL
                changed += 1
    assert changed > 10
    text = html(parse(found | {"schema_version": 1}), Pictures(JPEG, (JPEG,), (JPEG, JPEG)))
    words = check(text).words
    assert "<script>alert('x')</script>" in words
    assert "{{ 7 * 7 }}" in words, "a text is no template"
    assert "\u2400" in words, "a control character has a visible symbol"


def test_no_path_of_this_machine_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is shared: paths keep their last part; a path that is part of the data stays, but this machine's folders go."""
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("MY_API_TOKEN", "a-secret-of-this-machine")
    here, found = f"{Path.home()}/mine/secret-folder", stored("sft")
    for part in (found["result"], found["run"]["data"], found["environment"], found["run"]["origins"]):
        for holder, place, name in list(leaves(part)):
            if name not in KEPT and "metrics" not in name:
                holder[place] = f"see {here}/file.txt and {os.getcwd()}/other, a-secret-of-this-machine"
    found["result"]["answers"][0]["after"] = "the manual is in /usr/share/doc/bash"
    text = html(parse(found | {"schema_version": 1}))
    for hidden in (str(tmp_path), os.getcwd(), "/home/somebody", "/opt/models", "a-secret-of-this-machine"):
        assert hidden not in text
    assert "the manual is in /usr/share/doc/bash" in text
    check(text)


def without_each(value: dict[str, Any], required: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in value:
        if key not in required:
            yield key, {name: each for name, each in value.items() if name != key}


@pytest.mark.parametrize("kind", ["sft", "classes"])
def test_a_report_may_lack_any_part(kind: str) -> None:
    found = stored(kind) | {"schema_version": 1}
    needed = {name for name, each in Result.model_fields.items() if each.is_required()}
    cases = [found | {"result": less} for _, less in without_each(found["result"], needed | {"status"})]
    cases += [found | {"run": less} for _, less in without_each(found["run"], {"recipe"})]
    cases = cases[:: 2 if kind == "sft" else 4]
    cases += [found | {"run": found["run"] | {"data": less}} for _, less in without_each(found["run"]["data"], {"train"})]
    cases.append({name: each for name, each in found.items() if name != "environment"})
    bare = {name: found["result"][name] for name in needed} | {"status": "done", "metrics_after": {}}
    cases += [found | {"result": bare}, found | {"result": bare, "run": {"recipe": found["run"]["recipe"]}}]
    for case in cases:
        check(html(parse(case)))


def test_a_report_of_an_earlier_version(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "tasks" / "report_of_version_0.json"
    check(html(parse(json.loads(file.read_text()))))


@pytest.mark.parametrize("has_curve", [True, False])
def test_a_run_that_did_not_finish(has_curve: bool) -> None:
    found = stored("sft") | {"schema_version": 1}
    curve = {key: found["result"][key] for key in ("curve", "losses")} if has_curve else {}
    message = "interrupted; the same command resumes from /home/somebody/runs/first/checkpoint-4"
    found["result"] = {"status": "interrupted", "message": message, **curve}
    text = html(parse(found))
    read = check(text)
    assert "The run was interrupted." in read.words
    assert "resumes from first/checkpoint-4" in read.words
    assert ("Gradient norm" in read.words) == has_curve


def test_its_size_is_bounded() -> None:
    """Long answers, many labels, long runs: what is left out is said."""
    found = stored("classes") | {"schema_version": 1}
    result, many = found["result"], 400
    answer = {"prompt": "p" * LONG, "before": "b" * LONG, "after": "a" * LONG, "reference": "r"}
    labels = [result["evaluation"]["labels"][0] | {"label": f"label {n} {'x' * 30}"} for n in range(many)]
    result |= {"answers": [answer] * 40, "mistakes": [result["mistakes"][0] | {"text": "m" * LONG}] * 40}
    result["evaluation"] = {"labels": labels, "confusion": {"counts": [[1] * 200] * 200}}
    result["losses"] = [{"step": n, "loss": 2.0 + n % 7, "learning_rate": 1e-3, "grad_norm": 1.0} for n in range(1, 2_000)]
    result["curve"] = [result["curve"][0] | {"step": n} for n in range(500)]
    found["run"]["data"]["labels"]["training_rows"] = {f"label {n}": 1 for n in range(many)}
    text = html(parse(found))
    words = check(text).words
    assert len(text) < 2_000_000
    assert f"({LONG - LONGEST:,} more characters are not shown)" in words
    assert "200 more rows are not shown" in words
    assert "16 more examples are not shown" in words


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    found = stored("sft") | {"schema_version": 1}
    for number, one in enumerate(found["result"]["losses"]):
        one["grad_norm"] = (float("nan"), float("inf"), 1.0, 2.0)[number]
    found["result"]["curve"][1]["eval_loss"] = float("nan")
    text = html(parse(found))
    check(text)
    assert "nan" not in "".join(part for part in text.split("<") if "points=" in part)


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert page.write_safely(report(), tmp_path / "gone", said.append) is None
    monkeypatch.setattr(verdict, "verdict", lambda given: 1 / 0)
    assert page.write_safely(report(), tmp_path, said.append) is None
    assert len(said) == 2
    assert all(line.startswith("warning") and "report.html" in line for line in said)
    assert not list(tmp_path.iterdir())


def test_pictures_are_kept_beside_the_report(tmp_path: Path) -> None:
    """And only pictures come back: a changed file cannot put anything else into the page."""
    given = Pictures(JPEG, (JPEG, ""), ("",), ("", JPEG))
    examples.keep_pictures(given, tmp_path)
    assert examples.kept_pictures(tmp_path) == given
    none: dict[str, Any] = {"sheet": "", "answers": [], "mistakes": []}
    foreign = ({"sheet": "http://e.x/"}, {"sheet": 1}, {"examples": ["http://e.x/"]}, {"answers": 1})
    for broken in ("", "[]", *(json.dumps(none | each) for each in foreign)):
        (tmp_path / examples.FILE).write_text(broken)
        assert examples.kept_pictures(tmp_path) == Pictures()
    examples.keep_pictures(Pictures(), tmp_path)
    assert not (tmp_path / examples.FILE).exists()


def test_pictures_and_examples_that_cannot_be_kept_end_no_run(tmp_path: Path) -> None:
    """The result is complete by then, and a failure would replace its report."""

    class Broken:
        """A job whose data and folder are gone."""

        def __init__(self) -> None:
            self.lines: list[str] = []
            self.screen, self.folder = self, tmp_path / "gone"

        def print(self, line: str, markup: bool) -> None:
            self.lines.append(line)

        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    job: Any = Broken()
    examples.keep_safely(job, report("pictures").finished)
    assert examples._or_nothing(job, "examples", lambda: job.data.train[0]) is None
    assert [line.split(":")[0] for line in job.lines] == [
        f"{'warning':<16} no {name} in the report" for name in ("pictures", "examples")
    ]


@pytest.mark.parametrize(
    ("training", "command"),
    [
        ({"max_steps": 4}, "training.max_steps=8"),
        ({"max_steps": 9, "max_time": "10min"}, "training.max_time"),
        ({"num_train_epochs": 0.5, "max_time": "10min"}, "training.num_train_epochs=1"),
        ({"num_train_epochs": 3, "max_time": "10min"}, "training.max_time"),
        ({"num_train_epochs": 0.5, "load_best_model_at_end": False}, "training.num_train_epochs=1"),
    ],
)
def test_the_advice_to_train_longer_names_the_limit_of_the_run(training: dict[str, Any], command: str) -> None:
    found = stored()
    found["run"]["recipe"]["training"] |= {"max_steps": None, **training}
    found["result"]["overfitting"] = []
    given = parse(found | {"schema_version": 1})
    assert command in [each for text, each in advice.advice(given, given.finished) if "train longer" in text]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=True), st.floats(allow_nan=True)), max_size=3000), st.integers(4, 300))
def test_a_thinned_line_has_the_ends_and_the_extremes(line: list[tuple[float, float]], most: int) -> None:
    found = charts.thinned(line, most)
    finite = [point for point in line if all(abs(value) < float("inf") for value in point)]
    assert len(found) <= max(most, 4)
    assert set(found) <= set(finite)
    if finite:
        assert found[0] == finite[0]
        assert found[-1] == finite[-1]
        heights = [y for _, y in finite]
        assert {min(heights), max(heights)} <= {y for _, y in found}


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec=None), max_size=200))
def test_any_text_is_shown(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert shown == visible(shown)
    kept = "".join(letter for letter in text if letter.isalnum())
    assert all(letter in shown for letter in kept)


def test_evaluations_have_a_page_too() -> None:
    from hfstrat.run.evaluation_page import page_of
    from hfstrat.tasks.report import parse as parsed

    for kind in KINDS:
        found = stored(kind)
        recipe = parsed(found | {"schema_version": 1}).run.recipe
        one = copy.deepcopy(found["result"]["measured"])
        one[ROWS]["details"] = found["result"]["evaluation"]
        given = {"target": "/home/somebody/runs/first", "against": "/opt/models/Tiny-Base", "measured": one, "seconds": 3.0}
        answers = [{"prompt": EVIL, "after": "y", "before": "x", "reference": "z"}]
        more = {"settings": {"seed": 1, "quantization": "recorded"}, "environment": found["environment"]}
        text = render(page_of(given | {"answers": answers} | more, recipe))
        words = check(text).words
        assert "first: evaluation" in words
        assert "/home/somebody" not in text
        assert "/opt/models" not in text
        metric = verdict.main_metric(report(kind))
        assert format.metric(metric, one[ROWS]["after"][metric]["value"]) in words
        check(render(page_of({"target": "x", "measured": {}, "answers": []}, recipe)))


def test_the_kinds_are_all_there() -> None:
    """A task, an objective or a strategy that is added gets a page here too."""
    from hfstrat.objectives import BY_NAME
    from hfstrat.recipe.schema import STRATEGIES
    from hfstrat.tasks import TASKS

    recipes = [report(kind).run.recipe for kind in KINDS]
    assert {recipe.task for recipe in recipes} == set(TASKS)
    assert {recipe.objective.name for recipe in recipes} | {"orpo", "simpo"} == set(BY_NAME)
    assert {recipe.strategy.name for recipe in recipes} | {"scratch"} == set(STRATEGIES)
    assert page_reports.LABELS
    with pytest.raises(UserError):
        parse_unfinished().finished  # noqa: B018


def parse_unfinished() -> Report:
    return parse(stored("sft") | {"schema_version": 1, "result": {"status": "crashed"}})
