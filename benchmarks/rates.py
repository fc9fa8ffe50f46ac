"""The best peak learning rate of each strategy, to check the proposals of `hfstrat advise` and `hfstrat compare`.

    python -m benchmarks.rates [--only smollm2-classes,minilm-classes,stories-lm,smollm2-lm] [--ways partial,full,lora]

Writes benchmarks/results/rates.json and .md. Each run is `python -m hfstrat train` in a process of its own, on examples of
training sets alone, with held-out ones of them for the measurement: trec6 (1,000 examples, 3 epochs in batches of 32; accuracy
on 300 others) and docstrings of the standard library (30 steps of 16, 100 for stories260K; nats per token on 60 others). One
seed. The last weights are evaluated. Each result is written at once: an interrupted benchmark resumes.

Predicted before the first run, from one pair of runs on banking77 (`partial`: 5.5 % at 1e-4, 66.7 % at 1e-3): the best rates of
partial are ten times those proposed so far, because few weights are trained for few steps; those of lora and full are within a
factor of three.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.classification import DATA, command
from benchmarks.measure import RESULTS, ROOT, machine, write
from benchmarks.memory_prediction import model_folder

RESULT, WORK, SEED = RESULTS / "rates.json", ROOT / "runs" / "benchmarks" / "rates", 41
MODELS = {"smollm2": ("SmolLM2-135M", 30, 576), "minilm": ("MiniLM", 6, 384), "stories": ("stories260K", 5, 64)}
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "smollm2-classes": {"partial": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3)},
    "minilm-classes": {"partial": (1e-4, 3e-4, 1e-3, 3e-3), "full": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2)},
    "stories-lm": {"partial": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2)},
    "smollm2-lm": {"partial": (1e-4, 3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3)},
}


def rows_of(case: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training examples, and held-out examples of the same training set."""
    if case.endswith("classes"):
        with (DATA / "trec6" / "train.csv").open(encoding="utf-8", newline="") as source:
            rows, train, held = [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(source)], 1000, 300
    else:
        lines = (ROOT / "data" / "docstrings" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows, train, held = [json.loads(line) for line in lines], 1600 if case.startswith("stories") else 480, 60
    drawn = random.Random(SEED).sample(rows, train + held)
    return drawn[:train], drawn[train:]


def recipe(case: str, way: str, rate: float, folder: Path) -> dict[str, Any]:
    from hfstrat.strategies import defaults

    name, layers, width = MODELS[case.partition("-")[0]]
    task = "text-classification" if case.endswith("classes") else "causal-lm"
    for part, rows in zip(("train", "eval"), rows_of(case), strict=True):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = {"stories-lm": 100, "smollm2-lm": 30}.get(case)
    length = {"max_steps": steps, "global_batch_size": 16} if steps else {"num_train_epochs": 3, "global_batch_size": 32}
    section = {"name": way, **defaults.section(way, defaults.ModelFacts(task, name, layers, width))}
    return {
        "task": task,
        "model": model_folder(name),
        "strategy": section,
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
        | ({"max_length": 128} if task == "text-classification" else {"max_length": 256, "overflow": "drop"}),
        "training": {
            "learning_rate": rate,
            "eval_steps": 1.0,
            "logging_steps": 1000,
            "load_best_model_at_end": False,
            **length,
        },
        "evaluation": {"eval_on_start": False, "samples": 0},
        "seed": SEED,
        "output_dir": str(folder / "run"),
    }


def one(case: str, way: str, rate: float) -> dict[str, Any]:
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{case}-{way}-", dir=WORK) as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(case, way, rate, folder)))
        command("train", str(folder / "recipe.yaml"), folder=folder)
        result = json.loads((folder / "run" / "report.json").read_text())["result"]
        return {key: result[key] for key in ("metrics_after", "steps", "trainable_parameters")}


def table_of(case: str, runs: dict[str, Any]) -> list[str]:
    measure = "accuracy" if case.endswith("classes") else "loss"
    rates = sorted({rate for found in RATES[case].values() for rate in found})
    lines = ["", f"**{case}**, {measure}:", "", "| strategy | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (1 + len(rates)) + "|")
    best = max if measure == "accuracy" else min
    for way in RATES[case]:
        found = {
            rate: runs[f"{case}/{way}/{rate:g}"]["metrics_after"][measure] for rate in rates if f"{case}/{way}/{rate:g}" in runs
        }
        top = best(found.values(), default=None)
        cells = [
            ("**{:.3f}**" if found[rate] == top else "{:.3f}").format(found[rate]) if rate in found else "-" for rate in rates
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(RATES), help="cases")
    parser.add_argument("--ways", default="partial,full,lora", help="strategies")
    given = parser.parse_args()
    runs: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    for way in given.ways.split(","):
        for case in given.only.split(","):
            for rate in RATES[case][way]:
                name = f"{case}/{way}/{rate:g}"
                if name not in runs:
                    runs[name] = one(case, way, rate)
                    print(name, runs[name]["metrics_after"], flush=True)
                    RESULT.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    result = {"machine": machine(), "runs": runs}
    write("rates", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    return [line for case in RATES for line in table_of(case, result["runs"])][1:]


if __name__ == "__main__":
    main()
