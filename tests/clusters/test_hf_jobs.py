"""Hugging Face Jobs against a Hub on the loopback interface, which runs the jobs: attempts resume from what a bucket keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import engines
from helpers.hub_server import TOKEN
from helpers.jobs_server import HARDWARE, LoopbackJobs, jobs_here
from helpers.runs import run, weights
from helpers.scripts import check_script
from huggingface_hub import JobHardware

from hfstrat.clusters import hf_jobs
from hfstrat.clusters.job import default_name
from hfstrat.errors import UserError

pytest_plugins = ["helpers.launches"]

ON = ("--on", "hf-jobs", "--flavor", "cpu-basic", "--time", "1h", "--package", "hfstrat==0.1.0")


@pytest.fixture
def hub(cluster: Path, tmp_path: Path) -> Iterator[LoopbackJobs]:
    with jobs_here(tmp_path / "hub") as server:
        yield server


def test_attempts_resume_and_the_result_is_fetched(
    launch: Any,
    source: str,
    planned: Callable[..., Path],
    hub: LoopbackJobs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two attempts on machines that start empty: the second one finds the checkpoint of the first one in the bucket."""
    planned("save-1", "done")
    assert launch(source, *ON, "--upload", "--follow", "training.learning_rate=1e-3") == 0
    shown = capsys.readouterr().out
    assert "stub session 1: train recipe.yaml" in shown
    assert "hfstrat: continues with what earlier attempts have kept\nstub session 2" in shown
    assert "checkpoint-1\n" in shown
    assert "ended: COMPLETED" in shown
    assert "result    runs/chat: done" in shown
    assert (tmp_path / "runs" / "chat" / "checkpoint-1" / "weights").read_text() == "1\n"
    (spec,) = hub.specs
    assert spec["command"][:4] == ["uv", "run", "--with", "hfstrat==0.1.0"]
    assert (spec["flavor"], spec["timeoutSeconds"], spec["attempts"]) == ("cpu-basic", 3600, 11)
    assert spec["secrets"] == {"HF_TOKEN": TOKEN}
    assert hub.buckets == {"me/hfstrat-runs": True}
    text = spec["environment"]["HFSTRAT_JOB"].split("'HFSTRAT'\n")[1].split("\nHFSTRAT\n")[0]
    sent = yaml.safe_load(text)
    assert sent["training"]["learning_rate"] == 1e-3
    for path in (sent["model"], sent["data"]["train"]):  # what the job reads was uploaded
        assert (hub.bucket("me/hfstrat-runs") / default_name("runs/chat", shared=True) / path).exists()
    assert TOKEN not in shown
    assert not any(TOKEN in file.read_text() for file in (tmp_path / "runs" / "chat.launch").iterdir())


@pytest.mark.parametrize(
    ("plan", "sessions", "sentence"),
    [
        (("2", "done"), 1, "an earlier attempt ended with code 2; it is not repeated"),
        (("124", "done"), 1, "no checkpoint was saved in this session, so it is not repeated"),
        (("127", "done"), 1, "this machine has no command hfstrat; install it by --package"),
        (("130", "130", "130"), 3, "stopped by a signal, and no checkpoint was saved in this session"),
    ],
)
@pytest.mark.slow
def test_ends_that_would_repeat_cost_no_further_training(
    launch: Any,
    source: str,
    planned: Callable[..., Path],
    hub: LoopbackJobs,
    plan: tuple[str, ...],
    sessions: int,
    sentence: str,
) -> None:
    stub = planned(*plan)
    assert launch(source, *ON, "--upload", "--follow", "--max-restarts", "2") == 1
    assert (stub / "count").read_text().strip() == str(sessions)
    assert any(sentence in line for line in hub.logs["0"])
    with pytest.raises(UserError, match="no result yet"):
        launch(source, *ON, "--fetch")


def test_cancel_saves_first(launch: Any, source: str, planned: Callable[..., Path], hub: LoopbackJobs) -> None:
    """The container gets TERM: training saves, and the bucket has the checkpoint."""
    stub = planned("wait-save")
    assert launch(source, *ON, "--upload", "--max-restarts", "0") == 0
    engines.wait_for((stub / "ready-1").exists)
    with pytest.raises(UserError, match=r"job me/0 for runs/chat waits or runs already.*hf jobs cancel 0"):
        launch(source, *ON, "--upload")
    hub.running["0"].terminate()
    engines.wait_for(lambda: hub.stages["0"] == "ERROR")
    assert (
        hub.bucket("me/hfstrat-runs") / default_name("runs/chat", shared=True) / "run" / "checkpoint-1" / "weights"
    ).exists()


def test_a_container_needs_no_packages(launch: Any, source: str, planned: Callable[..., Path], hub: LoopbackJobs) -> None:
    planned("done")
    words = ("--on", "hf-jobs", "--flavor", "cpu-basic", "--time", "1h", "--container", "me/image:1", "--upload", "--follow")
    assert launch(source, *words) == 0
    assert hub.specs[0]["command"][:2] == ["bash", "-c"]
    assert hub.specs[0]["dockerImage"] == "me/image:1"


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (("POST /api/jobs/me", 402), (), r"the Hub refused \(402\): a fault to order"),
        (("GET /api/jobs/hardware", 500), (), r"the Hub refused \(500\)"),
        (None, ("--namespace", "theirs"), "you may not start jobs in theirs"),
        (None, ("--flavor", "l4x4"), "--flavor: l4x4: the Hub offers cpu-basic, t4-small, a100-large, h200x8"),
    ],
)
def test_refusals_of_the_hub(
    launch: Any, source: str, hub: LoopbackJobs, tmp_path: Path, change: Any, words: tuple[str, ...], sentence: str
) -> None:
    if change:
        hub.fail(*change)
    with pytest.raises(Exception, match=sentence):
        launch(source, *ON, "--upload", *words)
    assert not (tmp_path / "runs" / "chat.launch" / "launch.json").exists()
    assert not hub.stages


def test_a_public_bucket_is_refused(launch: Any, source: str, hub: LoopbackJobs) -> None:
    hub.buckets["me/hfstrat-runs"] = False
    with pytest.raises(UserError, match="me/hfstrat-runs is public"):
        launch(source, *ON, "--upload")


def test_a_dry_run_asks_nobody(
    launch: Any, source: str, hub: LoopbackJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(source, *ON, "--upload", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert hub.requests == []
    assert not (tmp_path / "runs").exists()
    assert "timeout --foreground --signal=TERM 3300 hfstrat train recipe.yaml" in shown
    assert "copy      " in shown
    assert "secrets=['HF_TOKEN'] (values are not shown)" in shown
    check_script(shown.split("-" * 80 + "\n")[1], tmp_path)


def test_gpus_of_flavors() -> None:
    expected = {"cpu-xl": 0, "t4-medium": 1, "l4x1": 1, "l40sx8": 8, "a10g-largex4": 4, "a100-large": 1, "h200": 1, "h200x8": 8}
    assert {flavor: hf_jobs.gpus_of(flavor) for flavor in expected} == expected
    assert all(hf_jobs.gpus_of(each.value) in (0, 1, 2, 4, 8) for each in JobHardware)
    assert all(hf_jobs.gpus_of(flavor) == count for flavor, count in HARDWARE.items())


@pytest.mark.slow
def test_a_real_job_equals_a_run_here(
    launch: Any, recipe: Any, hub: LoopbackJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is stopped in its first attempt and finishes in the second one: the weights are those of a run here."""
    words = ("training.max_steps=40", "training.eval_steps=5", "strategy.lora_dropout=0.1", "evaluation.samples=0")
    whole = recipe(*words, f"output_dir={tmp_path / 'whole'}")
    run(whole)
    monkeypatch.chdir(tmp_path)
    programs = engines.programs(tmp_path / "hfstrat-bin", ())
    (programs / "hfstrat").write_text(f'#!/bin/bash\nexec {sys.executable} -m hfstrat "$@"\n')
    (programs / "hfstrat").chmod(0o755)
    monkeypatch.setenv("PATH", engines.path_with(programs))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of the job
    assert launch(whole.source, *words, "output_dir=runs/chat", *ON, "--upload") == 0
    engines.wait_for(lambda: any(hub.folder.glob("work/0-0/runs/chat/checkpoint-*/hfstrat_complete.json")), 400)
    hub.running["0"].terminate()
    assert launch(whole.source, *words, "output_dir=runs/chat", *ON, "--upload", "--follow") == 0, hub.logs
    assert any("resum" in line for line in hub.logs["0"])
    folder = tmp_path / "runs" / "chat"
    assert json.loads((folder / "report.json").read_text())["result"]["status"] == "done"
    for name, tensor in weights(tmp_path / "whole").items():
        assert (weights(folder)[name] == tensor).all(), name
