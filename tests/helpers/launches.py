"""The command in this process, and engines on PATH."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import engines
from hfstrat.cli import main
from hfstrat.clusters import hf_jobs, slurm


@pytest.fixture
def launch() -> Callable[..., int]:
    """`launch(*words)` runs `hfstrat launch` and returns its exit code; mistakes are raised."""

    def run(*words: str) -> int:
        return int(main.command()(["launch", *words], standalone_mode=False) or 0)

    return run


@pytest.fixture
def source(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small recipe with output_dir = runs/chat, in the working folder."""
    monkeypatch.chdir(tmp_path)
    file = Path(recipe().source)
    text = file.read_text().replace(f"output_dir: {tmp_path / 'run'}", "output_dir: runs/chat")
    file.write_text(text)
    return file.name


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs of Slurm and of SkyPilot that run jobs here; the folder of their state. Jobs end with the test."""
    state = tmp_path / "engine"
    state.mkdir()
    programs = engines.programs(tmp_path / "bin", engines.SLURM + engines.CLOUD)
    monkeypatch.setenv("PATH", engines.path_with(programs))
    monkeypatch.setenv("ENGINE", str(state))
    monkeypatch.setenv("ENGINE_PATHS", json.dumps([path for path in sys.path if "site-packages" in path]))
    monkeypatch.setattr(slurm, "POLL", 0.05)
    monkeypatch.setattr(hf_jobs, "POLL", 0.05)
    yield state
    for job in state.glob("*.json"):
        if engines.state(state, job.stem)["state"] in ("PENDING", "RUNNING"):
            (state / f"{job.stem}.CANCEL").touch()
            engines.wait_for(lambda job=job: engines.state(state, job.stem)["state"] == "CANCELLED")


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Path) -> Callable[..., Path]:
    """`planned("wait-save", "done")` replaces training by sessions that end as planned; returns the folder of the stand-in."""

    def plan(*words: str, run: str = "runs/chat") -> Path:
        folder = tmp_path / "stub"
        for name, value in engines.stub(folder, list(words), run).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", engines.path_with(folder))
        return folder

    return plan
