"""Predicted memory and trainable parameters of runs on images and recordings, beside what was measured.

    python -m benchmarks.media_prediction

Writes benchmarks/results/media_prediction.json and .md. Nothing is trained: the runs are those of images.json and audio.json in
the same folder, whose recipes are predicted as `hfstrat train` predicts them before a run. The one constant that differs from
text, the memory of the imported libraries, was read after importing them; nothing was fitted to these runs. `head-again`, which
takes its features from the cache, is left out. Those from scratch had micro-batches of 64, since patches of 4 pixels were
counted as such of 16 at that time; this is given to the prediction. Times are not compared: the runs had one thread of a
machine that others used. Reads ../shared/data/cifar10_10k and spoken_digits, models/dinov2-small-focus and
models/whisper-tiny-en.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import audio, images
from benchmarks.measure import ROOT, machine, write
from hfstrat.advisor import recipes, speed
from hfstrat.advisor.hardware import import_bytes
from hfstrat.recipe.load import load_recipe

AT_ONCE = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 128}  # as those runs had it
LEFT_OUT = (f"head-again-{images.ALL}",)


def runs() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The recipe and the measured result of each run."""
    output, found = Path(tempfile.gettempdir()) / "predicted", {}
    done = json.loads(images.RESULT.read_text())["runs"]
    images.WORK.mkdir(parents=True, exist_ok=True)
    for name, result in done.items():
        recipe = images.recipe_of(name, done, output)
        if name.startswith("scratch"):
            recipe["training"] |= AT_ONCE
        found[f"images: {name}"] = recipe, result
    for name, result in json.loads(audio.RESULT.read_text())["runs"].items():
        if not name.startswith(audio.WITHOUT):
            found[f"recordings: {name}"] = audio.recipe_of(name, output), result
    return {name: pair for name, pair in found.items() if not name.endswith(LEFT_OUT)}


def predict(recipe: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        loaded = load_recipe(str(file)).recipe
    found = recipes.predict_one(loaded, speed.Rate(speed.ASSUMED, ""))[0]
    candidate, _ = recipes.candidate_of(loaded)
    return {"memory_bytes": found["memory_bytes"], "trainable_parameters": candidate.footprint.trainable}


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = [
        "| run | peak memory predicted | measured | trainable parameters predicted | measured |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (predicted, measured) in result["runs"].items():
        lines.append(
            f"| {name} | {predicted['memory_bytes'] / 2**20:,.0f} MiB | {measured['peak_memory_bytes'] / 2**20:,.0f} MiB "
            f"| {predicted['trainable_parameters']:,} | {measured['trainable_parameters']:,} |"
        )
    whole, above = result["memory"]["of_all"], result["memory"]["above_imports"]
    lines += [
        "",
        f"Peak memory was off by {whole['median']:.0%} (median) and {whole['worst']:.0%} (worst); without the "
        f"{result['imports'] / 2**20:,.0f} MiB of the imported libraries by {above['median']:.0%} and {above['worst']:.0%}.",
        "`head-then-lora` trains fewer parameters than predicted, since its body ends at a layer that is chosen while it runs.",
    ]
    return lines


def main() -> None:
    found = {}
    for name, (recipe, measured) in runs().items():
        kept = {key: measured[key] for key in ("peak_memory_bytes", "trainable_parameters")}
        found[name] = (predict(recipe), kept)
    imports = import_bytes(True, reads_words=False)
    pairs = [(one["memory_bytes"], two["peak_memory_bytes"]) for one, two in found.values()]
    errors = {"of_all": [one / two - 1 for one, two in pairs]}
    errors["above_imports"] = [(one - imports) / (two - imports) - 1 for one, two in pairs]
    bands = {
        name: {"median": statistics.median(map(abs, each)), "worst": max(map(abs, each)), "count": len(each)}
        for name, each in errors.items()
    }
    result = {"machine": machine(), "runs": found, "imports": imports, "memory": bands}
    write("media_prediction", result, lines_of(result))
    file = ROOT / "hfstrat" / "advisor" / "constants.json"
    constants = json.loads(file.read_text())
    constants["files_band"] = {name: round(value, 4) for name, value in bands["above_imports"].items()}
    file.write_text(json.dumps(constants, indent=1) + "\n")


if __name__ == "__main__":
    main()
