"""Searches with simulated jobs: a clock that jobs advance, scores that are known, and kills between any two events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileBackend

from hfstrat.recipe.load import Loaded
from hfstrat.tuning import tune
from hfstrat.tuning.options import Advice, Options

FIXED, STEP, FINISH = 3.0, 0.05, 9.0  # seconds: of a job besides training, of a step, of the final run
BASES = {"lora": 0.80, "full": 0.84, "partial": 0.78, "head": 0.75}  # accuracies at the best rate, after long training


class Killed(BaseException):
    """A simulated kill -9."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Events:
    """Counts events and kills at the one that is due; `mode` is whether a write is lost, done, or torn in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self.mode = "before"
        self.count = 0
        original = JournalFileBackend.append_logs

        def append(backend: Any, logs: list[dict[str, Any]]) -> None:
            due = self.passes()
            if due and self.mode == "torn":
                with open(backend._file_path, "ab") as file:
                    file.write(json.dumps(logs[0])[:7].encode())
            if due and self.mode == "after":
                original(backend, logs)
            if due:
                raise Killed
            original(backend, logs)

        monkeypatch.setattr(JournalFileBackend, "append_logs", append)

    def passes(self) -> bool:
        """Count an event; whether it kills."""
        self.count += 1
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


class Played:
    """A runner whose jobs take the time that they say, and score by strategy, learning rate and steps."""

    def __init__(self, clock: Clock, events: Events | None = None, jitter: Callable[[int], float] = lambda number: 1.0) -> None:
        self.clock, self.events, self.jitter = clock, events, jitter
        self.ready = 4.0
        self.jobs: list[dict[str, Any]] = []
        self.broken: set[str] = set()  # strategies whose jobs fail
        self.unfinished: set[str] = set()  # strategies whose final run fails

    def start(self) -> None: ...
    def close(self) -> None: ...

    def run(self, file: Path, result: Path, look: Callable[[], None]) -> dict[str, Any]:
        if result.is_file():
            return dict(json.loads(result.read_text()))
        if self.events is not None and self.events.passes():
            raise Killed
        spec = json.loads(file.read_text())
        factor = self.jitter(len(self.jobs))
        if spec["kind"] == "direct":
            spec["seconds"] = spec["until"] - self.clock.now - FIXED
        answer = self.finish(spec) if spec["kind"] == "final" else self.rung(spec)
        if answer["status"] == "done":
            answer["seconds"] = factor * answer["seconds"]
        self.jobs.append(spec | {"answer": answer, "at": self.clock.now})
        looks = max(20, round(answer["seconds"] / 2))
        for _ in range(looks):
            self.clock.now += answer["seconds"] / looks
            look()
        result.write_text(json.dumps(answer))
        if self.events is not None and self.events.passes():
            raise Killed
        return dict(answer)

    def finish(self, spec: dict[str, Any]) -> dict[str, Any]:
        if Path(spec["source"]).stem in self.unfinished:
            return {"status": "failed", "code": 5, "sentence": "the artifact differs", "seconds": FINISH}
        jobs = [json.loads(file.read_text()) for file in Path(spec["result"]).parent.glob("*/*.job.json")]
        seconds = 0.5 if any(job["kind"] == "direct" for job in jobs) else FINISH  # a direct job has done everything
        return {"status": "done", "seconds": seconds, "run_seconds": seconds}

    def rung(self, spec: dict[str, Any]) -> dict[str, Any]:
        label, settings = Path(spec["source"]).stem, dict(each.split("=", 1) for each in spec["overrides"])
        if label in self.broken:
            return {"status": "failed", "code": 3, "sentence": "the loss is not finite", "seconds": FIXED}
        start = re.search(r"checkpoint-(\d+)", settings["training.resume_from_checkpoint"])
        before, solved = int(start[1]) if start else 0, label == "head"
        new = max(1, int(spec["seconds"] / STEP / (1.2 if not before else 1.4)))
        trunk = 1 if solved else before + new
        cooldown = 0 if solved else max(1, round(0.2 * trunk))
        trained = 0.5 if solved else (new + cooldown) * STEP
        quality = accuracy(label, float(settings.get("training.learning_rate", 1e-3)), trunk)
        facts = {"quality": quality, "low": quality - 0.02, "high": quality + 0.02, "rows": 100, "held_out": 200, "setup": 1.5}
        sizes = {"memory": 10**9, "bytes": 10**8, "trainable": 10**6, "train_rows": 800, "setup": 1.5}
        return {
            "status": "done",
            "score": quality,
            "loss": 1 - quality,
            "trunk": trunk,
            "cooldown": cooldown,
            "is_complete": solved,
            "trained": trained,
            "seconds": (FINISH if spec["kind"] == "direct" else FIXED) + trained,
            **facts,
            **sizes,
        }


def accuracy(label: str, rate: float, steps: int) -> float:
    """Rises with the steps to a height that depends on strategy and learning rate."""
    import math

    if label == "head":
        return BASES[label]
    off = math.log10(rate / {"lora": 3e-3, "full": 1e-4, "partial": 2e-3}.get(label, 1e-3))
    return BASES.get(label, 0.7) - 0.05 * min(2.0, abs(off)) - 0.3 / (1 + steps / 40)


def in_order(loaded: Mapping[str, Loaded], seconds: float) -> Advice:
    """Advice: another order than that in which strategies are proposed."""
    order = sorted(loaded, key=lambda label: (label != "head", label != "partial"))
    return Advice(order, dict.fromkeys(loaded, 20.0))


def options(model: Path, data: Path, output: Path, /, **given: Any) -> Options:
    """Options of `hfstrat tune`, by default five minutes for all strategies of a classifier but `scratch`."""
    named = {"recipes": [], "overrides": [], "model": str(model), "data": str(data), "task": None, "eval_data": None}
    usual = {"strategies": "head,lora,full,partial", "time": 300.0, "search": ("learning_rate",), "output": str(output)}
    return Options(**{**named, **usual, **given})


def play(asked: Options, runner: Played) -> dict[str, Any]:
    """Run a search to its end; returns tune.json."""
    tune.tune(asked, in_order, lambda folder: runner, runner.clock)
    return dict(json.loads((asked.folder / "tune.json").read_text()))
