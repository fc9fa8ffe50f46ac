"""A small image classifier with a teacher and without one: the same student, start, images and steps.

    python -m benchmarks.distill_images [--seeds 3]

Writes benchmarks/results/distill_images.json and .md. Each run is `python -m hfstrat.train` in a process of its own on one
thread, and its result is written at once: an interrupted benchmark resumes. Reads ../shared/data/cifar10_10k and
models/dinov2-small-focus, as benchmarks.images does.

The teacher is a vision transformer of 22 M parameters whose head was solved on all 8,000 training images (strategy `head`). The
student is a new one of 3 M parameters with patches of 14, trained on 200 images of a class for 20 epochs, without augmentation,
so that the teacher's logits are computed once. `without` has `teacher_weight: 0`, and is otherwise the same. Accuracy is on all
2,000 test images; nothing is selected by it. The interval of a gain is that of two independent shares, which is wider than that
of pairs.

Predicted before the first run: teacher 76 %, without 40 %, with 46 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.images import DATA, MODEL, few_images
from benchmarks.measure import RESULTS, ROOT, machine, write

RESULT = RESULTS / "distill_images.json"
WORK = ROOT / "runs" / "benchmarks" / "distill_images"
FEW, EPOCHS = 200, 20
WAYS = {"without": 0.0, "with": 0.9}  # weight of the teacher


def train(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train once; returns the report's result."""
    common = {
        "task": "image-classification",
        "image": {"image_size": 98, "augmentation": "off"},
        "evaluation": {"samples": 0, "eval_on_start": False, "baselines": False},
        "output_dir": str(output),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(common | recipe))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HFSTRAT_CACHE": str(WORK / "cache")}
        words = [sys.executable, "-m", "hfstrat.train", str(file)]
        ended = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{output.name} failed: {ended.stdout[-1000:]}{ended.stderr[-2000:]}")
    result: dict[str, Any] = json.loads((output / "report.json").read_text())["result"]
    return result


def teacher() -> Path:
    """The folder of the teacher's run."""
    folder = WORK / "teacher"
    if not (folder / "final").is_dir():
        data = {"train": str(DATA / "train.zip"), "eval": str(DATA / "test.zip")}
        train({"model": str(MODEL), "strategy": {"name": "head"}, "data": data}, folder)
    return folder


def measure(way: str, seed: int) -> dict[str, Any]:
    student = {"name": "scratch", "model_type": "vit", "parameters": "3M", "config": {"patch_size": 14}}
    recipe = {
        "strategy": {
            "name": "distill",
            "teacher": str(teacher() / "final"),
            "teacher_weight": WAYS[way],
            "student": student,
        },
        "data": {"train": str(few_images(FEW, WORK)), "eval": str(DATA / "test.zip")},
        "training": {
            "num_train_epochs": EPOCHS,
            "global_batch_size": 64,
            "learning_rate": 1e-3,
            "eval_steps": 1.0,
            "load_best_model_at_end": False,
        },
        "seed": seed,
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        result = train(recipe, Path(folder) / "run")
    return {
        "accuracy": result["measured"]["evaluation rows"]["after"]["accuracy"],
        "rows": result["measured"]["evaluation rows"]["rows"],
        "parameters": result["total_parameters"],
        "steps": result["steps"],
        "train_seconds": result["train_seconds"],
        "seconds": time.monotonic() - started,
    }


def gains(runs: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """For each seed the gain in accuracy, and half its 95 % interval."""
    found = {}
    for seed in sorted({name.partition("-")[2] for name in runs}):
        pair = [runs.get(f"{way}-{seed}") for way in ("with", "without")]
        if all(pair):
            shares, halves = zip(*((one["accuracy"]["value"], half_of(one["accuracy"])) for one in pair if one), strict=True)
            found[seed] = (shares[0] - shares[1], math.hypot(*halves))
    return found


def half_of(share: dict[str, float]) -> float:
    return (share["high"] - share["low"]) / 2


def lines_of(result: dict[str, Any]) -> list[str]:
    known, each = result["teacher"], gains(result["runs"])
    one = next(iter(result["runs"].values()))
    above = sum(gain > half for gain, half in each.values())
    lines = [
        f"Teacher: {known['parameters'] / 1e6:.1f} M parameters, accuracy {known['accuracy']['value']:.1%}; student: "
        f"{one['parameters'] / 1e6:.1f} M, {one['steps']} steps. {one['rows']:,} test images. The gain is larger than its 95 % "
        f"interval with {above} of {len(each)} seeds.",
        "",
        "| seed | without the teacher | with it | gain |",
        "|---|---|---|---|",
    ]
    for seed, (gain, half) in each.items():
        cells = [result["runs"][f"{way}-{seed}"]["accuracy"] for way in WAYS]
        shown = [f"{cell['value']:.1%} ±{half_of(cell):.1%}" for cell in cells]
        lines.append(f"| {seed} | {' | '.join(shown)} | {100 * gain:+.1f} ±{100 * half:.1f} points |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    WORK.mkdir(parents=True, exist_ok=True)
    given = parser.parse_args()
    runs: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    teacher()
    known = json.loads((WORK / "teacher" / "report.json").read_text())["result"]
    about = {
        "accuracy": known["measured"]["evaluation rows"]["after"]["accuracy"],
        "parameters": known["total_parameters"],
    }
    for seed in range(1, given.seeds + 1):
        for way in WAYS:
            if (name := f"{way}-{seed}") not in runs:
                runs[name] = measure(way, seed)
                print(name, json.dumps(runs[name]), flush=True)
                result = {"machine": machine(), "teacher": about, "runs": runs}
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write("distill_images", {"machine": machine(), "teacher": about, "runs": runs}, lines_of({"teacher": about, "runs": runs}))


if __name__ == "__main__":
    main()
