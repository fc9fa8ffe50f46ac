"""Comparisons with simulated runs: the files of a run without any training."""

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
from hfstrat.comparison import processes
from hfstrat.comparison.processes import DataFacts, Ending, Run
from hfstrat.comparison.results import Predict
from hfstrat.engine.entries import Request, parse_budget
from hfstrat.evaluation import intervals
from hfstrat.recipe.load import load_recipe

ROWS = 40
LABELS = ("cat", "dog", "fish")
DONE = ("done", "")


def facts(tokenizer: str = "one", has_bytes: bool = True, steps: list[int] | None = None) -> DataFacts:
    return DataFacts(160, 4000, ROWS, "the same", tokenizer, has_bytes, steps or [])


def request(output: Path, **given: Any) -> Request:
    """Options of `hfstrat compare`, by default 20 steps and two seeds."""
    nothing: dict[str, Any] = dict.fromkeys(("model", "data", "strategies", "task"))
    options = {"recipes": [], "overrides": [], **nothing, "budget": "20-steps", "seeds": 2, "output": output, **given}
    return Request(**{**options, "budget": parse_budget(options["budget"])})


def leave_result(run: Run, skill: float, seconds: float, classes: bool = False) -> None:
    """Write the report and the scores of a finished run; the model has this skill (0 to 1)."""
    random = np.random.default_rng(run.seed)
    items = np.ones(ROWS) if classes else np.full(ROWS, 10.0)
    nll = items * (3 - 2 * skill + 0.1 * random.standard_normal(ROWS))
    right = (random.random(ROWS) < 0.4 + 0.5 * skill).astype(float) if classes else np.floor(items * skill)
    columns = {"row": np.arange(ROWS), "nll": nll, "items": items, "right": right}
    run.result.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(run.result / intervals.ROWS_FILE, **({} if classes else {"bytes": 4 * items}), **columns)
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
        "artifact_bytes": 12_345_678,
        "curve": [
            {"step": 10 * n, "seconds": n * seconds / 2, "tokens": 4000 * n, "eval_loss": 4 - n * (4 - loss) / 2}
            for n in range(3)
        ],
        "answers": [
            {
                "prompt": "Once <b>upon</b> a time",
                "before": "a a a",
                "after": f"{run.label} answers & more",
                "reference": "there",
            }
        ],
    }
    recipe = load_recipe(run.source, [*run.overrides]).recipe
    environment = {"python": "3.11", "libraries": {"torch": "2"}, "processor": "a processor", "threads": 2, "gpus": []}
    (run.result / "report.json").write_text(
        json.dumps({"run": {"recipe": recipe.model_dump()}, "result": result, "environment": environment})
    )


class Played:
    """Simulates the processes: `endings` by label (or label and seed); `ran` records which runs were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, classes: bool = False) -> None:
        self.ran: list[tuple[str, int]] = []
        self.endings: dict[Any, tuple[str, str] | Callable[[], None]] = {}
        self.classes, self.surveys = classes, 0
        self.skills = {"head": 0.3, "partial": 0.6, "lora": 0.8, "full": 0.9, "distill": 0.5, "scratch": 0.05}
        self.facts = facts()
        self.predict: Predict = advisor_recipes.predict
        monkeypatch.setattr(processes, "execute", self.execute)
        monkeypatch.setattr(processes, "read_data", self.read_data)

    def read_data(self, lineup: Any, budget: Any, seeds: int) -> dict[str, DataFacts]:
        self.surveys += 1
        return {entry.label: self.facts for entry in lineup.entries}

    def execute(self, run: Run, limit: float | None, look: Callable[[], None]) -> Ending:
        self.ran.append((run.label, run.seed))
        run.folder.mkdir(parents=True, exist_ok=True)
        run.log.write_text("step 1\n")
        look()
        how = self.endings.get((run.label, run.seed), self.endings.get(run.label, DONE))
        if callable(how):
            how()
            raise AssertionError("should have raised")
        if how == DONE:
            skill = self.skills.get(run.label, 0.5)
            leave_result(run, skill, 10 + 90 * skill, self.classes)
        ending = Ending(run.identity, *how, 25.0)
        (run.folder / processes.STATE).write_text(json.dumps(vars(ending)))
        return ending

    def compare(self, given: Request) -> dict[str, Any]:
        """Run the comparison; returns comparison.json."""
        comparison_compare.compare(given, self.predict)
        return self.read(given.output)

    @staticmethod
    def read(output: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((output / comparison_compare.DATA).read_text())
        return found
