"""Classifiers from 8 or 32 rows per class: hfstrat's `head`, `head` with `contrastive`, `full`, and SetFit on the same rows.

    python -m benchmarks.few_rows [REPEATS] [--minutes N]
    python -m benchmarks.few_rows --table                    # writes the results of the runs that have ended so far

all-MiniLM-L6-v2; trec6 (6 classes) and sst2 (2 classes) of ../shared/data, 8 and 32 rows per class; accuracy on 500 other rows.
Each repetition draws other rows and has another seed; each run is a process of its own. SetFit 1.2 with its defaults (cosine
similarity of pairs, learning rate 2e-5, batches of 16, one epoch, logistic regression), but 20 pairs per row and label instead
of all pairs, as in its paper (Tunstall et al. 2022, arXiv 2209.11055). It needs `pip install setfit==1.2.0`; without it, it is
left out. Seconds are those of loading, training and predicting.

Predicted before the first run: SetFit 5 points above the solved head with 8 rows per class, equal with 64; `full` below both
with 8 rows and above with 64. After two runs of a sketch, before `contrastive` was written: as accurate as SetFit in half of
its time.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, rounds, write
from benchmarks.memory_prediction import model_folder

DATA = ROOT.parent / "shared" / "data"
SETS = ("trec6", "sst2")
PER_CLASS = (8, 32)
CONTENDERS = ("head", "contrastive", "full", "setfit")
STORED = ROOT / "runs" / "benchmarks" / "few_rows.jsonl"  # of `rounds`
SECTIONS = {"head": "head", "contrastive": "{name: head, contrastive: true}", "full": "full"}
TEST_ROWS, PAIRS = 500, 20


def read(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows: text and label."""
    found = []
    for part in ("train", "test"):
        file = DATA / name / f"{part}.csv"
        with file.open(encoding="utf-8", newline="") as stream:
            found.append([{"text": row["text"], "label": row["label"]} for row in csv.DictReader(stream)])
    return found[0], found[1]


def draw(name: str, count: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """So many rows per class, and the test rows."""
    train, test = read(name)
    source = random.Random(seed)
    source.shuffle(train)
    kept: dict[str, list[dict[str, str]]] = {}
    for row in train:
        kept.setdefault(row["label"], []).append(row)
    rows = [row for label in sorted(kept) for row in kept[label][:count]]
    source.shuffle(rows)
    return rows, random.Random(0).sample(test, min(TEST_ROWS, len(test)))


def run_hfstrat(strategy: str, rows: list[dict[str, str]], test: list[dict[str, str]], seed: int, folder: Path) -> float:
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run.train import run

    for name, found in (("train", rows), ("eval", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"task: text-classification\nmodel: {model_folder('MiniLM')}\nstrategy: {SECTIONS[strategy]}\nseed: {seed}\n"
        f"data: {{train: {folder / 'train.jsonl'}, eval: {folder / 'eval.jsonl'}, max_length: 128}}\n"
        "evaluation: {samples: 0, eval_on_start: false, baselines: false}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    report = run(load_recipe(str(recipe)))
    assert report is not None
    assert report.finished.metrics_after is not None
    return report.finished.metrics_after["accuracy"]


def run_setfit(rows: list[dict[str, str]], test: list[dict[str, str]], seed: int, folder: Path) -> float:
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    labels = sorted({row["label"] for row in rows})
    train = Dataset.from_dict({"text": [r["text"] for r in rows], "label": [labels.index(r["label"]) for r in rows]})
    model = SetFitModel.from_pretrained(model_folder("MiniLM"), device="cpu")
    settings = {"num_epochs": 1, "num_iterations": PAIRS, "seed": seed, "report_to": "none", "save_strategy": "no"}
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(folder / "setfit"), **settings), train_dataset=train)
    trainer.train()
    found = model.predict([row["text"] for row in test])
    return statistics.mean(float(labels[int(label)] == row["label"]) for label, row in zip(found, test, strict=True))


def one(name: str, count: str, contender: str, seed: str) -> dict[str, float]:
    """Run one contender in this process."""
    rows, test = draw(name, int(count), int(seed))
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        if contender == "setfit":
            accuracy = run_setfit(rows, test, int(seed), Path(scratch))
        else:
            accuracy = run_hfstrat(contender, rows, test, int(seed), Path(scratch))
        return {"accuracy": accuracy, "seconds": time.perf_counter() - started}


def main() -> None:
    if not DATA.is_dir():
        sys.exit(f"{DATA} not found: this benchmark runs on real rows that are not in the repository")
    words = sys.argv[1:]
    if "--table" in words:
        report({" ".join(entry["case"]): [entry["result"]] for entry in map(json.loads, STORED.read_text().splitlines())})
        return
    minutes = float(words.pop(words.index("--minutes") + 1)) if "--minutes" in words else math.inf
    repeats = int(words[0]) if words and words[0].isdigit() else 3
    contenders = [name for name in CONTENDERS if name != "setfit" or importlib.util.find_spec("setfit")]
    cases = [
        [name, str(count), contender, str(seed)]
        for seed in range(repeats)
        for name in SETS
        for count in PER_CLASS
        for contender in contenders
    ]
    report(rounds("few_rows", cases, 1, minutes))


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    result = {"machine": machine(), "test_rows": TEST_ROWS, "runs": runs}
    write("few_rows", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    """Mean accuracy over the repetitions, all of them, and the median seconds."""
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for case, (run,) in result["runs"].items():
        name, count, contender, _ = case.split()
        groups.setdefault((name, count, contender), []).append(run)
    table = ["| data | rows per class | contender | accuracy | all runs | seconds |", "|---|---|---|---|---|---|"]
    for (name, count, contender), runs in groups.items():
        shown = ", ".join(f"{run['accuracy']:.1%}" for run in runs)
        middle = statistics.median(run["seconds"] for run in runs)
        accuracy = statistics.mean(run["accuracy"] for run in runs)
        table.append(f"| {name} | {count} | {contender} | {accuracy:.1%} | {shown} | {middle:.0f} |")
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:6])))
    else:
        main()
