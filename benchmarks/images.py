"""Image classifiers by several strategies on 10,000 small photographs of ten classes: accuracy, time and memory.

    python -m benchmarks.images [--only head-20,scratch-20,..]

Writes benchmarks/results/images.json and .md. Each run is `python -m hfstrat train` in a process of its own on one thread, and
its result is written at once: an interrupted benchmark resumes. Reads ../shared/data/cifar10_10k and models/dinov2-small-focus
(`make models/dinov2-small-focus/model.safetensors`).

The model is a vision transformer in the shape of DINOv2-small, 22 M parameters, from a saliency model; images of 32 pixels are
given to it at 98. Training is on 20 or on all 800 images of a class, evaluation on 1,000 of the 2,000 test images, evenly
spaced over the classes; nothing is selected by it (`load_best_model_at_end: false`). `head` chooses its layer by a probe on
training images and solves the head exactly, with an empty cache. `head-again` is the same command a second time: its features
are in the cache. `scratch` trains a vision transformer of 2.7 M parameters at 32 pixels (patches of 4), augmented, for as long
as the complete `head` run took. `lora` trains adapters on all linear layers, augmented, for 10 epochs; `head-then-lora` for ten
minutes from the solved head, whose features it computes again, since its body stays in float32 until then. One seed.

Predicted before the first run: head .50 / .76, scratch .25 / .50, lora-20 .55, head-then-lora .80.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, machine, train, write

DATA = ROOT.parent / "shared" / "data" / "cifar10_10k"
MODEL = ROOT / "models" / "dinov2-small-focus"
RESULT = RESULTS / "images.json"
WORK = ROOT / "runs" / "benchmarks" / "images"
FEW, ALL = 20, 800  # images of a class
SMALL = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 4,
}
SCRATCH = {"strategy": {"name": "scratch", "model_type": "vit", "config": SMALL}, "image": {"image_size": 32}, "batch": 64}
HEAD = {"strategy": {"name": "head"}}
RUNS: dict[str, dict[str, Any]] = {
    f"head-{FEW}": HEAD,
    f"scratch-{FEW}": {**SCRATCH, "as_long_as": f"head-{FEW}"},
    f"lora-{FEW}": {"strategy": {"name": "lora"}, "training": {"num_train_epochs": 10, "learning_rate": 1e-3}, "batch": 32},
    f"head-{ALL}": HEAD,
    f"head-again-{ALL}": HEAD,
    f"scratch-{ALL}": {**SCRATCH, "as_long_as": f"head-{ALL}"},
    f"head-then-lora-{ALL}": {
        "strategy": {"name": "head", "then": "lora"},
        "training": {"max_time": "10min", "learning_rate": 3e-4},
        "batch": 32,
    },
}


def few_images(count: int = FEW, work: Path = WORK) -> Path:
    """The first images of each class of the training archive, in folders below `work`."""
    folder = work / f"train-{count}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    taken: dict[str, int] = {}
    with zipfile.ZipFile(DATA / "train.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            label = Path(name).parent.name
            taken[label] = taken.get(label, 0) + 1
            if taken[label] <= count:
                (partial / label).mkdir(parents=True, exist_ok=True)
                (partial / label / Path(name).name).write_bytes(archive.read(name))
    partial.rename(folder)
    return folder


def recipe_of(name: str, done: dict[str, Any], output: Path) -> dict[str, Any]:
    run, few = RUNS[name], name.endswith(f"-{FEW}")
    training = {
        "global_batch_size": run.get("batch", 16),
        "eval_steps": 1.0,
        "load_best_model_at_end": False,
        "logging_steps": 20,
        **run.get("training", {}),
    }
    if "as_long_as" in run:
        training["max_time"] = f"{round(done[run['as_long_as']]['total_seconds'])}s"
    return {
        "task": "image-classification",
        **({} if run["strategy"]["name"] == "scratch" else {"model": str(MODEL)}),
        "strategy": run["strategy"],
        "data": {"train": str(few_images() if few else DATA / "train.zip"), "eval": str(DATA / "test.zip")},
        "image": run.get("image", {"image_size": 98}),
        "training": training,
        "evaluation": {"samples": 0, "max_rows": 1000, "eval_on_start": False, "baselines": False},
        "output_dir": str(output),
    }


def measure(name: str, done: dict[str, Any]) -> dict[str, Any]:
    """Train once, in a process of its own."""
    rows = name.rpartition("-")[2]
    cache = WORK / f"cache-{rows}"  # of the runs with these images, empty before the first of them
    trained = train(name, recipe_of(name, done, WORK / "run"), WORK, cache)
    result = trained.report["result"]
    entry = result["measured"]["evaluation rows"]["after"]
    return {
        "accuracy": entry["accuracy"],
        "macro_f1": entry["macro_f1"],
        "auroc": entry["auroc"],
        "rows": result["measured"]["evaluation rows"]["rows"],
        "total_seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
        "setup_seconds": result["setup_seconds"],
        "train_seconds": result["train_seconds"],
        "steps": result["steps"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "total_parameters": result["total_parameters"],
        "bit_equal": result["verified"]["bit_equal"],
        "head": result.get("head"),
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    """The table, and the probe of `head`."""
    lines = [
        f"Accuracy on {result['runs'][f'head-{ALL}']['rows']:,} test images with 95% interval; time of the complete command.",
        "",
        "| images of a class | run | accuracy | AUROC | minutes | processor minutes | peak memory | steps | trainable |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in result["runs"].items():
        way, _, rows = name.rpartition("-")
        entry, half = run["accuracy"], (run["accuracy"]["high"] - run["accuracy"]["low"]) / 2
        lines.append(
            f"| {rows} | {way} | {entry['value']:.1%} ±{half:.1%} | {run['auroc']['value']:.3f} "
            f"| {run['total_seconds'] / 60:.1f} | {run['cpu_seconds'] / 60:.1f} | {run['peak_memory_bytes'] / 2**20:,.0f} MiB "
            f"| {run['steps']:,} | {run['trainable_parameters'] / 1e6:.2f} M |"
        )
    head = result["runs"][f"head-{ALL}"]["head"]
    again = result["runs"].get(f"head-again-{ALL}", {}).get("head")
    scores = ", ".join(f"{one['layer']}: {one['score']:.1%}" for one in head["candidates"])
    lines += ["", f"The probe of `head-{ALL}` (leave-one-out accuracy of ridge regression by layer): {scores}."]
    lines.append(f"It chose layer {head['layer']}. All features took {head['features_seconds']:.0f} s to compute.")
    if again:
        lines.append(f"The same features from the cache took {again['features_seconds']:.1f} s (`head-again`).")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(RUNS))
    wanted = parser.parse_args().only.split(",")
    WORK.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    for name in RUNS:
        if name in wanted and name not in done:
            done[name] = measure(name, done)
            print(name, done[name]["accuracy"], f"{done[name]['total_seconds']:.0f} s", flush=True)
            ordered = {each: done[each] for each in RUNS if each in done}
            result = {"machine": machine(), "runs": ordered}
            if f"head-{ALL}" in done:
                write("images", result, lines_of(result))
            else:
                RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
