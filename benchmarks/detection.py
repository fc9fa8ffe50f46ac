"""A detector of blood cells: a frozen pretrained backbone against the same model from random weights, in the same time.

    python -m benchmarks.detection [--minutes 30] [--only partial,scratch,full] [--size 224]

Writes benchmarks/results/detection.json and .md. Each run is `python -m hfstrat.train` in a process of its own on one thread,
and its result is written at once: an interrupted benchmark resumes. Reads ../shared/data/blood_cells (205 photographs for
training, 72 for testing, three classes) and models/dinov2-small-focus.

`partial` trains the decoder of RF-DETR (`scripts/demo_detector.py`) on the frozen first eight layers of a vision transformer of
the shape of DINOv2-small, from a saliency model. `full` trains all of it, augmented. `scratch` is the same model, all of whose
weights are random, trained in full. Nothing is selected by the test images (`load_best_model_at_end: false`). One seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, machine, train, write

DATA = ROOT.parent / "shared" / "data" / "blood_cells"
BACKBONE = ROOT / "models" / "dinov2-small-focus"
RESULT = RESULTS / "detection.json"
WORK = ROOT / "runs" / "benchmarks" / "detection"
CLASSES = ["Platelets", "RBC", "WBC"]
RUNS: dict[str, dict[str, Any]] = {
    "partial": {"strategy": {"name": "partial"}, "learning_rate": 1e-3},
    "scratch": {"strategy": {"name": "full"}, "learning_rate": 1e-3, "random": True},
    "full": {"strategy": {"name": "full"}, "learning_rate": 2e-4},
}
METRICS = ("map50", "map", *(f"ap50_{name}" for name in CLASSES))


def model_of(run: dict[str, Any]) -> Path:
    """The detector, built if it is not there."""
    folder = WORK / ("random" if run.get("random") else "pretrained")
    if not (folder / "model.safetensors").is_file():
        words = [sys.executable, str(ROOT / "scripts" / "demo_detector.py"), str(BACKBONE), str(folder)]
        subprocess.run([*words, *(["--random"] if run.get("random") else [])], check=True)
    return folder


def measure(name: str, minutes: float, size: int) -> dict[str, Any]:
    """Train once, in a process of its own."""
    run = RUNS[name]
    recipe = {
        "task": "object-detection",
        "model": str(model_of(run)),
        "strategy": run["strategy"],
        "data": {"train": str(DATA / "train.zip"), "eval": str(DATA / "test.zip"), "class_names": CLASSES},
        "image": {"image_size": size},
        "training": {
            "max_time": f"{round(60 * minutes)}s",
            "learning_rate": run["learning_rate"],
            "global_batch_size": 4,
            "eval_steps": 1.0,
            "load_best_model_at_end": False,
            "logging_steps": 20,
        },
        "evaluation": {"samples": 0, "eval_on_start": False},
    }
    trained = train(name, recipe, WORK, WORK / "cache")
    result = trained.report["result"]
    rows = result["measured"]["evaluation rows"]
    return {
        **{metric: rows["after"][metric] for metric in METRICS if metric in rows["after"]},
        "rows": rows["rows"],
        "image_size": size,
        "minutes": minutes,
        "total_seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
        "train_seconds": result["train_seconds"],
        "steps": result["steps"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "total_parameters": result["total_parameters"],
        "bit_equal": result["verified"]["bit_equal"],
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    """The table."""
    runs = result["runs"]
    first = next(iter(runs.values()))
    lines = [
        f"Average precision at an overlap of 0.5 on {first['rows']} test photographs at {first['image_size']} pixels, with 95% "
        f"intervals over images, after {first['minutes']:g} minutes of training.",
        "",
        f"| run | mAP50 | {' | '.join(CLASSES)} | mAP | steps | processor minutes | trainable |",
        f"|---|---|{'---|' * len(CLASSES)}---|---:|---:|---:|",
    ]
    for name, run in runs.items():
        shown = [_share(run.get(metric)) for metric in ("map50", *(f"ap50_{each}" for each in CLASSES), "map")]
        lines.append(
            f"| {name} | {' | '.join(shown)} | {run['steps']:,} | {run['cpu_seconds'] / 60:.1f} "
            f"| {run['trainable_parameters'] / 1e6:.2f} M |"
        )
    return lines


def _share(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    return (
        f"{entry['value']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"
        if entry["low"] is not None
        else f"{entry['value']:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--size", type=int, default=224)
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    for name in RUNS:
        if name in given.only.split(",") and name not in done:
            done[name] = measure(name, given.minutes, given.size)
            print(name, done[name]["map50"], f"{done[name]['total_seconds']:.0f} s", flush=True)
            result = {"machine": machine(), "runs": {each: done[each] for each in RUNS if each in done}}
            write("detection", result, lines_of(result))


if __name__ == "__main__":
    main()
