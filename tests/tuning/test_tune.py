"""Real searches on tiny models: the result is an ordinary run that its recipe alone reproduces; kills and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from helpers.vision_language import conversations, make_vision_language

from hfstrat.errors import UserError
from hfstrat.evaluation.intervals import ROWS
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.run import measure
from hfstrat.run.train import run
from hfstrat.tasks import report
from hfstrat.trainer.plan import ENDLESS
from hfstrat.tuning import job, recipes, runner
from hfstrat.tuning.options import Options, check
from hfstrat.tuning.store import Store


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 120)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(next(folder.glob("*.safetensors"))))


@pytest.mark.slow
def test_rungs_continue_and_one_run_with_the_recipe_has_the_same_weights(
    tiny: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rungs, the second from the checkpoint before the first one's cooldown; then a run of the final recipe alone.

    The final job measures no row again that the rung has measured, and says what a run says that measures all of them.
    """
    import torch

    options = Options([], [], str(tiny), str(examples), "full", None, 60.0, None, ("learning_rate",), str(tmp_path / "out"))
    setting = check(options)
    entry = setting.entries[0]
    answers: list[dict[str, Any]] = []
    for number, plan in enumerate(({"trunk": 5, "cooldown": 2}, {"trunk": 12, "cooldown": 3})):
        folder, before = tmp_path / f"rung-{number}", tmp_path / f"rung-{number - 1}"
        start = before / f"checkpoint-{answers[-1]['trunk']}" if answers else None
        overrides = recipes.rung(setting, entry, ["training.learning_rate=0.001"], folder, start)
        spec = job.Spec(
            "rung", entry.source, entry.text, overrides, str(tmp_path / f"{number}.json"), 0.6, choosing=0.6, seed=42
        )
        folder.mkdir()
        (folder / ".hfstrat.lock").touch()
        (folder / job.PLAN).write_text(json.dumps(plan))  # as after an interruption, which does not change the steps
        file = tmp_path / f"{number}.job.json"
        file.write_text(json.dumps(vars(spec)))
        job.run_job(file)
        answers.append(json.loads(Path(spec.result).read_text()))
    steps = answers[1]["trunk"], answers[1]["cooldown"]
    assert steps == (12, 3)

    cooled = tmp_path / "rung-1" / f"checkpoint-{sum(steps)}"
    overrides = recipes.final(setting, entry, ["training.learning_rate=0.001"], tmp_path / "tuned", steps)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / ".hfstrat.lock").touch()
    rows = str(tmp_path / "rung-1" / recipes.SUMS)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "row_sums", None)
        job.run_final(job.Spec("final", entry.source, entry.text, overrides, "", checkpoint=str(cooled), measured=rows))
    run(load_recipe(str(tmp_path / "tuned" / "recipe.yaml"), [f"output_dir={tmp_path / 'alone'}"]))
    found, alone = (weights(tmp_path / name / "final") for name in ("tuned", "alone"))
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], alone[name]) for name in found)
    told = report.read(tmp_path / "tuned")
    assert told is not None
    assert told.finished.verified
    assert told.finished.steps == sum(steps)
    one = report.read(tmp_path / "alone")
    assert one is not None
    assert told.finished.metrics_after == one.finished.metrics_after
    assert told.finished.measured[ROWS].after == one.finished.measured[ROWS].after


@pytest.mark.slow
def test_a_direct_job_is_the_final_run(tiny: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock ends it; the final job finds it done; its recipe alone has the same weights; its answer can be made again."""
    import torch

    options = Options([], [], str(tiny), str(examples), "full", None, 60.0, None, ("learning_rate",), str(tmp_path / "out"))
    setting, folder = check(options), tmp_path / "tuned"
    entry, settings = setting.entries[0], ["training.learning_rate=0.001"]
    (tmp_path / "trials").mkdir()
    folder.mkdir()
    (folder / ".hfstrat.lock").touch()
    result = tmp_path / "trials" / "rung-0.result.json"

    def spec(kind: str, steps: tuple[int, int], **more: Any) -> job.Spec:
        return job.Spec(
            kind, entry.source, entry.text, recipes.final(setting, entry, settings, folder, steps), str(result), **more
        )

    until = time.time() + 2.5
    answer = job.run_direct(direct := spec("direct", (ENDLESS, 1), seconds=60.0, until=until))
    steps = answer["trunk"], answer["cooldown"]
    assert steps[1] == max(1, round(job.COOLDOWN * steps[0]))
    written = (folder / "final" / "model.safetensors").stat().st_mtime_ns
    assert job.run_direct(direct)["score"] == answer["score"], "killed before the answer was written: nothing is trained again"
    job.run_final(spec("final", steps))
    assert (folder / "final" / "model.safetensors").stat().st_mtime_ns == written
    told = report.read(folder)
    assert told is not None
    assert told.finished.verified
    assert told.finished.steps == told.finished.plan.steps == sum(steps)

    run(load_recipe(str(folder / "recipe.yaml"), [f"output_dir={tmp_path / 'alone'}"]))
    found, alone = (weights(tmp_path / name / "final") for name in ("tuned", "alone"))
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert report.read(tmp_path / "alone").finished.metrics_after == told.finished.metrics_after  # type: ignore[union-attr]


def test_the_schedule_needs_its_cooldown() -> None:
    base = {"strategy": "full", "data": "rows.jsonl", "output_dir": "run", "model": "m"}
    for training, words in (
        ({}, "num_decay_steps"),
        ({"extra": {"lr_scheduler_kwargs": {"num_decay_steps": 3}}, "max_time": "1min"}, "max_steps instead of max_time"),
    ):
        with pytest.raises(ValueError, match=words):
            Recipe.model_validate({**base, "training": {"lr_scheduler_type": "warmup_stable_decay", **training}})


def test_a_job_that_takes_the_worker_with_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is started again for the next job, whose answer is read."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "print(json.dumps({'ready': 1.0}), flush=True)\n"
        "file = pathlib.Path(sys.stdin.readline().strip())\n"
        "if 'bad' in file.name: os.kill(os.getpid(), 9)\n"
        "file.with_suffix('.answer').write_text(json.dumps({'status': 'done'}))\n"
        "for message in ({'started': 1}, {'ended': 0}): print(json.dumps(message | {'file': str(file)}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    monkeypatch.setattr(runner, "WORKER", [sys.executable, str(script)])
    runs = runner.Runner(tmp_path)
    answers = [runs.run(tmp_path / name, (tmp_path / name).with_suffix(".answer"), lambda: None) for name in ("bad", "good")]
    runs._job = None  # its process is not one of ours
    runs.close()
    assert answers[0]["status"] == "out-of-memory"
    assert answers[1] == {"status": "done"}


def test_a_job_is_stopped_by_an_interruption_before_the_worker_has_said_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next job does not get its end for its own."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, subprocess, sys, time\n"
        "print(json.dumps({'ready': 1.0}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    file = line.strip()\n"
        "    job = subprocess.Popen(['sleep', '60' if 'first' in file else '0'])\n"
        "    time.sleep(1.0)\n"
        "    print(json.dumps({'started': job.pid, 'file': file}), flush=True)\n"
        "    code = job.wait()\n"
        "    open(file + '.answer', 'w').write(json.dumps({'status': 'done', 'code': code}))\n"
        "    print(json.dumps({'ended': code, 'file': file}), flush=True)\n"
    )
    monkeypatch.setattr(runner, "WORKER", [sys.executable, str(script)])
    runs, looks = runner.Runner(tmp_path), list[bool]()

    def interrupt() -> None:
        looks.append(bool(runs._sent))
        if runs._sent:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            runs.run(tmp_path / "first", tmp_path / "first.answer", interrupt)
        assert looks[-1]
        started = time.monotonic()
        answer = runs.run(tmp_path / "second", tmp_path / "second.answer", lambda: None)
    finally:
        runs.close()
    assert answer == {"status": "done", "code": 0}
    assert time.monotonic() - started < 30, "the first job was stopped, and did not run to its end"


COMMAND = [sys.executable, "-m", "hfstrat", "tune"]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(child: subprocess.Popen[str], condition: Any, seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


def rungs(folder: Path) -> list[tuple[int, int]]:
    if not (folder / "study.log").is_file():
        return []
    return [(trial.number, rung.trunk) for trial in Store(folder, 42).trials() for rung in trial.rungs]


@pytest.mark.slow
def test_a_search_is_killed_twice_joined_and_ends_in_time(tiny: Path, examples: Path, tmp_path: Path) -> None:
    """kill -9 while a candidate trains, the same command, kill -9 again, the same command with a second process."""
    folder = tmp_path / "run"
    arguments = ["--model", str(tiny), "--data", str(examples), "--time", "100s", "--strategies", "full,lora"]
    arguments += ["--output-dir", str(folder)]
    kept: list[tuple[int, int]] = []
    for number in (1, 2):
        child = start(arguments, tmp_path)
        started = (lambda: any(folder.glob("trials/*/rung-0"))) if number == 1 else (lambda: len(rungs(folder)) > 0)
        wait_for(child, started)
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = rungs(folder)
        assert found[: len(kept)] == kept
        kept = found
    began = time.monotonic()
    began_at = time.time()
    child = start(arguments, tmp_path)
    wait_for(child, lambda: Store(folder, 42).get("session")["began"] >= began_at)
    other = start(["--join", str(folder)], tmp_path)
    output = child.communicate(timeout=400)[0]
    assert child.returncode == 0, output
    assert time.monotonic() - began <= 1.05 * 100
    assert other.wait(timeout=60) == 0, other.communicate()[0]
    assert set(kept) <= set(rungs(folder))
    told = report.read(folder)
    assert told is not None
    assert told.finished.verified
    table = json.loads((folder / "tune.json").read_text())
    assert table["luck"]["rows"] > 0
    chosen = sum(len(each["curve"]) for each in table["trials"]) > 1  # a busy machine may measure only one
    assert ("selection luck" in output) == chosen
    assert "<svg" in (folder / "report.html").read_text()
    assert len(list(folder.glob("trials/*/*/checkpoint-*"))) <= 1, "what a longer search continues from"


@pytest.mark.slow
def test_a_search_over_conversations_with_images_ends_in_time(tmp_path: Path) -> None:
    model, rows = make_vision_language(tmp_path / "llava", "llava"), conversations(tmp_path, 60)
    arguments = ["--model", str(model), "--data", str(rows), "--time", "75s", "--output-dir", str(tmp_path / "run")]
    began = time.monotonic()
    child = start(arguments, tmp_path)
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 0, output
    assert time.monotonic() - began <= 1.05 * 75
    told = report.read(tmp_path / "run")
    assert told is not None
    assert told.finished.verified
    assert rungs(tmp_path / "run")
    assert "head is excluded: strategy.name: head is not for task: image-text-to-text" in " ".join(output.split())


@pytest.mark.slow
def test_ctrl_c_leaves_the_best_so_far(tiny: Path, examples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--model", str(tiny), "--data", str(examples), "--time", "10min", "--strategies", "full,lora"]
    child = start([*arguments, "--output-dir", str(folder)], tmp_path)
    wait_for(child, lambda: len(rungs(folder)) > 0)
    child.send_signal(signal.SIGINT)
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 130, output
    assert "verified" in output
    told = report.read(folder)
    assert told is not None
    assert told.finished.verified
    assert json.loads((folder / "tune.json").read_text())["interrupted"]


def test_a_recipe_with_an_evaluation_split_is_refused(tiny: Path, examples: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {tiny}\nstrategy: full\ndata: {{train: {examples.parent}, eval_split: test}}\noutput_dir: run\n")
    with pytest.raises(UserError):
        check(Options([str(file)], [], None, None, None, None, 60.0, None, ("learning_rate",), str(tmp_path / "out")))
