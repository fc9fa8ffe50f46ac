"""Runs that can be killed at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import forked

UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}
LIMIT = 400.0  # seconds; a run takes a few


def _train(source: str, settings: list[str]) -> None:
    from hfstrat.run import train
    from hfstrat.tasks import verify

    verify.verify = lambda *args: UNVERIFIED  # type: ignore[assignment]
    train.main([source, *settings])


class Run:
    """A running run of one or several processes."""

    def __init__(self, source: str, settings: list[str], folder: Path, cache: Path, processes: int) -> None:
        environment = {**os.environ, "HFSTRAT_CACHE": str(cache), "HFSTRAT_PROCESSES": str(processes)}
        self.log = folder.with_name(f"{folder.name}.log")
        words = [*settings, f"output_dir={folder}"]
        self.members = forked.start(_train, (source, words), processes, environment, self.log)
        self.started = time.monotonic()

    @property
    def is_going_on(self) -> bool:
        return all(member.is_alive() for member in self.members)

    def kill(self) -> None:
        for member in self.members:
            if member.pid and member.is_alive():
                os.kill(member.pid, signal.SIGKILL)
        for member in self.members:
            member.join()

    def finish(self) -> float:
        """Wait for the end; return the seconds it took."""
        for member in self.members:
            member.join(LIMIT)
        said = self.log.read_text() if self.log.exists() else ""
        assert all(member.exitcode == 0 for member in self.members), said[-5000:]
        return time.monotonic() - self.started

    def kill_when(self, condition: Callable[[], bool], patience: float) -> bool:
        """Kill it once the condition holds or the seconds have passed; False if it had ended before."""
        end = time.monotonic() + patience
        while self.is_going_on and not condition() and time.monotonic() < end:
            time.sleep(0.001)
        alive = self.is_going_on
        self.kill()
        return alive


def saves(folder: Path) -> bool:
    """Whether a checkpoint is being written (or was left half written)."""
    return any(not (p / "hfstrat_complete.json").exists() for p in folder.glob("checkpoint-*"))


def builds(cache: Path) -> bool:
    """Whether a cached result is being written."""
    return any(cache.glob(".*-building-*/payload"))


class Soak:
    """Kill runs of one recipe repeatedly, at all kinds of moments, and compare the final result.

    Args:
        weights: what has to come out, by the folder of a finished run.
    """

    def __init__(self, source: str, settings: list[str], place: Path, processes: int, weights: Callable[[Path], Any]) -> None:
        self.source, self.settings, self.place, self.processes, self.weights = source, settings, place, processes, weights
        place.mkdir(parents=True)
        self.seconds = self.start("whole").finish()
        self.expected, self.turn = self.result("whole"), 0

    def start(self, name: str) -> Run:
        return Run(self.source, self.settings, self.place / name, self.place / f"{name}-cache", self.processes)

    def result(self, name: str) -> tuple[Any, dict[str, Any]]:
        result = json.loads((self.place / name / "report.json").read_text())["result"]
        return self.weights(self.place / name), {
            key: result[key] for key in ("metrics_before", "metrics_after", "best_step", "steps")
        }

    def kills(self, count: int, chance: random.Random) -> None:
        """Kill `count` times, a few times per run."""
        done = 0
        while done < count:
            name = f"killed-{self.turn}"
            self.turn += 1
            for kind in chance.sample(["build", "save", "save", "any", "any", "any"], min(4, count - done)):
                killed = self.kill(name, kind, chance)
                done += killed
                if not killed:
                    break
            if not (self.place / name / "report.json").exists() or not self.is_done(name):
                self.start(name).finish()
            self.compare(name)

    def kill(self, name: str, kind: str, chance: random.Random) -> bool:
        folder, cache = self.place / name, self.place / f"{name}-cache"
        left = {p.name for p in folder.glob("checkpoint-*")}
        moment = time.monotonic() + chance.uniform(0.1, self.seconds)
        run = self.start(name)
        if kind == "build":
            return run.kill_when(lambda: builds(cache), self.seconds)
        if kind == "save":
            return run.kill_when(
                lambda: saves(folder) and bool({p.name for p in folder.glob("checkpoint-*")} - left), self.seconds
            )
        return run.kill_when(lambda: time.monotonic() > moment, self.seconds)

    def is_done(self, name: str) -> bool:
        return json.loads((self.place / name / "report.json").read_text())["result"]["status"] == "done"

    def compare(self, name: str) -> None:
        import torch

        (ours, facts), (theirs, expected) = self.result(name), self.expected
        said = (self.place / f"{name}.log").read_text()[-5000:]
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), f"{key}\n{said}"
        assert facts == expected, said
