"""Runs on data that are read while training: the weights of a run on the same rows from the disk, also when interrupted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from helpers.distributed import in_world, same
from helpers.kill_runs import Run
from helpers.runs import UNVERIFIED, folder_of, run, stop_at, weights

from hfstrat import errors
from hfstrat.cli import check, main
from hfstrat.errors import UserError
from hfstrat.evaluation.evaluate import Request, evaluate
from hfstrat.evaluation.intervals import ROWS
from hfstrat.recipe import stored
from hfstrat.run import preflight
from hfstrat.trainer import checkpoints, signals
from hfstrat.trainer.trainer import StrategyTrainer

STREAM = ("data.streaming=true", "data.shuffle_buffer=1")
SHUFFLED = ("data.streaming=true", "data.shuffle_buffer=9", "data.eval_size=8", "data.max_length=20", "data.overflow=split")
DROPOUT = "strategy={name: lora, r: 4, lora_dropout: 0.1}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs without verification in a fresh process; signal handlers as in a separate process."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    with signals.restored():
        signals.listen(None)
        yield
    signals._received.first = None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The token ids of each training batch, without padding."""
    found = list[list[tuple[int, ...]]]()
    original = StrategyTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        found.append([tuple(ids[mask.bool()].tolist()) for ids, mask in rows])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StrategyTrainer, "training_step", training_step)
    return found


def same_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_full_batches_give_the_weights_of_a_run_from_the_disk(recipe: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    """A step of all rows is the same in any order, so that both runs are equal bit for bit."""
    lines = rows.read_text().splitlines(keepends=True)
    train, evaluated = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("".join(lines[12:]))
    evaluated.write_text("".join(lines[:12]))
    settings = [f"data.train={train}", f"data.eval={evaluated}", "training.global_batch_size=48", "training.max_steps=3"]
    settings += ["training.num_train_epochs=null", "training.train_sampling_strategy=auto"]
    plain = run(recipe(*settings, f"output_dir={tmp_path / 'plain'}"))
    streamed = run(recipe(*settings, *STREAM, f"output_dir={tmp_path / 'streamed'}"))
    assert same_weights(weights(tmp_path / "plain"), weights(tmp_path / "streamed"))
    assert streamed["result"]["losses"] == plain["result"]["losses"]
    assert streamed["result"]["metrics_after"] == plain["result"]["metrics_after"]
    assert streamed["result"]["tokens"] == plain["result"]["tokens"]
    for name in ("rows_read", "rows_kept", "tokens", "supervised"):  # in three epochs
        assert streamed["run"]["data"]["train"][name] == 3 * plain["run"]["data"]["train"][name]
    assert streamed["result"]["plan"]["epochs"] == 0


def test_steps_are_the_rows_in_order(recipe: Callable[..., Any], seen: list[Any], rows: Path) -> None:
    """Each step has the next rows of the file, whatever the size of a pass; after the last row the first one follows."""
    loaded = recipe(*STREAM, "data.eval_size=10", "training.global_batch_size=8", "training.max_steps=8")
    run(loaded)
    micro, steps = loaded.recipe.training.per_device_train_batch_size, 8
    passes = 8 // micro
    assert len(seen) == steps * passes
    by_step = [sorted(ids for batch in seen[step * passes :][:passes] for ids in batch) for step in range(steps)]
    from transformers import AutoTokenizer

    from hfstrat.data.formats import RowFormat
    from hfstrat.data.render import Renderer

    renderer = Renderer(AutoTokenizer.from_pretrained(loaded.recipe.model.name_or_path), "auto", "auto")
    reading = RowFormat("x", {"prompt": "prompt", "completion": "completion"}, "prompt-completion")
    examples = [reading.example(json.loads(line)) for line in rows.read_text().splitlines()[10:]]
    ids = [tuple(renderer.encode(renderer.render(example))[0][0]) for example in examples]
    endless = ids * 3
    assert by_step == [sorted(endless[step * 8 :][:8]) for step in range(steps)]


def test_an_interrupted_stream_resumes_bit_for_bit(
    recipe: Callable[..., Any], seen: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows that were split across the interruption, a shuffle buffer, dropout and the numbers of the report included."""
    settings = [*SHUFFLED, DROPOUT, "training.max_steps=4", "training.eval_steps=2", "training.save_steps=1"]
    whole = run(recipe(*settings, f"output_dir={tmp_path / 'whole'}"))
    batches = list(seen)
    expected = weights(tmp_path / "whole")
    for step in (1, 3):
        loaded = recipe(*settings, f"output_dir={tmp_path / f'stopped{step}'}")
        seen.clear()
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                run(loaded)
        assert seen == batches[: 2 * step]
        resumed = run(loaded)
        assert resumed["result"]["resumed_from"].endswith(f"checkpoint-{step}")
        assert seen == batches
        assert same_weights(weights(folder_of(loaded)), expected)
        assert resumed["run"]["data"] == whole["run"]["data"]


def test_a_checkpoint_is_refused_with_other_rows(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    shutil.copy(rows, file)
    settings = [*STREAM, "data.eval_size=8", f"data.train={file}", "training.save_steps=1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(*settings))
    file.write_text(file.read_text().replace("cat", "hat"))
    with pytest.raises(UserError, match=r"data\.train: the training data differ"):
        run(recipe(*settings))
    shutil.copy(rows, file)
    with pytest.raises(UserError, match=r"data\.shuffle_buffer was 1, is 5"):
        run(recipe(*settings, "data.shuffle_buffer=5"))
    assert run(recipe(*settings))["result"]["steps"] == 4


def test_a_checkpoint_of_an_earlier_version_did_not_stream(recipe: Callable[..., Any]) -> None:
    """It has none of the keys, and resumes without a remark; a stream is another recipe."""
    now = recipe().recipe.model_dump()
    keys = ("streaming", "shuffle_buffer", "bad_rows")
    before = {**now, "data": {name: value for name, value in now["data"].items() if name not in keys}}
    assert stored.compare(before, now) == ([], [])
    _, refused = stored.compare(before, recipe(*STREAM, "data.eval_size=8").recipe.model_dump())
    assert any("data.streaming" in each for each in refused)


@pytest.mark.slow
def test_a_longer_run_continues_the_stream(recipe: Callable[..., Any], seen: list[Any], tmp_path: Path) -> None:
    settings = [*SHUFFLED, "training.eval_steps=2"]
    run(recipe(*settings, "training.max_steps=6", f"output_dir={tmp_path / 'long'}"))
    batches = list(seen)
    seen.clear()
    run(recipe(*settings, "training.max_steps=3"))
    run(recipe(*settings, "training.max_steps=6"))
    assert seen == batches


@pytest.mark.parametrize(
    "strategy",
    [
        "full",
        "{name: partial, last_n_layers: 1}",
        "{name: scratch, model_type: llama, config: {hidden_size: 32, num_hidden_layers: 2}}",
    ],
    ids=["full", "partial", "scratch"],
)
def test_other_strategies_stream(recipe: Callable[..., Any], tiny: Path, strategy: str) -> None:
    more = [f"model={{tokenizer: {tiny}}}"] if "scratch" in strategy else []
    report = run(recipe(*STREAM, "data.eval_size=8", "training.max_steps=2", f"strategy={strategy}", *more))
    assert report["result"]["steps"] == 2
    assert report["run"]["data"]["train"]["rows_read"] == 16
    if "partial" in strategy:
        assert "read while training" in report["result"]["not_precomputed"]


def test_bad_rows_are_in_the_report_and_on_the_screen(
    recipe: Callable[..., Any], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rows.read_text().splitlines(keepends=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join([*lines[:20], "{\n", *lines[20:]]))
    settings = [*STREAM, "data.eval_size=8", f"data.train={file}", "training.max_steps=4"]
    with pytest.raises(UserError, match=r"rows\.jsonl:21: this row is not valid JSON"):
        run(recipe(*settings))
    assert not (tmp_path / "run").exists()
    preflight.check(recipe(*settings, "data.bad_rows=skip"))
    report = run(recipe(*settings, "data.bad_rows=skip"))
    assert report["run"]["data"]["train"]["rows_bad"] == 1
    printed = capsys.readouterr().out
    assert "1 that cannot be read: data.bad_rows: skip" in printed
    assert f"{file}:21" in printed


def test_check_reads_the_first_rows_and_says_so(
    recipe: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_pairs(tmp_path, 3000)
    with file.open("a") as opened:
        opened.write("{\n")
    loaded = recipe(*STREAM, "data.eval_size=20", f"data.train={file}")
    preflight.check(loaded)
    check.show(loaded, 2)
    printed = capsys.readouterr().out
    assert "(the first 1,000 rows)" in printed
    assert "later rows are not checked yet" in printed
    assert "example 1:" in printed
    assert "epochs" not in printed
    check.show_json(loaded, 2)
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_a_bad_row_ended_resumes_without_it(
    recipe: Callable[..., Any], rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The row is beyond the first ones, so that it is found while training."""
    for name in ("readers.HEAD_ROWS", "streaming.HEAD_ROWS", "streaming.SAMPLE_ROWS"):
        monkeypatch.setattr(f"hfstrat.data.{name}", 10)
    lines = rows.read_text().splitlines(keepends=True)
    file, clean = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    file.write_text("".join([*lines[:40], "{\n", *lines[40:]]))
    clean.write_text("".join(lines))
    settings = [*STREAM, "data.eval_size=8", "training.save_steps=1", "training.max_steps=6"]
    with pytest.raises(UserError, match=r"rows\.jsonl:41: .*data\.bad_rows: skip"):
        run(recipe(*settings, f"data.train={file}"))
    assert checkpoints.step_of(checkpoints.complete(tmp_path / "run")[-1]) == 3
    resumed = run(recipe(*settings, f"data.train={file}", "data.bad_rows=skip"))
    assert resumed["result"]["resumed_from"].endswith("checkpoint-3")
    run(recipe(*settings, f"data.train={clean}", f"output_dir={tmp_path / 'clean'}"))
    assert same_weights(weights(tmp_path / "run"), weights(tmp_path / "clean"))


def test_evaluate_repeats_the_numbers_of_a_streamed_run(recipe: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    """And takes another file, and fewer rows."""
    report = run(recipe(*SHUFFLED, "training.max_steps=2"))
    found = evaluate(Request(str(tmp_path / "run")))
    fewer = evaluate(Request(str(tmp_path / "run"), overrides=["evaluation.max_rows=3", "evaluation.samples=0"]))
    assert fewer["measured"][ROWS]["rows"] == 3
    others = evaluate(Request(str(tmp_path / "run"), data=str(rows), overrides=["evaluation.samples=0"]))
    assert others["measured"][ROWS]["rows"] > 20
    assert found["measured"][ROWS]["after"] == report["result"]["measured"][ROWS]["after"]
    assert [row["after"] for row in found["answers"]] == [row["after"] for row in report["result"]["answers"]]


@pytest.mark.slow
def test_evaluating_fewer_rows_is_the_same_stream(recipe: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    """Rows of the evaluation file that are not evaluated are not trained on either, so a resumed run may evaluate fewer."""
    held = tmp_path / "eval.jsonl"
    held.write_text("".join(rows.read_text().splitlines(keepends=True)[:12]))
    settings = [*STREAM, f"data.eval={held}", "training.save_steps=2"]
    run(recipe(*settings, "training.max_steps=2"))
    resumed = run(recipe(*settings, "training.max_steps=4", "evaluation.max_rows=5"))
    assert resumed["result"]["steps"] == 4


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_comparisons_refuse_a_stream(
    recipe: Callable[..., Any],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = recipe().source
    words = {"compare": ["--budget", "2-steps"], "tune": ["--time", "10min"]}[command]
    out = tmp_path / "out"
    given = ["hfstrat", command, source, *STREAM, "data.eval_size=8", *words, "-o", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == errors.USER
    printed = capsys.readouterr()
    assert "data.streaming: true: runs are compared" in printed.out + printed.err
    assert not out.exists()


@pytest.mark.slow
def test_a_killed_process_resumes_the_stream(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """kill -9 at some moment after the fifth checkpoint, in a process of its own."""
    settings = [*SHUFFLED, DROPOUT, "training.max_steps=14", "training.save_steps=1", "training.eval_steps=7"]
    whole = recipe(*settings, f"output_dir={tmp_path / 'whole'}")
    run(whole)
    folder = tmp_path / "killed"
    killed = Run(whole.source, settings, folder, tmp_path / "cache", 1)
    assert killed.kill_when(lambda: (folder / "checkpoint-5").exists(), patience=120)
    resumed = run(recipe(*settings, f"output_dir={folder}"))
    assert resumed["result"]["resumed_from"]
    assert same_weights(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_train_on_disjoint_rows_whose_union_is_the_stream_of_one(
    recipe: Callable[..., Any], seen: list[Any], tmp_path: Path
) -> None:
    """Step by step; a run of two processes is continued by one, and the other way round."""
    settings = [*SHUFFLED, "model.dtype=float32", "training.max_steps=6", "training.per_device_train_batch_size=2"]
    settings += ["training.save_steps=1", "training.eval_steps=3"]
    loaded = recipe(*settings)
    whole = run(recipe(*settings, f"output_dir={tmp_path / 'one'}"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(*settings, f"output_dir={tmp_path / 'mixed'}"))
    steps = [sorted(ids for batch in seen[4 * step : 4 * step + 4] for ids in batch) for step in range(6)]

    def asked(name: str, **more: Any) -> dict[str, Any]:
        overrides = [*settings, f"output_dir={tmp_path / name}"]
        return {
            "name": name,
            "recipe": loaded.source,
            "overrides": overrides,
            "notes_rows": str(tmp_path / f"rows-{name}-"),
        } | more

    runs = [asked("two"), asked("mixed"), asked("half", stop_at=3, ends="interrupted")]
    ended = in_world(tmp_path, runs, processes=2)
    for name, first, last in (("two", 0, 6), ("mixed", 2, 6), ("half", 0, 3)):
        shares = [json.loads((tmp_path / f"rows-{name}-{rank}").read_text()) for rank in (0, 1)]
        for step in range(first, last):
            mine = [[tuple(ids) for batch in share[2 * (step - first) :][:2] for ids in batch] for share in shares]
            assert sorted([*mine[0], *mine[1]]) == steps[step]
            assert len(mine[0]) == len(mine[1]) == 4
    same(whole["result"], ended["two"]["result"], (tmp_path / "one", tmp_path / "two"))
    seen.clear()
    run(recipe(*settings, f"output_dir={tmp_path / 'half'}"))
    assert [sorted(ids for batch in seen[4 * step : 4 * step + 4] for ids in batch) for step in range(3)] == steps[3:]
    assert ended["two"]["result"]["tokens"] == whole["result"]["tokens"]
