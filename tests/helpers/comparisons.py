"""Comparisons whose runs are made up: what a run leaves in its folder, without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfstrat.advisor import recipes as advisor_recipes
from hfstrat.comparison import compare as comparison_compare
from hfstrat.comparison import runs, survey
from hfstrat.comparison.entries import Asked, parse
from hfstrat.comparison.results import Predict
from hfstrat.comparison.runs import Ending, Run
from hfstrat.comparison.survey import Rows
from hfstrat.evaluation import row_scores

ROWS = 40
LABELS = ("cat", "dog", "fish")
DONE = ("done", "")


def rows_of(tokenizer: str = "one", has_bytes: bool = True, steps: list[int] | None = None) -> Rows:
    return Rows(160, 4000, ROWS, "the same", tokenizer, has_bytes, steps or [])


def asked(output: Path, **given: Any) -> Asked:
    """What `hfstrat compare` is asked for, with 20 steps and two seeds unless something else is said."""
    nothing: dict[str, Any] = dict.fromkeys(("model", "data", "strategies", "task"))
    settled = {"recipes": [], "words": [], **nothing, "budget": "20-steps", "seeds": 2, "output": output, **given}
    return Asked(**{**settled, "budget": parse(settled["budget"])})


def leave_result(run: Run, skill: float, seconds: float, classes: bool = False) -> None:
    """Report and rows of a finished run of a model of this skill (0 to 1)."""
    random = np.random.default_rng(run.seed)
    items = np.ones(ROWS) if classes else np.full(ROWS, 10.0)
    nll = items * (3 - 2 * skill + 0.1 * random.standard_normal(ROWS))
    right = (random.random(ROWS) < 0.4 + 0.5 * skill).astype(float) if classes else np.floor(items * skill)
    columns = {"row": np.arange(ROWS), "nll": nll, "items": items, "right": right}
    run.result.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(run.result / row_scores.FILE, **({} if classes else {"bytes": 4 * items}), **columns)
    loss = float(nll.sum() / items.sum())
    metrics = {"loss": loss, "bits_per_byte": loss / math.log(2) / 4}
    metrics |= {"accuracy": float(right.mean()), "macro_f1": float(right.mean())} if classes else {"token_accuracy": skill}
    names = [{"label": name, "f1": 0.5, "support": 10} for name in LABELS]
    matrix = {"confusion": {"counts": [[9, 1, 0], [2, 7, 1], [0, 3, 17]]}, "labels": names}
    result = {
        "status": "done",
        "metrics_before": {"loss": 4.0, "accuracy": 0.33, "bits_per_byte": 1.5},
        "metrics_after": metrics,
        "evaluation": matrix if classes else {},
        "steps": 20,
        "setup_seconds": 4.0,
        "train_seconds": seconds,
        "total_seconds": seconds + 9,
        "tokens": 8000,
        "tokens_per_second": 8000 / seconds,
        "peak_memory_bytes": int(3e8 + 1e9 * skill),
        "trainable_parameters": int(1e5 + 1e8 * skill),
        "total_parameters": 135_000_000,
        "artefact_bytes": 12_345_678,
        "curve": [
            {"step": 10 * n, "seconds": n * seconds / 2, "tokens": 4000 * n, "eval_loss": 4 - n * (4 - loss) / 2}
            for n in range(3)
        ],
        "answers": [
            {"prompt": "Once <b>upon</b> a time", "before": "a a a", "after": f"{run.label} says & more", "reference": "there"}
        ],
    }
    environment = {"python": "3.11", "libraries": {"torch": "2"}, "processor": "a processor", "threads": 2, "gpus": []}
    (run.result / "report.json").write_text(json.dumps({"run": {}, "result": result, "environment": environment}))


class Played:
    """Stands for the processes: how each run ends is said by label (or label and seed), and which ones ran is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, classes: bool = False) -> None:
        self.ran: list[tuple[str, int]] = []
        self.endings: dict[Any, tuple[str, str] | Callable[[], None]] = {}
        self.classes, self.looked = classes, 0
        self.skills = {"head": 0.3, "partial": 0.6, "lora": 0.8, "full": 0.9, "distill": 0.5, "scratch": 0.05}
        self.rows = rows_of()
        self.predict: Predict = advisor_recipes.predict
        monkeypatch.setattr(runs, "carry_out", self.carry_out)
        monkeypatch.setattr(survey, "take", self.take)

    def take(self, line: Any, budget: Any, seeds: int) -> dict[str, Rows]:
        self.looked += 1
        return {entry.label: self.rows for entry in line.entries}

    def carry_out(self, run: Run, limit: float | None, look: Callable[[], None]) -> Ending:
        self.ran.append((run.label, run.seed))
        run.folder.mkdir(parents=True, exist_ok=True)
        run.log.write_text("step 1\n")
        look()
        how = self.endings.get((run.label, run.seed), self.endings.get(run.label, DONE))
        if callable(how):
            how()
            raise AssertionError("it goes on")
        if how == DONE:
            skill = self.skills.get(run.label, 0.5)
            leave_result(run, skill, 10 + 90 * skill, self.classes)
        ending = Ending(run.identity, *how, 25.0)
        (run.folder / runs.STATE).write_text(json.dumps(vars(ending)))
        return ending

    def compare(self, given: Asked) -> dict[str, Any]:
        """Run the comparison; returns comparison.json."""
        comparison_compare.compare(given, self.predict)
        return self.read(given.output)

    @staticmethod
    def read(output: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((output / comparison_compare.DATA).read_text())
        return found
