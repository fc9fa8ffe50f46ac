"""Whether the default recipe of each strategy is near the best that a search finds: classification with few rows.

    python -m benchmarks.defaults [--only trec6-100,..] [--strategies full,lora] [--seeds 3] [--trials 0]

Writes benchmarks/results/defaults.json and .md. Each case is a training set of which some examples are used for training and
500 others (250 for SmolLM2) are evaluated (no test set is touched). Fixed ways: `class` is the head and pooling of the model's
class in transformers, `own` the pooling that the encoder's own files name; the number behind it is the learning rate
of the new head as a multiple of the other weights'; `solved` starts from the solved head (`head`, `then`). The learning rate is
the one that `hfstrat advise` proposes for the model's width, the number of steps is the same for all ways of a case. With
`--trials N` a random search over learning rate, steps, batch and the rate of the head adds N runs of one seed per strategy: is
the default within 1 point of the best of them? TF-IDF is logistic regression on the same examples.

All runs are in one process and nothing is saved or verified. Results are written at once: an interrupted benchmark resumes.

Predicted before the first run: `own` beats `class` by 5 points or more with 100 rows and by at most one with 1,000; ten times
the learning rate for the head helps most where there are few steps and many classes; a solved start helps with 1,000 rows and
not with 100.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from benchmarks.classification import DATA
from benchmarks.measure import RESULTS, ROOT, machine, write
from benchmarks.memory_prediction import model_folder

RESULT, WORK = RESULTS / "defaults.json", ROOT / "runs" / "benchmarks" / "defaults"
EVALUATED, SEEDS, DRAWN = 500, (42, 43, 44), 41
MODELS = {"MiniLM": (6, 384), "SmolLM2-135M": (30, 576)}
CASES: dict[str, dict[str, Any]] = {
    "trec6-100": {"set": "trec6", "rows": 100, "steps": 50},
    "sst2-100": {"set": "sst2", "rows": 100, "steps": 50},
    "trec6-1000": {"set": "trec6", "rows": 1000, "steps": 120},
    "sst2-1000": {"set": "sst2", "rows": 1000, "steps": 120},
    "banking77-1000": {"set": "banking77", "rows": 1000, "steps": 180},
    "smollm2-banking77-1000": {
        "set": "banking77",
        "rows": 1000,
        "steps": 94,
        "batch": 32,
        "model": "SmolLM2-135M",
        "evaluated": 250,
        "partial": {"last_n_layers": 4},
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "class-1": {"pooling": "class", "share": 1},
    "class-10": {"pooling": "class", "share": 10},
    "own-1": {"share": 1},
    "own-10": {"share": 10},
    "own-30": {"share": 30},
    "solved": {"solved": True},
    "mean-10": {"pooling": "mean", "share": 10},
}


def rows_of(case: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training examples, and others of the same training set for the evaluation."""
    about = CASES[case]
    with (DATA / about["set"] / "train.csv").open(encoding="utf-8", newline="") as source:
        rows = [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(source)]
    drawn = random.Random(DRAWN).sample(rows, about["rows"] + 2 * EVALUATED)
    train = drawn[: about["rows"]]
    known = {row["label"] for row in train}
    return train, [row for row in drawn[about["rows"] :] if row["label"] in known][: about.get("evaluated", EVALUATED)]


def recipe(case: str, strategy: str, way: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    from hfstrat.strategies import defaults

    about = CASES[case]
    name = about.get("model", "MiniLM")
    layers, width = MODELS[name]
    for part, rows in zip(("train", "eval"), rows_of(case), strict=True):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    facts = defaults.ModelFacts("text-classification", name, layers, width)
    section = {"name": strategy, **defaults.section(strategy, facts), **about.get(strategy, {})}
    rate = way.get("rate") or defaults.learning_rate(strategy, width)
    head = {"head_learning_rate": rate * way["share"]} if "share" in way else {}
    return {
        "task": "text-classification",
        "model": {"name_or_path": model_folder(name)} | ({"pooling": way["pooling"]} if "pooling" in way else {}),
        "strategy": {"name": "head", "then": section} if way.get("solved") else section,
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 128},
        "training": {
            "learning_rate": rate,
            **head,
            "max_steps": way.get("steps", about["steps"]),
            "global_batch_size": way.get("batch", about.get("batch", 16)),
            "eval_steps": 1.0,
            "logging_steps": 1000,
            "load_best_model_at_end": False,
        },
        "evaluation": {"eval_on_start": False, "samples": 0, "baselines": False},
        "seed": seed,
        "output_dir": str(folder / "run"),
    }


def one(case: str, strategy: str, way: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train and evaluate in this process, without saving a result."""
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run import measure, setup, train

    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{case}-", dir=WORK) as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(case, strategy, way, seed, folder)))
        started = time.process_time()
        world: Any = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
        job = setup.set_up(load_recipe(str(folder / "recipe.yaml"), []), world, overwrite=True)
        seconds = train.fit(job, [])
        metrics = measure.conclude(job, seconds)[0].metrics_after
        if job.lock is not None:
            job.lock.close()
        job.release()
        return {**metrics, "cpu_seconds": round(time.process_time() - started, 1)}


def floor(case: str) -> dict[str, Any]:
    """Return the accuracy of logistic regression on TF-IDF of the same examples."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from hfstrat.evaluation import simple_models

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder(CASES[case].get("model", "MiniLM")))
    train, held = rows_of(case)
    names = sorted({row["label"] for row in train})
    ids = [[tokenizer(row["text"])["input_ids"] for row in rows] for rows in (train, held)]
    labels = [torch.tensor([names.index(row["label"]) for row in rows]) for rows in (train, held)]
    outputs = np.asarray(simple_models.tf_idf(ids[0], labels[0], ids[1], len(names)))
    return {"accuracy": float((outputs.argmax(1) == labels[1].numpy()).mean())}


def searched(case: str, strategy: str, number: int) -> dict[str, Any]:
    """Return the settings of a trial of the random search; the first one is the default."""
    from hfstrat.strategies import defaults

    if number == 0:
        return {}
    source, about = random.Random(f"{case} {strategy} {number}"), CASES[case]
    rate = defaults.learning_rate(strategy, MODELS[about.get("model", "MiniLM")][1]) or 1e-4
    return {
        "rate": float(f"{rate * 10 ** source.uniform(-0.75, 0.75):.2g}"),
        "share": source.choice((1, 3, 10, 30)),
        "steps": round(about["steps"] * source.choice((0.5, 1, 2))),
        "batch": source.choice((8, 16, 32)),
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    return [*_ways(result["runs"]), *_trials(result["runs"])]


def _ways(runs: dict[str, Any]) -> list[str]:
    lines = ["Accuracy, mean over seeds (lowest to highest):", ""]
    lines += ["| case | TF-IDF | strategy | " + " | ".join(WAYS) + " |", "|---" * (3 + len(WAYS)) + "|"]
    for case in CASES:
        for strategy in ("full", "partial", "lora"):
            cells = []
            for way in WAYS:
                found = [runs[key]["accuracy"] for seed in SEEDS if (key := f"{case}/{strategy}/{way}/{seed}") in runs]
                spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else " (one seed)"
                cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "-")
            if set(cells) != {"-"}:
                least = f"{runs[f'{case}/tf-idf']['accuracy']:.3f}" if f"{case}/tf-idf" in runs else "-"
                lines.append(f"| {case} | {least} | {strategy} | {' | '.join(cells)} |")
    return lines


def _trials(runs: dict[str, Any]) -> list[str]:
    lines = []
    for case in CASES:
        for strategy in ("full", "partial", "lora"):
            found = {key: runs[key] for key in runs if key.startswith(f"{case}/{strategy}/trial-")}
            first = runs.get(f"{case}/{strategy}/trial-0/{SEEDS[0]}")
            if len(found) < 2 or first is None:
                continue
            best = max(found.values(), key=lambda run: float(run["accuracy"]))
            gap = 100 * (best["accuracy"] - first["accuracy"])
            verdict = "within 1 point" if gap <= 1 else f"{gap:.1f} points below"
            settings = ", ".join(f"{key} {value:g}" for key, value in best["settings"].items()) or "the default"
            text = f"the default {first['accuracy']:.3f}, the best {best['accuracy']:.3f} ({settings}): {verdict}"
            lines.append(f"- {case}, {strategy}, {len(found)} trials: {text}")
    return ["", "Random search (one seed):", "", *lines] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CASES), help="cases")
    parser.add_argument("--strategies", default="full,lora")
    parser.add_argument("--ways", default="class-1,own-1,own-10,own-30,solved")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--trials", type=int, default=0, help="of a random search for each strategy, the default included")
    given = parser.parse_args()
    os.environ.setdefault("HFSTRAT_CACHE", str(WORK / "cache"))
    runs: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    wanted = [(way, WAYS[way], seed) for seed in SEEDS[: given.seeds] for way in given.ways.split(",") if way]
    for case in given.only.split(","):
        if f"{case}/tf-idf" not in runs:
            runs[f"{case}/tf-idf"] = floor(case)
        for strategy in given.strategies.split(","):
            trials = [(f"trial-{n}", searched(case, strategy, n), SEEDS[0]) for n in range(given.trials)]
            for name, way, seed in (*wanted, *trials):
                key = f"{case}/{strategy}/{name}/{seed}"
                if key in runs:
                    continue
                settings = {"settings": way} if name.startswith("trial") else {}
                runs[key] = one(case, strategy, way, seed) | settings
                print(key, runs[key], flush=True)
                RESULT.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    result = {"machine": machine(), "runs": runs}
    write("defaults", result, lines_of(result))


if __name__ == "__main__":
    main()
