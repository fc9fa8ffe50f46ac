"""`hfstrat evaluate` of a run, in a fresh process, repeats the numbers and the answers that `train` reported, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.classifiers import labeled, make_any, measured
from helpers.runs import UNVERIFIED, run

from hfstrat.evaluation.intervals import ROWS
from hfstrat.recipe.load import load_recipe

EVALUATE = """
import json, sys
from hfstrat.evaluation.evaluate import Request, evaluate
print("FOUND " + json.dumps([evaluate(Request(target, data=data)) for target, data in json.loads(sys.argv[1])]))
"""
STILL = "{name: partial, last_n_layers: 1, frozen_dropout: false, precompute: true}"
LORA, PARTIAL = "{name: lora, r: 4}", "{name: partial, last_n_layers: 1, precompute: true}"
CAUSAL, CLASSES, NUMBERS = "causal-lm", "text-classification", "regression"
FEW = [
    (CAUSAL, "llama", LORA, "float32"),
    (CAUSAL, "llama", PARTIAL, "bfloat16"),
    (CLASSES, "bert", "head", "float32"),
    (CLASSES, "llama", "{name: head, pooling: last}", "bfloat16"),
    (NUMBERS, "llama", LORA, "float32"),
]
DISTILL = "{name: distill, student: {name: full}, shrink: {layers: 2}}"
MANY = [
    *[(CAUSAL, "llama", strategy, dtype) for strategy in ("full", DISTILL) for dtype in ("float32", "bfloat16")],
    (CAUSAL, "gpt2", "{name: head, untie: true}", "bfloat16"),
    (CAUSAL, "llama", LORA, "bfloat16"),
    (CAUSAL, "llama", PARTIAL, "float32"),
    (CAUSAL, "", "{name: scratch, model_type: llama, parameters: 100k, tokenizer: {vocab_size: 300}}", "bfloat16"),
    *[(CLASSES, "bert", strategy, "bfloat16") for strategy in ("full", LORA, STILL, "head", "{name: head, head: mlp}")],
    (CLASSES, "roberta", "{name: head, then: {name: lora, r: 4}}", "float32"),
    *[(NUMBERS, "bert", strategy, "float32") for strategy in ("full", STILL, "head", "{name: head, head: mlp}")],
]


def trained(folder: Path, task: str, family: str, strategy: str, dtype: str, rows: Path) -> dict[str, Any]:
    """The report of a small run in its own folder."""
    model: Any = ""
    if family:
        from conftest import make_model

        model = make_model(folder / "model", family) if task == CAUSAL else make_any(folder / "model", family)
    data = {CAUSAL: lambda: rows, CLASSES: lambda: labeled(folder), NUMBERS: lambda: measured(folder, offset=3.0)}[task]()
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"task: {task}\nmodel: {{{f'name_or_path: {model}, ' if model else ''}dtype: {dtype}}}\nstrategy: {strategy}\n"
        f"data: {{train: {data}, max_length: 96, eval_size: 21}}\n"
        "training: {max_steps: 4, global_batch_size: 8, learning_rate: 1e-2, eval_steps: 2, logging_steps: 1}\n"
        f"evaluation: {{samples: 2, max_new_tokens: 6}}\noutput_dir: {folder / 'run'}\n"
    )
    return run(load_recipe(str(recipe)))  # type: ignore[no-any-return]


def compare(cases: list[tuple[str, str, str, str]], tmp_path: Path, rows: Path) -> None:
    reports, targets = [], []
    for number, case in enumerate(cases):
        (folder := tmp_path / str(number)).mkdir()
        reports.append(trained(folder, *case, rows)["result"])
        targets.append((str(folder / "run"), None))
    child = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps(targets)], capture_output=True, text=True, check=False, timeout=500
    )
    assert child.returncode == 0, child.stderr[-2000:]
    evaluated = json.loads(child.stdout.partition("FOUND ")[2])
    differ = {}
    for case, result, found in zip(cases, reports, evaluated, strict=True):
        ours, theirs = (each["measured"][ROWS]["after"] for each in (result, found))
        metrics = {name: result["metrics_after"][name] for name in ours if name in result["metrics_after"]}
        answers = [[row["after"] for row in each["answers"]] for each in (result, found)]
        if ours != theirs or answers[0] != answers[1] or metrics != {name: theirs[name]["value"] for name in metrics}:
            differ[case] = (ours, theirs, answers)
    assert not differ


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)


@pytest.mark.slow
def test_evaluate_repeats_the_numbers_of_training(tmp_path: Path, rows: Path) -> None:
    compare(FEW, tmp_path, rows)


@pytest.mark.slow
def test_evaluate_repeats_the_numbers_of_training_for_every_strategy(tmp_path: Path, rows: Path) -> None:
    compare(MANY, tmp_path, rows)
