"""Comparisons: what is compared, which runs are started, and what happens to failed ones."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences, write_jsonl
from helpers.classifiers import labeled, make_encoder
from helpers.comparisons import Played, facts, request
from rich.console import Console

from hfstrat import errors
from hfstrat.cli import main
from hfstrat.comparison import compare, processes
from hfstrat.comparison.processes import Ending, Run
from hfstrat.comparison.text import Screen
from hfstrat.engine import entries
from hfstrat.errors import RunError, UserError
from hfstrat.recipe.schema import STRATEGIES
from hfstrat.strategies import defaults

RECIPE = "model: {model}\nstrategy: {strategy}\ndata: {{train: {rows}, eval_size: 12, max_length: 128}}\noutput_dir: run\n"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    monkeypatch.chdir(tmp_path)
    return Played(monkeypatch)


@pytest.fixture
def write(tiny: Path, rows: Path, tmp_path: Path) -> Any:
    """`write("a.yaml", "lora", extra)` writes a recipe and returns its path."""

    def get(name: str, strategy: str = "lora", more: str = "") -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(RECIPE.format(model=tiny, rows=rows, strategy=strategy) + more)
        return str(file)

    return get


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("10min", "time", 600),
        ("90s", "time", 90),
        ("2M-tokens", "tokens", 2e6),
        ("1.5k tokens", "tokens", 1500),
        ("500-steps", "steps", 500),
        ("1 step", "steps", 1),
    ],
)
def test_a_budget_is_parsed(text: str, kind: str, amount: float) -> None:
    found = entries.parse_budget(text)
    assert (found.kind, found.amount) == (kind, amount)


@pytest.mark.parametrize("text", ["", "ten", "0s", "0-steps", "0.5-steps", "1.5-steps", "0-tokens", "-3-steps", "5-epochs"])
def test_a_wrong_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget: .*expected a time such as 10min"):
        entries.parse_budget(text)


def test_every_strategy_has_its_factors() -> None:
    assert set(defaults.FACTORS) == set(defaults.ORDER) <= set(STRATEGIES)
    assert all(all(each) for each in defaults.FACTORS.values())


def test_every_possible_strategy_is_proposed(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """A causal LM supports all of them; each recipe is valid, and they share everything but the strategy."""
    lineup = entries.line_up(request(tmp_path / "out", model=str(tiny), data=str(rows)))
    assert [entry.label for entry in lineup.entries] == list(defaults.ORDER)
    assert not lineup.excluded
    assert all(entry.footprint and entry.footprint.trainable for entry in lineup.entries if entry.strategy != "scratch")
    shown = {entry.label: entry.loaded.recipe.strategy for entry in lineup.entries}
    assert shown["partial"].last_n_layers == 1
    assert shown["distill"].shrink.layers == 2
    assert {entry.loaded.recipe.training.max_steps for entry in lineup.entries} == {20}
    assert not (tmp_path / "out").exists()


def test_a_strategy_that_does_not_support_the_task_is_excluded_or_refused(tmp_path: Path) -> None:
    model, rows = make_encoder(tmp_path / "model", "bert"), labeled(tmp_path)
    given = {"model": str(model), "data": str(rows)}
    lineup = entries.line_up(request(tmp_path / "out", **given))
    assert [entry.label for entry in lineup.entries] == ["head", "partial", "lora", "full", "scratch"]
    assert set(lineup.excluded) == {"distill"}
    assert "text-classification (detected from the columns" in lineup.remarks[0]
    assert lineup.entries[0].loaded.recipe.data.max_length == 64
    with pytest.raises(UserError, match="cannot be a teacher"):
        entries.line_up(request(tmp_path / "out", **given, strategies="full,distill"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing to compare"),
    ({"model": "MODEL"}, "nothing to compare"),
    ({"model": "MODEL", "data": "ROWS", "strategies": "lora,fool"}, "--strategies: fool: no such strategy"),
    ({"model": "MODEL", "data": "ROWS", "strategies": "lora,lora"}, "each once"),
    ({"model": "MODEL", "data": "ROWS", "task": "translation"}, "--task: translation: no such task"),
    ({"model": "./nowhere", "data": "ROWS"}, "--model: ./nowhere: no such folder"),
    ({"model": "MODEL", "data": "./none.jsonl"}, "--data: ./none.jsonl: no such file"),
    ({"model": "MODEL", "data": "ROWS", "task": "text-classification"}, "needs text + label"),
    ({"model": "MODEL", "data": "ROWS", "overrides": ["training.max_steps=3"]}, "training.max_steps is set by the comparison"),
    ({"model": "MODEL", "data": "ROWS", "overrides": ["training.learn=3"]}, "learning_rate"),
    ({"recipes": ["none.yaml"]}, "none.yaml: no such recipe file"),
    ({"recipes": ["a.yaml"], "evaluate": "none.jsonl"}, "--evaluate: none.jsonl: no such file"),
    ({"model": "MODEL", "data": "ROWS", "strategies": "lora", "evaluate": "none.jsonl"}, "--evaluate: none.jsonl: no such"),
    ({"recipes": ["a.yaml"], "model": "MODEL"}, "--model: recipes already set it"),
    ({"recipes": ["a.yaml", "./a.yaml"]}, "given twice"),
    ({"recipes": ["a.yaml", "rows.yaml"]}, "data.eval_size: 12 in a, 20 in rows; a comparison needs the same data"),
    (
        {"recipes": ["a.yaml", "batch.yaml"]},
        "training.global_batch_size: 16 in a, 4 in batch; the same number of steps is then not the same budget",
    ),
    ({"recipes": ["a.yaml"], "output": "a.yaml"}, "--output: a.yaml is a file"),
    ({"recipes": ["a.yaml"], "output": "."}, "contains files that are not from hfstrat compare"),
]


@pytest.mark.parametrize(("given", "expected"), BAD, ids=[expected[:30] for _, expected in BAD])
def test_a_mistake_is_a_sentence_and_nothing_is_written(
    played: Played, write: Any, tiny: Path, rows: Path, tmp_path: Path, given: dict[str, Any], expected: str
) -> None:
    write("a.yaml")
    Path(write("rows.yaml", "full")).write_text(Path("a.yaml").read_text().replace("eval_size: 12", "eval_size: 20"))
    write("batch.yaml", "full", "training: {global_batch_size: 4}\n")
    real = {"MODEL": str(tiny), "ROWS": str(rows)}
    given = {key: real.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(expected)):
        compare.compare(request(Path(given.pop("output", "out")), **given), played.predict)
    assert sorted(tmp_path.rglob("*")) == before
    assert not played.ran


def test_the_command_line_reports_mistakes_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, expected in (
        (["a.yaml"], "--budget: missing"),
        (["a.yaml", "--budget", "3"], "--budget: 3: expected"),
        (["a.yaml", "--budget", "3s", "--timeout", "x"], "--timeout: x: expected a time"),
        (["a.yaml", "seed", "--budget", "3s"], "a.yaml: no such recipe file"),
    ):
        monkeypatch.setattr(sys, "argv", ["hfstrat", "compare", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        output = capfd.readouterr()
        assert ended.value.code == errors.USER
        assert expected in output.err
        assert "Traceback" not in output.err
    assert not list(tmp_path.iterdir())


def test_the_command_has_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hfstrat", "compare", "--help"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    output = capfd.readouterr().out
    assert not ended.value.code
    assert all(option in output for option in ("--budget", "--strategies", "--seeds", "--retry"))


def test_labels_are_as_short_as_possible() -> None:
    assert list(entries.labels(["x/lora.yaml", "x/full.yaml"])) == ["lora", "full"]
    assert list(entries.labels(["x/lora.yaml", "y/lora.yaml"])) == ["x-lora", "y-lora"]


def test_all_runs_share_data_evaluation_and_budget(played: Played, write: Any, tmp_path: Path) -> None:
    """The seed of the first recipe draws the held-out examples of all runs; seeds count up from it."""
    files = [write("a.yaml", "lora"), write("b.yaml", "full", "seed: 7\n")]
    given = request(tmp_path / "out", recipes=files, seeds=3)
    lineup = entries.line_up(given)
    planned = compare.plan(given, lineup)
    assert [(run.label, run.seed) for run in planned] == [(label, seed) for seed in (42, 43, 44) for label in ("a", "b")]
    for run in planned:
        assert {"data.eval_seed=42", "training.max_steps=20", f"seed={run.seed}"} <= set(run.overrides)
    assert len({run.identity for run in planned}) == 6


@pytest.mark.slow
def test_a_budget_of_tokens_becomes_steps(played: Played, write: Any, tmp_path: Path) -> None:
    played.facts = facts(steps=[31, 33])
    found = played.compare(request(tmp_path / "out", recipes=[write("a.yaml")], budget="9k-tokens"))
    words = [run["command"] for run in found["entries"][0]["runs"]]
    assert ["training.max_steps=31" in each for each in words] == [True, False]
    assert "training.max_steps=33" in words[1]


def test_tokens_are_counted_in_the_order_of_the_run() -> None:
    """Compared with a sum over the unpadded tokens of each step."""
    from types import SimpleNamespace

    import numpy as np

    from hfstrat.data.collate import BatchOrder
    from hfstrat.recipe.schema import Training

    lengths = np.random.default_rng(0).integers(3, 60, size=50)
    training = Training(global_batch_size=8, train_sampling_strategy="group_by_length")
    recipe = SimpleNamespace(training=training, seed=5)
    order = BatchOrder(lengths, 8, 100, 5, group_by_length=True)
    for steps in (1, 2, 7, 30):
        exactly = sum(int(lengths[order.batch(step)].sum()) for step in range(steps))
        assert processes.affordable_steps(exactly, lengths, recipe, "a") == steps
        assert processes.affordable_steps(exactly + 1, lengths, recipe, "a") == steps
        assert processes.affordable_steps(exactly - 1, lengths, recipe, "a") == steps - 1 if steps > 1 else True
    with pytest.raises(UserError, match="too few for one step of a: its first 8 examples have"):
        processes.affordable_steps(order.tokens(0) - 1, lengths, recipe, "a")


def test_evaluations_must_use_the_same_examples() -> None:
    processes.check({"a": facts(), "b": facts(tokenizer="two")})
    with pytest.raises(UserError, match="tokens have no defined bytes"):
        processes.check({"a": facts(), "b": facts(tokenizer="two", has_bytes=False)})
    other = processes.DataFacts(**{**vars(facts()), "evaluated": "others"})
    with pytest.raises(UserError, match="a and b are evaluated on different examples"):
        processes.check({"a": facts(), "b": other})


def test_finished_runs_are_not_repeated(played: Played, write: Any, tmp_path: Path) -> None:
    """Interleaved by seed; the same command again runs nothing, more seeds run only what is new."""
    files = [write("lora.yaml", "lora"), write("full.yaml", "full")]
    given = request(tmp_path / "out", recipes=files)
    found = played.compare(given)
    assert played.ran == [("lora", 42), ("full", 42), ("lora", 43), ("full", 43)]
    assert found["best"] == "full"
    assert played.compare(given) == found
    assert len(played.ran) == 4
    assert played.surveys == 1
    played.compare(request(tmp_path / "out", recipes=files, seeds=3))
    assert played.ran[4:] == [("lora", 44), ("full", 44)]


def test_only_what_changed_runs_again(played: Played, write: Any, rows: Path, tmp_path: Path) -> None:
    """A different recipe, budget or data file makes a different run."""
    own = tmp_path / "own.jsonl"
    own.write_bytes(rows.read_bytes())
    files = [write("lora.yaml", "lora"), write("full.yaml", "full")]
    for file in files:
        Path(file).write_text(Path(file).read_text().replace(str(rows), str(own)))
    given = request(tmp_path / "out", recipes=files, seeds=1)
    played.compare(given)
    Path(files[0]).write_text(Path(files[0]).read_text().replace("strategy: lora", "strategy: {name: lora, r: 4}"))
    played.ran.clear()
    played.compare(given)
    assert played.ran == [("lora", 42)]
    own.write_text(own.read_text().replace("cat", "cow", 1))
    played.compare(given)
    assert played.ran == [("lora", 42), ("lora", 42), ("full", 42)]
    played.compare(request(tmp_path / "out", recipes=files, seeds=1, budget="21-steps"))
    assert len(played.ran) == 5


def test_failed_runs_stay_in_the_table(played: Played, write: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the reason, next to finished runs; they run again only with --retry."""
    files = [write(f"{name}.yaml", name) for name in ("lora", "full")] + [write("half.yaml", "lora")]
    played.endings = {"full": ("out-of-memory", "killed (signal 9)"), ("half", 43): ("timed-out", "longer than 9 s")}
    given = request(tmp_path / "out", recipes=files)
    found = {row["label"]: row for row in played.compare(given)["entries"]}
    assert (found["full"]["status"], found["full"]["finished"], found["full"]["quality"]) == ("out-of-memory", 0, None)
    assert (found["half"]["status"], found["half"]["finished"]) == ("timed-out", 1)
    assert found["half"]["quality"] is not None
    assert not found["full"]["front"]["seconds"]
    output = capfd.readouterr().out
    assert "0 of 2: out of memory" in output
    assert "full, seed 42: out of memory: killed (signal 9)" in output
    played.ran.clear()
    played.endings = {}
    played.compare(given)
    assert not played.ran
    played.compare(request(tmp_path / "out", recipes=files, retry=True))
    assert played.ran == [("full", 42), ("full", 43), ("half", 43)]


def test_a_comparison_without_any_result_is_an_error(played: Played, write: Any, tmp_path: Path) -> None:
    played.endings = {"a": ("crashed", "it ended with code 1")}
    with pytest.raises(RunError, match=r"no run finished; the first: crashed: it ended with code 1"):
        compare.compare(request(tmp_path / "out", recipes=[write("a.yaml")]), played.predict)
    assert played.read(tmp_path / "out")["best"] is None


def test_an_interrupted_comparison_resumes(played: Played, write: Any, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    files = [write("lora.yaml", "lora"), write("full.yaml", "full")]
    played.endings = {("lora", 43): interrupt}
    given = request(tmp_path / "out", recipes=files)
    with pytest.raises(RunError, match="interrupted; 2 of 4 runs have ended and are stored") as ended:
        compare.compare(given, played.predict)
    assert ended.value.code == errors.INTERRUPTED
    assert [run["status"] for run in played.read(given.output)["entries"][0]["runs"]] == ["done", "waiting"]
    played.ran.clear()
    played.endings = {}
    played.compare(given)
    assert played.ran == [("lora", 43), ("full", 43)]


def test_a_folder_is_used_by_one_comparison_at_a_time(played: Played, write: Any, tmp_path: Path) -> None:
    given = request(tmp_path / "out", recipes=[write("a.yaml")], seeds=1)
    played.endings = {"a": lambda: compare.compare(given, played.predict) and None}
    with pytest.raises(UserError, match="in use by a running comparison"):
        compare.compare(given, played.predict)


def test_proposed_recipes_can_be_edited(played: Played, tiny: Path, rows: Path, tmp_path: Path) -> None:
    """Proposed recipes are written to files, and comparing these files is the same comparison."""
    given = request(tmp_path / "out", model=str(tiny), data=str(rows), strategies="lora,full", seeds=1)
    first = played.compare(given)
    files = [str(tmp_path / "out" / "recipes" / f"{name}.yaml") for name in ("lora", "full")]
    again = played.compare(request(tmp_path / "out", recipes=files, seeds=1))
    assert len(played.ran) == 2
    assert again["entries"] == first["entries"]


def test_an_edited_recipe_is_not_overwritten(played: Played, tiny: Path, rows: Path, tmp_path: Path) -> None:
    given = request(tmp_path / "out", model=str(tiny), data=str(rows), strategies="lora", seeds=1)
    played.compare(given)
    made = tmp_path / "out" / "recipes" / "lora.yaml"
    made.write_text(made.read_text().replace("name: lora", "name: lora\n  r: 3"))
    with pytest.raises(UserError, match="was edited"):
        played.compare(given)
    played.compare(request(tmp_path / "out", recipes=[str(made)], seeds=1))
    assert len(played.ran) == 2


def test_a_recipe_proposed_before_a_key_was_renamed_is_not_an_edited_one(
    played: Played, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    """It is rewritten in today's names; a comment in a recipe with today's names stays."""
    given = request(tmp_path / "out", model=str(tiny), data=str(rows), strategies="distill", seeds=1)
    first = played.compare(given)
    made = tmp_path / "out" / "recipes" / "distill.yaml"
    todays = made.read_text()
    made.write_text(todays.replace("teacher_weight:", "alpha:"))
    assert made.read_text() != todays
    assert played.compare(given) == first
    assert made.read_text() == todays
    made.write_text(f"# mine\n{todays}")
    assert played.compare(given) == first
    assert made.read_text().startswith("# mine")


def test_separate_evaluation_data(played: Played, write: Any, rows: Path, tmp_path: Path) -> None:
    """Then nothing is held out, in any run."""
    given = request(tmp_path / "out", recipes=[write("a.yaml")], evaluate=str(rows))
    lineup = entries.line_up(given)
    assert lineup.entries[0].loaded.recipe.data.eval[0].path == str(rows)
    assert not any("eval_seed" in word for run in compare.plan(given, lineup) for word in run.overrides)


def test_a_folder_named_like_a_strategy_is_not_a_model(played: Played, write: Any, tmp_path: Path) -> None:
    """Its content may change without changing the runs."""
    given = request(tmp_path / "out", recipes=[write("a.yaml")])
    lineup = entries.line_up(given)
    before = compare.plan(given, lineup)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "report.json").write_text("{}")
    assert compare.plan(given, lineup) == before


def test_a_changed_model_changes_the_runs(played: Played, write: Any, tiny: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny, tmp_path / "own")
    file = Path(write("a.yaml"))
    file.write_text(file.read_text().replace(str(tiny), str(own)))
    given = request(tmp_path / "out", recipes=[str(file)])
    before = compare.plan(given, entries.line_up(given))
    os.utime(own / "model.safetensors", (1, 1))
    assert {run.identity for run in compare.plan(given, entries.line_up(given))}.isdisjoint(run.identity for run in before)


def test_a_terminal_shows_a_live_table(played: Played, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of every run, the last log line of the current one, and the remaining time."""
    output = io.StringIO()
    monkeypatch.setattr(compare, "Screen", lambda: Screen(Console(file=output, force_terminal=True, width=100, height=40)))
    played.endings = {"full": ("out-of-memory", "killed")}
    played.compare(request(tmp_path / "out", recipes=[write("lora.yaml"), write("full.yaml", "full")]))
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output.getvalue())
    for words in (
        "lora, seed 42 (0.0s): step 1",
        "2 of 4 runs; about",
        "waiting",
        "running",
        "out of memory",
        "loss (nats per token)",
    ):
        assert words in text, words


def test_the_comparison_imports_no_torch(write: Any, tmp_path: Path) -> None:
    code = f"""
import sys
from helpers.comparisons import Played, request
from pathlib import Path
import pytest
played = Played(pytest.MonkeyPatch())
played.compare(request(Path({str(tmp_path / "out")!r}), recipes=[{write("lora.yaml")!r}], seeds=1))
assert played.ran
loaded = {{"torch", "transformers", "datasets", "peft"}} & set(sys.modules)
raise SystemExit(f"imported: {{sorted(loaded)}}" if loaded else 0)
"""
    here = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_numbers_are_means_over_seeds_and_examples(played: Played, write: Any, tmp_path: Path) -> None:
    found = played.compare(request(tmp_path / "out", recipes=[write("lora.yaml"), write("full.yaml", "full")], seeds=3))
    for row in found["entries"]:
        losses = [json.loads((Path(run["folder"]) / "run/report.json").read_text())["result"] for run in row["runs"]]
        assert row["quality"] == pytest.approx(sum(each["metrics_after"]["loss"] for each in losses) / 3)
        assert row["seconds"] == losses[0]["setup_seconds"] + losses[0]["train_seconds"]
        assert row["over_seeds"][0] < row["quality"] < row["over_seeds"][1]
        assert row["over_rows"][0] < row["quality"] < row["over_rows"][1]
        assert {"memory_bytes", "seconds", "rank"} <= set(row["predicted"])
    lora = found["entries"][0]
    difference = lora["quality"] - found["entries"][1]["quality"]
    assert lora["against_best"]["difference"] == pytest.approx(difference)
    assert lora["against_best"]["significant"]
    assert lora["front"] == {"seconds": True, "memory": True}


def test_models_of_several_tokenizers_are_compared_by_bytes(
    played: Played, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"lora": facts("one"), "full": facts("two")}
    monkeypatch.setattr(processes, "read_data", lambda *_: both)
    found = played.compare(request(tmp_path / "out", recipes=[write("lora.yaml"), write("full.yaml", "full")], seeds=1))
    assert found["quality"]["metric"] == "bits_per_byte"
    for row in found["entries"]:
        result = json.loads((Path(row["runs"][0]["folder"]) / "run/report.json").read_text())["result"]
        assert row["quality"] == pytest.approx(result["metrics_after"]["bits_per_byte"])
        assert row["over_rows"][0] < row["quality"] < row["over_rows"][1]
        assert row["runs"][0]["curve"][-1]["loss"] == pytest.approx(row["quality"])


def test_the_summary_rates_the_advisor(
    played: Played, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether its first choice was best, and how many measurements are within its predictions."""
    from hfstrat.comparison import text

    band = {"seconds": 90.0, "seconds_band": (80.0, 90.0), "memory_bytes": 1.0, "memory_band": (0.0, 2.0), "source": "[1]"}
    predictions: dict[str, Any] = {"lora": {**band, "rank": 1}, "full": {**band, "rank": 2}}
    played.predict = lambda recipes: predictions
    files = [write("lora.yaml"), write("full.yaml", "full")]
    found = played.compare(request(tmp_path / "out", recipes=files))
    lines = text.summary(found)
    assert lines[0].startswith("best: full, loss (nats per token) 1.")
    assert any(line.startswith("the advisor's first choice was lora, versus the best: +0.") for line in lines)
    assert "time was within the predicted range for 1 of 2" in lines
    assert "memory was within the predicted range for 0 of 2" in lines
    shown = capfd.readouterr().out
    assert all(line in shown for line in lines)
    assert "[1]" not in shown  # sources are only on the page
    predictions["lora"]["rank"], predictions["full"]["rank"] = 2, 1
    right = text.summary(played.compare(request(tmp_path / "right", recipes=files)))
    assert "the advisor's first choice was full, which is best" in right
    played.endings = {"full": ("out-of-memory", "killed")}
    failed = text.summary(played.compare(request(tmp_path / "failed", recipes=files)))
    assert "the advisor's first choice was full, which did not finish" in failed


def test_empty_lines_are_not_shown(played: Played, write: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With one seed there is no interval over seeds."""
    for seeds, is_there in ((1, False), (2, True)):
        played.compare(request(tmp_path / f"out{seeds}", recipes=[write("lora.yaml")], seeds=seeds))
        assert ("95% CI, seeds" in capfd.readouterr().out) == is_there
        assert (">95% CI, seeds" in (tmp_path / f"out{seeds}" / "report.html").read_text()) == is_there


def test_the_remaining_time_follows_predictions_and_their_error() -> None:
    screen, planned = Screen(), [Run(label, seed, "", (), Path(label), "") for seed in (1, 2) for label in ("lora", "full")]
    screen.endings, screen.predicted = dict.fromkeys(planned), {"lora": 10.0, "full": 30.0}
    assert screen._left() == "; about 80s left (predicted)"
    screen.endings[planned[0]] = Ending("", "done", "", 20.0)  # twice as long as predicted, so the other is too
    assert screen._left() == "; about 2m 20s left"
    screen.endings[planned[1]] = Ending("", "done", "", 40.0)
    assert screen._left() == "; about 60s left"
    screen.predicted = {}
    assert screen._left() == "; about 60s left"
    screen.endings[planned[1]] = None
    assert screen._left() == "; about 60s left"  # without a prediction, a run takes as long as the others
    screen.endings[planned[0]] = None
    assert screen._left() == ""


def test_predictions_and_measurements_are_shown_together(
    played: Played, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfstrat.comparison import text

    predictions: dict[str, Any] = {
        "lora": {"seconds": 70.0, "seconds_band": (60.0, 80.0), "rank": 1, "verdict": "it fits and does well"}
    }
    played.predict = lambda recipes: predictions if set(recipes) == {"lora", "full"} else {}
    found = played.compare(request(tmp_path / "out", recipes=[write("lora.yaml"), write("full.yaml", "full")], seeds=1))
    lines = [line.cells for line in text.sheet(found) if line.group == "predicted"]
    assert lines[0] == ["70s (60s to 80s), off by 23%", "–"]
    assert lines[1] == ["–", "–"]
    assert lines[3] == ["it fits and does well", "–"]
    predictions["lora"]["seconds"] = 71.0  # closer, now that the run is measured
    again = played.compare(request(tmp_path / "out", recipes=[write("lora.yaml"), write("full.yaml", "full")], seeds=2))
    assert again["entries"][0]["predicted"]["seconds"] == 70


def test_texts_longer_than_the_context_are_split_in_proposed_recipes(tiny: Path, tmp_path: Path) -> None:
    """Running text is not refused for its length, as `advise` does not refuse it."""
    file = write_jsonl(tmp_path / "prose.jsonl", [{"text": " ".join(sentences(90, seed))} for seed in range(20)])
    for entry in entries.line_up(request(tmp_path / "out", model=str(tiny), data=str(file), strategies="lora,full")).entries:
        assert entry.loaded.recipe.data.overflow == "split"
