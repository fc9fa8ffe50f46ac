"""SkyPilot: the task passes its own validation where it is installed, and its script runs under a `sky` of this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.scripts import check_script

from hfstrat.clusters import job as jobs
from hfstrat.clusters import skypilot
from hfstrat.clusters.job import default_name
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe

pytest_plugins = ["helpers.launches"]

PACKAGE = ("--package", "hfstrat==0.1.0")
VALIDATE = """
import json, sys
import sky
tasks = [sky.Task.from_yaml(file) for file in sys.argv[1:]]
parts = [(task, list(task.resources)[0]) for task in tasks]
print(json.dumps([[t.name, t.num_nodes, r.accelerators, r.use_spot, str(r.job_recovery)] for t, r in parts]))
"""
TASKS: tuple[dict[str, Any], ...] = (
    {"gpus": 0},
    {"gpus": 8, "gpu_type": "A100", "time": "2h", "storage": "s3://my-bucket", "spot": True, "infra": "aws/us-east-1"},
    {"gpus": 1, "gpu_type": "T4", "container": "me/image:1", "env": ("A=it's",), "cpus": 8},
    {"nodes": 2, "gpus": 8, "gpu_type": "H100", "volume": ("shared:/shared",), "max_restarts": 3},
)


def task_of(source: str, **options: Any) -> str:
    """The text of the task."""
    package = () if options.get("container") else ("hfstrat==0.1.0",)
    given = jobs.Options(**{"package": package, **options})
    place = "/shared/chat" if options.get("volume") else "runs/chat"
    overrides = ("training.global_batch_size=16", f"output_dir={place}")
    job = jobs.make("skypilot", load_recipe(source, overrides), overrides, given, skypilot.SkyPilot.default_gpus(given))
    return next(iter(skypilot.SkyPilot(job).plan().files.values()))


@pytest.mark.parametrize("options", TASKS)
def test_the_script_is_valid(source: str, options: dict[str, Any], tmp_path: Path) -> None:
    task = yaml.safe_load(task_of(source, **options))
    check_script(task["run"], tmp_path)
    if "setup" in task:
        check_script("#!/bin/bash\n" + task["setup"], tmp_path)


def test_ends_that_a_restart_does_not_change_are_noted_wherever_a_job_restarts(source: str) -> None:
    for options in TASKS:
        script = yaml.safe_load(task_of(source, **options))["run"]
        restarts = bool(options.get("storage") or options.get("volume"))
        assert ('if [ -f "$ended" ]' in script) is restarts
        assert ("ended=\n" in script) is not restarts


def test_several_machines_meet_at_the_first_one(source: str) -> None:
    task = yaml.safe_load(task_of(source, **TASKS[3]))
    assert (task["num_nodes"], task["resources"]["accelerators"], task["volumes"]) == (2, "H100:8", {"/shared": "shared"})
    assert "--accelerate-config multi_node_ddp --num-processes 16" in task["run"]
    assert "NODE=$SKYPILOT_NODE_RANK\n" in task["run"]
    assert "output_dir: /shared/chat\n" in task["run"]


def sky_python() -> str:
    """A Python with SkyPilot: this one, or that of HFSTRAT_SKYPILOT_PYTHON, since its requirements differ from ours."""
    python = os.environ.get("HFSTRAT_SKYPILOT_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else None)
    if python is None:
        pytest.skip("SkyPilot is not installed; HFSTRAT_SKYPILOT_PYTHON names a Python that has it")
    return python


@pytest.mark.slow
def test_skypilot_accepts_the_tasks(source: str, tmp_path: Path) -> None:
    """Read by SkyPilot itself, with its schemas; no cloud is asked: buckets, which it would look for, are left out."""
    files = []
    for number, options in enumerate(TASKS):
        task = yaml.safe_load(task_of(source, **options))
        stored = task.get("file_mounts", {}).pop(skypilot.MOUNT, None)
        assert (stored is not None) == ("storage" in options)
        files.append(tmp_path / f"task-{number}.yaml")
        files[-1].write_text(yaml.safe_dump(task))
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONPATH": ""}
    command = [sky_python(), "-c", VALIDATE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for options, (name, nodes, accelerators, spot, recovery) in zip(TASKS, found, strict=True):
        assert (name, nodes) == (default_name("runs/chat", shared=True), options.get("nodes", 1))
        assert accelerators == ({options["gpu_type"]: options["gpus"]} if options["gpus"] else None)
        assert spot == options.get("spot", False)
        assert ("max_restarts_on_errors" in recovery) == ("storage" in options or "volume" in options)


def test_a_managed_job_resumes_from_its_bucket(
    launch: Any, source: str, planned: Callable[..., Path], cluster: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = planned("save-1", "done")
    (tmp_path / "bin" / "aws").chmod(0o755)
    words = ("--on", "skypilot", "--gpus", "0", "--storage", "s3://my-bucket", *PACKAGE)
    assert launch(source, *words, "--follow") == 0
    shown = capfd.readouterr().out
    assert "hfstrat: continues with what earlier attempts have kept\nstub session 2" in shown
    assert "result    runs/chat: done" in shown
    assert (stub / "count").read_text().strip() == "2"
    assert (tmp_path / "runs" / "chat" / "checkpoint-1" / "weights").exists()
    assert (cluster / "home" / "hfstrat" / "files").is_dir()


def test_a_cluster_keeps_the_result_on_its_disk(
    launch: Any,
    source: str,
    planned: Callable[..., Path],
    cluster: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned("done")
    monkeypatch.setenv("MY_SECRET", "s3cret-value")
    words = ("--on", "skypilot", "--gpus", "0", "--secret", "MY_SECRET", "--env", "EXTRA=1", *PACKAGE)
    assert launch(source, *words) == 0
    shown = capfd.readouterr().out
    assert f"`sky down {default_name('runs/chat', shared=True)}` removes it" in shown
    assert "1 machine x no GPU, 1 process, no restart" in shown
    assert "s3cret" not in shown
    assert "s3cret" not in (tmp_path / "runs" / "chat.launch" / "task.yaml").read_text()
    assert launch(source, *words, "--fetch") == 0
    assert "result    runs/chat: done" in capfd.readouterr().out
    assert "SECRET=s3cret-value" in (cluster / f"{default_name('runs/chat', shared=True)}.log").read_text()


@pytest.mark.slow
def test_a_failed_job_has_its_code(launch: Any, source: str, planned: Callable[..., Path]) -> None:
    planned("3")
    assert launch(source, "--on", "skypilot", "--gpus", "0", "--follow", *PACKAGE) == 1
    with pytest.raises(UserError, match="no result yet"):
        launch(source, "--on", "skypilot", "--gpus", "0", "--fetch", *PACKAGE)
