"""Runs that are stopped, extended, moved or out of disk space resume as the same run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.kill_runs import Run
from helpers.runs import UNVERIFIED, folder_of, log_history, run, stop_at, weights

from hfstrat import errors
from hfstrat.data.collate import BatchOrder
from hfstrat.errors import RunError, UserError
from hfstrat.run import resume
from hfstrat.trainer import checkpoints, signals
from hfstrat.trainer.trainer import StrategyTrainer

DROPOUT = "strategy={name: lora, r: 4, lora_dropout: 0.1}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs without verification in a fresh process; signal handlers as in a separate process."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    with signals.restored():
        signals.listen(None)
        yield
    signals._received.first = None


def again(loaded: Any) -> dict[str, Any]:
    """Start again, as a new process would."""
    signals.listen(None)
    report = run(loaded)
    assert report is not None
    return report["result"]


def signal_at(monkeypatch: pytest.MonkeyPatch, method: str, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal while this method runs at this step."""
    original = getattr(StrategyTrainer, method)

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and not signals.stop_requested():
            signal.raise_signal(number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StrategyTrainer, method, told)


def assert_same(one: Any, other: Any) -> None:
    expected = weights(folder_of(one))
    for name, tensor in weights(folder_of(other)).items():
        assert torch.equal(tensor, expected[name]), name


STOPS = [  # where the signal arrives, and the step that is saved
    ("training_step", 2, signal.SIGINT, 3),
    ("training_step", 5, signal.SIGTERM, 6),
    ("prediction_step", 4, signal.SIGTERM, 4),
    ("prediction_step", 6, signal.SIGTERM, 6),
]


@pytest.mark.slow
def test_a_signal_finishes_the_step_and_saves_it(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a step, the last step, an evaluation (which is aborted) and the last evaluation."""
    settings = (DROPOUT, "training.max_steps=6", "training.early_stopping_patience=3", "evaluation.samples=0")
    whole = recipe(*settings, f"output_dir={tmp_path / 'whole'}")
    expected = again(whole)
    for method, step, number, saved in STOPS:
        broken = recipe(*settings, f"output_dir={tmp_path / f'{method}-{step}'}")
        with monkeypatch.context() as patch:
            signal_at(patch, method, step, number)
            with pytest.raises(KeyboardInterrupt, match=f"resumes from .*checkpoint-{saved}"):
                again(broken)
        assert checkpoints.fault(folder_of(broken) / f"checkpoint-{saved}") is None
        result = again(broken)
        assert result["resumed_from"].endswith(f"checkpoint-{saved}")
        for fact in ("metrics_before", "metrics_after", "best_step", "steps"):
            assert result[fact] == expected[fact]
        assert_same(whole, broken)


def test_a_signal_before_the_first_step_ends_at_once(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, "prediction_step", 0)
        with pytest.raises(KeyboardInterrupt, match="before the first checkpoint; the same command starts again"):
            again(recipe())
    assert again(recipe())["steps"] == 4


def test_a_signal_while_preparing_ends_at_once(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))

    def computed(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    loaded = recipe("strategy={name: partial, last_n_layers: 1, precompute: true}")
    with monkeypatch.context() as patch:
        patch.setattr("hfstrat.strategies.frozen.precompute._compute_states", computed)
        with pytest.raises(KeyboardInterrupt) as info:
            again(loaded)
    assert "prepared data and cached computations are kept" in str(errors.named(info.value))
    assert not folder_of(loaded).exists()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.name.startswith("hidden_states")] == []
    assert [path.name for path in (tmp_path / "cache").glob(".*building*")] == []
    assert again(loaded)["precomputed"]["built"] == ["train", "eval"]


def test_a_second_ctrl_c_ends_at_once(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StrategyTrainer.training_step

    def impatient(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
            signals._received.first -= 2 * signals.REPEAT
            signal.raise_signal(signal.SIGTERM)  # not a Ctrl-C
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StrategyTrainer, "training_step", impatient)
    with pytest.raises(KeyboardInterrupt, match=r"resumes from .*checkpoint-2"):
        again(recipe())


@pytest.mark.slow
def test_a_finished_run_can_be_extended(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a constant learning rate, two halves equal the full run."""
    constant = (
        DROPOUT,
        "training.lr_scheduler_type=constant",
        "training.eval_steps=2",
        "training.load_best_model_at_end=false",
    )
    whole = recipe(*constant, "training.max_steps=8", f"output_dir={tmp_path / 'whole'}")
    again(whole)
    again(recipe(*constant))
    with pytest.raises(UserError, match="finished run"):
        run(recipe(*constant))
    with pytest.raises(UserError, match="finished run"):
        run(recipe(*constant, "training.max_steps=3"))
    longer = recipe(*constant, "training.max_steps=8", "training.save_steps=4")
    result = again(longer)
    printed = capsys.readouterr().out
    assert "changed since checkpoint-4: training.max_steps was 4, is 8" in printed
    assert "8 steps instead of 4: the constant schedule" in printed
    assert result["resumed_from"].endswith("checkpoint-4")
    assert (folder_of(longer) / "report.earlier.json").is_file()
    assert_same(whole, longer)


@pytest.mark.slow
def test_an_extended_run_follows_the_longer_schedule(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    linear = ("training.lr_scheduler_type=linear", "training.warmup_steps=0", "training.logging_steps=1")
    again(recipe(*linear))
    run(recipe(*linear, "training.max_steps=8"))
    history = json.loads((folder_of(recipe()) / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert [rates[step] for step in (1, 2, 3, 4)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([0.005, 0.00375, 0.0025, 0.00125])
    assert "continues with 0.005 at step 4, where it was 0" in capsys.readouterr().out


def test_a_shorter_run_than_the_checkpoint_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(recipe())
    with pytest.raises(UserError, match=r"1 steps in total, but .*checkpoint-2 is at step 2"):
        run(recipe("training.max_steps=1"))


@pytest.mark.slow
def test_save_logging_and_eval_steps_may_change_on_resume(
    recipe: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(rows.read_text().replace("cat", "dog"))
    data = f"data={{train: {rows}, eval: {held}, max_length: 128}}"
    settings = (DROPOUT, "training.max_steps=8", "training.save_total_limit=9", data)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(*settings))
    changed = ("training.eval_steps=3", "training.save_steps=3", "training.logging_steps=4", "evaluation.max_rows=6")
    report = run(recipe(*settings, *changed, "training.early_stopping_patience=9"))
    assert report is not None
    history = log_history(report)
    assert [e["step"] for e in history if "eval_loss" in e] == [0, 2, 3, 6, 8]
    assert [e["step"] for e in history if "loss" in e] == [1, 2, 4, 8]
    assert {p.name for p in folder_of(recipe()).glob("checkpoint-*")} >= {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    assert report["result"]["best_step"] in (3, 6, 8)  # losses on the earlier evaluation data no longer count


@pytest.mark.slow
def test_evaluating_more_often_changes_no_weight(recipe: Any, tmp_path: Path) -> None:
    often, seldom = (
        recipe(DROPOUT, f"training.eval_steps={n}", "training.load_best_model_at_end=false", f"output_dir={tmp_path / str(n)}")
        for n in (1, 4)
    )
    again(often)
    again(seldom)
    assert_same(often, seldom)


def test_the_weights_before_training_may_be_the_best(recipe: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    settings = ("strategy=full", "training.learning_rate=0.5", "training.warmup_steps=0", "model.dtype=float32")
    result = again(recipe(*settings, "training.early_stopping_patience=2", "training.max_steps=10"))
    assert result["best_step"] == 0
    assert result["steps"] == 4  # two evaluations without a gain
    assert result["metrics_after"]["loss"] == pytest.approx(result["metrics_before"]["loss"], rel=1e-6)
    assert "evaluation never improved on the untrained model" in capsys.readouterr().out
    for name, tensor in load_file(tiny / "model.safetensors").items():
        assert torch.equal(weights(folder_of(recipe()))[name], tensor)


def test_early_stopping_is_not_undone_by_a_kill(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("strategy=full", "training.learning_rate=0.5", "training.max_steps=12", "training.early_stopping_patience=2")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hfstrat.tasks.verify.verify", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(*settings))
    ended = checkpoints.complete(folder_of(recipe()))[-1]
    result = again(recipe(*settings))
    assert result["steps"] == checkpoints.step_of(ended)
    assert result["session_steps"] == 0


def full_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = StrategyTrainer._save_optimizer_and_scheduler

    def save(self: Any, folder: str) -> None:
        if self.state.global_step == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(StrategyTrainer, "_save_optimizer_and_scheduler", save)


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("training.max_steps=6", "training.load_best_model_at_end=false")
    whole, short = (recipe(*settings, f"output_dir={tmp_path / name}") for name in ("whole", "short"))
    again(whole)
    with monkeypatch.context() as patch:
        full_disk(patch, 4)
        again(short)
    assert "the disk is full: checkpoint-4 was not saved; the last complete checkpoint is" in capsys.readouterr().out
    assert [p.name for p in checkpoints.all_checkpoints(folder_of(short))] == ["checkpoint-2", "checkpoint-6"]
    assert_same(whole, short)


@pytest.mark.slow
def test_best_weights_that_did_not_fit_on_disk_are_not_restored(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = StrategyTrainer.evaluate

    def told(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | {"eval_loss": {0: 9.0, 2: 3.0, 4: 1.0, 6: 2.0}[self.state.global_step]}

    monkeypatch.setattr(StrategyTrainer, "evaluate", told)
    full_disk(monkeypatch, 4)
    assert again(recipe("training.max_steps=6"))["best_step"] == 6


@pytest.mark.slow
def test_a_result_that_does_not_fit_on_disk_leaves_the_last_checkpoint(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.strategies.base import Strategy

    def save(self: Any, trainer: Any, folder: Path, base: Any) -> None:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "save", save)
        with pytest.raises(OSError, match="No space left"):
            run(recipe())
    names = {path.name for path in folder_of(recipe()).iterdir()}
    assert "checkpoint-4" in names
    assert not names & {"final", "final.partial"}
    assert json.loads((folder_of(recipe()) / "report.json").read_text())["result"]["status"] == "disk-full"
    assert again(recipe())["session_steps"] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate small file system."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=False)


@pytest.mark.slow
def test_a_real_full_disk(
    recipe: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up after the first checkpoints; the run ends without a result, and succeeds once there is space."""
    original = StrategyTrainer.training_step
    filler = small_disk / "filler"

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3 and not filler.exists():
            filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 200_000))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StrategyTrainer, "training_step", training_step)
    loaded = recipe("strategy=full", "training.max_steps=6", f"output_dir={small_disk / 'run'}")
    with pytest.raises(Exception, match=r"No space left|os error 28|PytorchStreamWriter failed"):
        run(loaded)
    assert json.loads((folder_of(loaded) / "report.json").read_text())["result"]["status"] == "disk-full"
    printed = capsys.readouterr().out
    assert "checkpoint-4 was not saved; the last complete checkpoint is" in printed
    assert "checkpoint-6 was not saved" in printed
    assert [p.name for p in checkpoints.all_checkpoints(folder_of(loaded))] == ["checkpoint-0", "checkpoint-2"]
    assert not (folder_of(loaded) / "final.partial").exists()
    filler.unlink()
    filler.touch()
    assert again(loaded)["resumed_from"].endswith("checkpoint-2")


@pytest.mark.slow
def test_a_moved_run_finds_its_best_weights(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = StrategyTrainer.evaluate

    def told(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | {"eval_loss": 1.0 + abs(self.state.global_step - 2)}

    monkeypatch.setattr(StrategyTrainer, "evaluate", told)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(recipe("training.max_steps=8"))
    folder_of(recipe()).rename(tmp_path / "moved")
    moved = recipe("training.max_steps=8", f"output_dir={tmp_path / 'moved'}")
    assert again(moved)["best_step"] == 2
    elsewhere = recipe("training.max_steps=8", f"training.resume_from_checkpoint={tmp_path / 'moved' / 'checkpoint-8'}")
    assert again(elsewhere)["best_step"] == 2


def test_resuming_reads_no_earlier_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    order = BatchOrder(np.arange(4, 90), 8, 40, 3, group_by_length=True)
    expected = list(order)
    looked: list[int] = []
    original = BatchOrder.batch
    monkeypatch.setattr(BatchOrder, "batch", lambda self, step: looked.append(step) or original(self, step))
    order.begin(17)
    assert list(order)[17 * 8 :] == expected[17 * 8 :]
    assert looked == list(range(17, 40))
    assert len(order) == len(expected)


def hfstrat(*words: str) -> subprocess.Popen[str]:
    import sys

    command = [sys.executable, "-m", "hfstrat", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_stopped_process_names_its_checkpoint_and_resumes_there(
    recipe: Any, tmp_path: Path, processes: int, number: int
) -> None:
    settings = ["training.max_steps=160", "training.eval_steps=20", "evaluation.samples=0", DROPOUT]
    whole, broken, cache, source = tmp_path / "whole", tmp_path / "broken", tmp_path / "cache", recipe().source
    Run(source, settings, whole, cache, processes).finish()
    child = hfstrat("train", source, *settings, "--num-processes", str(processes), f"output_dir={broken}")
    wait_for(lambda: (broken / "checkpoint-20").exists() or child.poll() is not None)
    os.kill(child.pid, number)
    out, err = child.communicate(timeout=100)
    assert child.returncode == errors.INTERRUPTED, out + err
    assert "Traceback" not in err
    assert err.count("stopping: the current step is finished") == 1
    assert err.count("interrupted; the same command resumes from") == 1
    last = checkpoints.complete(broken)[-1]
    assert str(last) in err
    assert checkpoints.step_of(last) > 20
    resumed = Run(source, settings, broken, cache, processes)
    resumed.finish()
    assert f"resuming from {last}" in resumed.log.read_text()
    assert_same(recipe(f"output_dir={whole}"), recipe(f"output_dir={broken}"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_two_processes_at_once(recipe: Any, tmp_path: Path) -> None:
    child = hfstrat("train", recipe().source, "training.max_steps=100000", "--num-processes", "2")
    wait_for(lambda: (tmp_path / "run" / "checkpoint-2").exists() or child.poll() is not None)
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == errors.INTERRUPTED, out + err
    assert err.count("interrupted") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resuming_with_another_number_of_processes_keeps_the_batches(
    recipe: Any, tmp_path: Path, before: int, after: int
) -> None:
    settings = ("model.dtype=float32", "training.max_steps=40", "training.eval_steps=10", "training.save_total_limit=9")
    settings += ("training.per_device_train_batch_size=2", "training.load_best_model_at_end=false", "training.packing=false")
    whole = recipe(*settings, f"output_dir={tmp_path / 'whole'}")
    expected = again(whole)
    given = (recipe().source, [*settings], tmp_path / "run", tmp_path / "cache")
    Run(*given, before).finish()
    for name in ("checkpoint-30", "checkpoint-40", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "report.json").unlink()
    resumed = Run(*given, after)
    resumed.finish()
    assert f"started with {before} processes and resumes with {after}" in resumed.log.read_text()
    result = json.loads((tmp_path / "run" / "report.json").read_text())["result"]
    assert result["resumed_from"].endswith("checkpoint-20")
    assert [e["loss"] for e in result["losses"]] == pytest.approx([e["loss"] for e in expected["losses"]], rel=1e-4)
    found = weights(tmp_path / "run")
    for name, tensor in weights(folder_of(whole)).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_other_errors_are_not_reported_as_disk_full(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StrategyTrainer, "_save_rng_state", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(recipe())
    assert checkpoints.complete(folder_of(recipe())) == []


def test_cached_results_of_other_inputs_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume.cache, "names_in_use", lambda: ["hidden_states-b", "rows-x"])
    stored = {"caches": ["hidden_states-a"]}
    (printed,) = resume.cache_remarks(Path("run/checkpoint-2"), stored)
    assert "hidden_states-a until checkpoint-2, hidden_states-b from here on" in printed
    assert resume.cache_remarks(Path("run/checkpoint-2"), {"caches": ["hidden_states-b"]}) == []
    assert resume.cache_remarks(None, {}) == []


def test_machines_that_see_different_checkpoints_are_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.gather_object", lambda seen: [*seen, "run/checkpoint-2"])
    with pytest.raises(UserError, match="a file system that all machines share"):
        resume.what_to_resume(recipe().recipe, False, 2)


@pytest.mark.parametrize("changed", ["model", "strategy.teacher"])
def test_changed_base_weights_refuse_to_resume(
    recipe: Any, models: Any, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base, or the teacher, was trained again in the meantime."""
    from safetensors.torch import load_file, save_file

    folders = {key: shutil.copytree(models(), tmp_path / key) for key in ("model", "strategy.teacher")}
    strategy = f"strategy={{name: distill, teacher: {folders['strategy.teacher']}, student: lora, baseline: false}}"
    loaded = recipe(strategy, f"model={folders['model']}")
    monkeypatch.setattr("hfstrat.run.measure.conclude", lambda *given: 1 / 0)
    with pytest.raises(RunError, match=r"ZeroDivisionError.*training was complete"):
        run(loaded)
    checkpoint, stored, _ = resume.what_to_resume(loaded.recipe, False, 1)
    assert checkpoint is not None
    assert set(stored["models"]) == {"model", "strategy.teacher"}
    file = folders[changed] / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^{changed}: the weights of .* are not those with which .*checkpoint-\d+"):
        resume.what_to_resume(loaded.recipe, False, 1)
