"""Slurm: the script's body really runs, under programs of Slurm that stop, kill and requeue it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import engines
from helpers.runs import run, weights
from helpers.scripts import check_script
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.clusters import job as jobs
from hfstrat.clusters import slurm
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe

pytest_plugins = ["helpers.launches"]

VENV = ("--venv", "stub/venv")
SLOW = 400.0  # seconds to wait for a real session on a busy machine


def log_of(tmp_path: Path, job: str = "100") -> str:
    return (tmp_path / "runs" / "chat.launch" / f"{job}.log").read_text()


def follow(launch: Any, cluster: Path, source: str, *words: str) -> int:
    """Submit and follow with the stand-in."""
    return int(launch(source, "--on", "slurm", "--gpus", "0", *VENV, "--follow", *words))


def end_sessions(cluster: Path, stub: Path, count: int) -> subprocess.Popen[bytes]:
    """A process that sends the signal of the time limit to the first sessions, as soon as each of them trains."""
    body = (
        "import sys, time; from pathlib import Path\n"
        "stub, state, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "for n in range(1, count + 1):\n"
        "    while not (stub / f'ready-{n}').exists(): time.sleep(0.02)\n"
        "    (state / '100.USR1').touch()\n"
    )
    return subprocess.Popen([sys.executable, "-S", "-c", body, str(stub), str(cluster), str(count)])


def test_a_job_at_its_time_limit_saves_is_requeued_and_resumes(
    launch: Any, source: str, planned: Callable[..., Path], cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = planned("wait-save", "wait-save", "done")
    ender = end_sessions(cluster, stub, 2)
    assert follow(launch, cluster, source, "training.learning_rate=1e-3") == 0
    ender.wait()
    shown, log = capsys.readouterr().out, log_of(tmp_path)
    assert [line for line in log.splitlines() if line.startswith("hfstrat: session")] == [
        f"hfstrat: session {n} of job 100 on host[0-0]" for n in (1, 2, 3)
    ]
    assert log.count("saved; the job is requeued and resumes") == 2
    assert "checkpoint-1\ncheckpoint-2" in log  # the last session saw them
    assert log.count(f"train {source} training.learning_rate=1e-3") == 3  # the same command resumes
    assert log.strip() in shown  # the log was followed to its end
    assert "job       100 ended: COMPLETED, exit code 0" in shown
    assert "result    runs/chat: done" in shown
    assert engines.state(cluster, "100")["restarts"] == 2


@pytest.mark.parametrize(
    ("plan", "words", "code", "sentence"),
    [
        (("wait-idle",), (), 130, "no checkpoint was saved in this session"),
        (("wait-save", "wait-save"), ("--max-restarts", "1"), 130, "1 restarts (--max-restarts) are used up"),
        (("save-3",), (), 3, ""),
    ],
)
def test_what_would_repeat_is_not_requeued(
    launch: Any,
    source: str,
    planned: Callable[..., Path],
    cluster: Path,
    tmp_path: Path,
    plan: tuple[str, ...],
    words: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    """A session without progress, too many sessions, and ends that a restart does not change; the exit code is training's."""
    ender = end_sessions(cluster, planned(*plan), sum(word.startswith("wait") for word in plan))
    assert follow(launch, cluster, source, *words) == code
    ender.wait()
    assert sentence in log_of(tmp_path)
    assert engines.state(cluster, "100")["restarts"] == len(plan) - 1


def test_a_failed_node_restarts_the_job_and_scancel_does_not(
    launch: Any, source: str, planned: Callable[..., Path], cluster: Path
) -> None:
    stub = planned("wait-save", "wait-save")
    assert launch(source, "--on", "slurm", "--gpus", "0", *VENV) == 0
    engines.wait_for((stub / "ready-1").exists)
    (cluster / "100.NODE_FAIL").touch()
    engines.wait_for((stub / "ready-2").exists)
    subprocess.run(["scancel", "100"], check=True)
    engines.wait_for(lambda: engines.state(cluster, "100")["state"] == "CANCELLED")
    assert engines.state(cluster, "100")["restarts"] == 1  # only that of the node


def test_a_second_job_for_one_output_dir_is_refused(
    launch: Any, source: str, planned: Callable[..., Path], cluster: Path, tmp_path: Path
) -> None:
    stub = planned("wait-save", "done")
    words = (source, "--on", "slurm", "--gpus", "0", *VENV)
    assert launch(*words) == 0
    engines.wait_for((stub / "ready-1").exists)
    before = (tmp_path / "runs" / "chat.launch" / "job.sbatch").read_text()
    with pytest.raises(UserError, match="job 100 for runs/chat waits or runs already"):
        launch(*words, "--nodes", "1", "training.max_steps=9")
    assert (tmp_path / "runs" / "chat.launch" / "job.sbatch").read_text() == before
    assert not (cluster / "101.json").exists()
    with pytest.raises(UserError, match="no result yet"):
        launch(*words, "--fetch")
    (cluster / "100.CANCEL").touch()
    engines.wait_for(lambda: engines.state(cluster, "100")["state"] == "CANCELLED")
    assert launch(*words, "--follow") == 0  # it has ended, so the next one is submitted
    assert launch(*words, "--fetch") == 0


def test_each_node_gets_its_rank_the_first_host_and_one_port(
    launch: Any, source: str, planned: Callable[..., Path], cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned("done", "done")
    monkeypatch.setenv("MY_SECRET", "s3cret-value")
    words = ("--nodes", "2", "--cpus", "6", "--secret", "MY_SECRET", "--env", "EXTRA=a b", "--before", "echo prepared")
    assert follow(launch, cluster, source, *words) == 0
    log = log_of(tmp_path)
    port = 20000 + 100
    for rank in (0, 1):
        assert (
            f"-m hfstrat train {source} --accelerate-config cpu_ddp --num-processes 2 --num-machines 2 --machine-rank {rank} "
            f"--main-process-ip 127.0.0.1 --main-process-port {port}\n" in log
        )
    assert log.count("SECRET=s3cret-value THREADS=6 EXTRA=a b") == 2  # passed, and written nowhere
    assert log.startswith("prepared\n")
    files = [file.read_text() for file in (tmp_path / "runs" / "chat.launch").iterdir() if file.suffix != ".log"]
    assert len(files) == 2
    assert not any("s3cret" in text for text in files)


def test_what_sbatch_says_is_the_message(launch: Any, source: str, planned: Callable[..., Path], tmp_path: Path) -> None:
    planned("done")
    with pytest.raises(UserError, match="sbatch: error: invalid partition specified: nosuch") as refused:
        launch(source, "--on", "slurm", "--gpus", "0", *VENV, "--partition", "nosuch")
    assert refused.value.code == 2
    assert not (tmp_path / "runs" / "chat.launch" / "launch.json").exists()


@pytest.mark.slow
def test_a_cluster_without_accounting(
    launch: Any, source: str, planned: Callable[..., Path], cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned("save-3")
    (tmp_path / "bin" / "sacct").write_text("#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    assert follow(launch, cluster, source) == 3
    assert "ended: FAILED, exit code 3" in capsys.readouterr().out


def plan_of(source: str, **options: Any) -> str:
    """The text of the sbatch file."""
    given = jobs.Options(**options)
    job = jobs.make("slurm", load_recipe(source, ["training.global_batch_size=16"]), (), given, slurm.Slurm.default_gpus(given))
    return next(iter(slurm.Slurm(job).plan().files.values()))


SCRIPTS: tuple[dict[str, Any], ...] = (
    {},
    {"nodes": 2, "gpus": 8, "gpu_type": "a100", "time": "2h", "partition": "gpu", "account": "me"},
    {"gpus": 4, "accelerate_config": "fsdp2", "cpus": 32, "sbatch": ("mem=64G", "exclusive", "comment=a b")},
    {"module": ("cuda/12.4",), "container": "docker://me/hfstrat:1", "volume": ("/data:/data",), "env": ("A=it's $HOME",)},
)


@pytest.mark.parametrize("options", SCRIPTS)
def test_the_script_is_valid(source: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_script(plan_of(source, **options), tmp_path)


def test_directives(source: str) -> None:
    text = plan_of(source, **SCRIPTS[1])
    for line in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=a100:8", "time=02:00:00", "signal=B:USR1@300", "requeue"):
        assert f"#SBATCH --{line}\n" in text
    assert "--accelerate-config multi_node_ddp --num-processes 16" in text
    assert "--num-machines 2 --machine-rank" in text
    container = plan_of(source, **SCRIPTS[3])
    assert "exec apptainer exec --nv --bind /data:/data docker://me/hfstrat:1 hfstrat train" in container
    assert container.startswith("#!/bin/bash -l\n")
    assert "module load cuda/12.4\n" in container
    assert "--cpus-per-task=32 bash" in plan_of(source, **SCRIPTS[2])


@given(st.integers(60, 360 * 86400))
@settings(max_examples=60)
def test_times_of_slurm_are_read_back_rounded_to_a_minute(limit: int) -> None:
    found = jobs.parse_time(slurm.slurm_time(float(limit)))
    assert 0 <= found - limit < 60
    assert 0 < slurm.saving(float(limit)) <= limit / 2


@pytest.mark.slow
def test_killed_stopped_and_requeued_equals_uninterrupted(
    launch: Any, recipe: Any, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run: its node fails, then its time limit is near, the third session finishes; the weights are the same bits."""
    words = ("training.max_steps=40", "training.eval_steps=5", "strategy.lora_dropout=0.1", "evaluation.samples=0")
    whole = recipe(*words, f"output_dir={tmp_path / 'whole'}")
    run(whole)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    assert launch(whole.source, *words, "--on", "slurm", "--gpus", "0", "--time", "1h", "--cpus", "1") == 0

    reached = 0
    for what in ("NODE_FAIL", "USR1"):
        engines.wait_for(lambda: newest(folder) > reached, SLOW)  # noqa: B023
        reached = newest(folder)
        (cluster / f"100.{what}").touch()
        engines.wait_for(lambda what=what: not (cluster / f"100.{what}").exists())
    engines.wait_for(lambda: engines.state(cluster, "100")["state"] not in ("PENDING", "RUNNING"), SLOW)
    log = (tmp_path / "run.launch" / "100.log").read_text()
    assert engines.state(cluster, "100")["state"] == "COMPLETED", log
    assert engines.state(cluster, "100")["restarts"] == 2, log
    assert "saved; the job is requeued and resumes" in log
    assert json.loads((folder / "report.json").read_text())["result"]["status"] == "done"
    for name, tensor in weights(tmp_path / "whole").items():
        assert (weights(folder)[name] == tensor).all(), name


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint."""
    return max((int(each.parent.name.split("-")[1]) for each in folder.glob("checkpoint-*/hfstrat_complete.json")), default=0)


@pytest.mark.slow
def test_two_nodes_train_together(
    launch: Any, recipe: Any, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines, both on this host, meet at the first one: the losses are those of one process."""
    words = ("model.dtype=float32", "training.per_device_train_batch_size=2", "evaluation.samples=0")
    one = recipe(*words, f"output_dir={tmp_path / 'one'}")
    run(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert launch(one.source, *words, "--on", "slurm", "--nodes", "2", "--gpus", "0", "--cpus", "1", "--follow") == 0
    results = [json.loads((tmp_path / name / "report.json").read_text())["result"] for name in ("one", "run")]
    losses = [[entry["loss"] for entry in result["losses"]] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "2 processes x 2 passes of 2 sequences" in (tmp_path / "run.launch" / "100.log").read_text()
    assert os.environ.get("SLURM_NODEID") is None
