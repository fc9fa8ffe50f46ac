"""A solved head on features of each image, and on those of several fixed views of it.

    python -m benchmarks.image_views

Writes benchmarks/results/image_views.json and .md. Training images are 20 or 200 of a class of ../shared/data/cifar10_10k,
drawn by three seeds; measured are 1,000 of its test images. The model is models/dinov2-small-focus at 98 pixels; `head` chooses
its layer by a probe on the images themselves and solves the head exactly. Views are random crops of at least half of the image,
mirrored, in other colors. Each run is `python -m hfstrat.train` in a process of its own on one thread, and its result is
written at once: an interrupted benchmark resumes.

Predicted before the first run, from a trial with other code: 2 points more with 20 images, 1.5 with 200, in all seeds; time as
often as there are views.
"""

from __future__ import annotations

import json
import random
import statistics
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.images import DATA, MODEL
from benchmarks.measure import RESULTS, ROOT, machine, train, write

RESULT = RESULTS / "image_views.json"
WORK = ROOT / "runs" / "benchmarks" / "image_views"
COUNTS, SEEDS, VIEWS = (20, 200), (1, 2, 3), (1, 8)


def images_of(count: int, seed: int) -> Path:
    """A folder with so many images of each class."""
    folder = WORK / f"train-{count}-{seed}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    with zipfile.ZipFile(DATA / "train.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for label in sorted({Path(name).parent.name for name in names}):
            (partial / label).mkdir(parents=True, exist_ok=True)
            own = [name for name in names if Path(name).parent.name == label]
            for name in random.Random(f"{seed} {label}").sample(own, count):
                (partial / label / Path(name).name).write_bytes(archive.read(name))
    partial.rename(folder)
    return folder


def measure(count: int, seed: int, views: int) -> dict[str, Any]:
    recipe = {
        "task": "image-classification",
        "model": str(MODEL),
        "strategy": "head",
        "data": {"train": str(images_of(count, seed)), "eval": str(DATA / "test.zip")},
        "image": {"image_size": 98, "views": views},
        "evaluation": {"samples": 0, "max_rows": 1000, "eval_on_start": False, "baselines": False},
        "seed": seed,
    }
    trained = train(f"{count}/{seed}/{views}", recipe, WORK)
    result = trained.report["result"]
    entry = result["measured"]["evaluation rows"]["after"]
    return {"accuracy": entry["accuracy"], "head": result["head"], "cpu_seconds": trained.cpu_seconds}


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = [
        "Accuracy on 1,000 test images with 95 % intervals over images; seeds draw the training images.",
        "",
        f"| images of a class | seed | {' | '.join(f'views: {views}' for views in VIEWS)} | difference |",
        f"|---:|---:|{'---:|' * len(VIEWS)}---:|",
    ]
    for count in COUNTS:
        gains = []
        for seed in SEEDS:
            runs = [result["runs"].get(f"{count}/{seed}/{views}") for views in VIEWS]
            if not all(runs):
                continue
            values = [run["accuracy"] for run in runs]
            gains.append(values[-1]["value"] - values[0]["value"])
            cells = [f"{one['value']:.1%} ({one['low']:.1%} to {one['high']:.1%})" for one in values]
            lines.append(f"| {count} | {seed} | {' | '.join(cells)} | {100 * gains[-1]:+.1f} points |")
        if len(gains) == len(SEEDS):
            spread = statistics.stdev(gains) / len(gains) ** 0.5 * 4.303  # of Student's t with two degrees of freedom
            mean = statistics.mean(gains)
            lines.append(f"| {count} | mean | | | {100 * mean:+.1f} points ±{100 * spread:.1f} over seeds |")
    times = []
    for count in COUNTS:
        of_count = [run for name, run in result["runs"].items() if name.startswith(f"{count}/")]
        by_views = [[run["cpu_seconds"] for run in of_count if run["head"].get("views", 1) == views] for views in VIEWS]
        if all(by_views):
            times.append(f"{count}: {' and '.join(f'{statistics.median(each):.0f} s' for each in by_views)}")
    return [*lines, "", f"Median processor time of a command without and with views, by images of a class: {'; '.join(times)}."]


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
    for count in COUNTS:
        for seed in SEEDS:
            for views in VIEWS:
                name = f"{count}/{seed}/{views}"
                if name not in done:
                    done[name] = measure(count, seed, views)
                    print(name, done[name]["accuracy"], flush=True)
                    result = {"machine": machine(), "runs": done}
                    write("image_views", result, lines_of(result))


if __name__ == "__main__":
    main()
