"""Classifiers of spoken digits by several strategies: accuracy, time and memory; and on a speaker that training never heard.

    python -m benchmarks.audio [--only head,scratch,..]

Writes benchmarks/results/audio.json and .md. Each run is `python -m hfstrat.train` in a process of its own on one thread, and
its result is written at once: an interrupted benchmark resumes. Reads ../shared/data/spoken_digits and models/whisper-tiny-en
(`make models/whisper-tiny-en/model.safetensors`).

The model is the encoder of Whisper tiny.en, 7.8 M parameters with its head. Its inputs are 1 second (`audio.max_length: 1`)
instead of 30: the longest recordings lose their end. `head` chooses its layer by a probe on training recordings and solves the
head exactly. `head-without-SPEAKER` trains on the other five speakers' recordings of both archives and is measured on all 500
of that one. `scratch` trains an audio spectrogram transformer with random weights, augmented, for five minutes, and
`full` all weights of the encoder for that time, and `lora` adapters of it. One seed.

Predicted before the first run: head .97, without a speaker .90, scratch .40, full .90.
Predicted before the first run of lora: .97.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, machine, train, write

DATA = ROOT.parent / "shared" / "data" / "spoken_digits"
MODEL = ROOT / "models" / "whisper-tiny-en"
RESULT = RESULTS / "audio.json"
WORK = ROOT / "runs" / "benchmarks" / "audio"
SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "num_mel_bins": 64,
    "time_stride": 16,
    "frequency_stride": 16,
}
WITHOUT = "head-without-"
HEAD: dict[str, Any] = {"strategy": {"name": "head"}}
RUNS: dict[str, dict[str, Any]] = {
    "head": HEAD,
    f"{WITHOUT}theo": HEAD,
    "scratch": {"strategy": {"name": "scratch", "config": SMALL}, "max_time": "5min"},
    "full": {"strategy": {"name": "full"}, "max_time": "5min"},
    "lora": {"strategy": {"name": "lora"}, "max_time": "5min"},
}


def of_speakers(speaker: str) -> tuple[Path, Path]:
    """Archives of the recordings of all other speakers, and of this one, from both archives of the data."""
    made = {name: WORK / f"{name}-{speaker}.zip" for name in ("without", "only")}
    if not all(file.is_file() for file in made.values()):
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
        archives = {name: zipfile.ZipFile(file.with_suffix(".partial"), "w") for name, file in made.items()}
        for part in ("train", "test"):
            with zipfile.ZipFile(DATA / f"{part}.zip") as given:
                for row in map(json.loads, given.read("metadata.jsonl").splitlines()):
                    name = "only" if row["speaker"] == speaker else "without"
                    archives[name].writestr(row["file_name"], given.read(row["file_name"]))
                    rows[name].append({"file_name": row["file_name"], "label": row["label"]})
        for name, archive in archives.items():
            archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows[name]))
            archive.close()
            made[name].with_suffix(".partial").rename(made[name])
    return made["without"], made["only"]


def recipe_of(name: str, output: Path) -> dict[str, Any]:
    run, is_new = RUNS[name], RUNS[name]["strategy"]["name"] == "scratch"
    train, held = DATA / "train.zip", DATA / "test.zip"
    if name.startswith(WITHOUT):
        train, held = of_speakers(name.removeprefix(WITHOUT))
    training: dict[str, Any] = {"eval_steps": 1.0, "load_best_model_at_end": False, "logging_steps": 20}
    if "max_time" in run:
        training["max_time"] = run["max_time"]
    return {
        "task": "audio-classification",
        **({} if is_new else {"model": str(MODEL)}),
        "strategy": run["strategy"],
        "data": {"train": str(train), "eval": str(held)},
        "audio": {"max_length": 1},
        "training": training,
        "evaluation": {"samples": 0, "eval_on_start": False, "baselines": False},
        "output_dir": str(output),
    }


def measure(name: str) -> dict[str, Any]:
    """Train once, in a process of its own with an empty cache."""
    trained = train(name, recipe_of(name, WORK / "run"), WORK)
    result = trained.report["result"]
    measured = result["measured"]["evaluation rows"]
    return {
        **{metric: measured["after"][metric] for metric in ("accuracy", "macro_f1", "balanced_accuracy")},
        "rows": measured["rows"],
        "total_seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
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
        "Accuracy with 95% interval over recordings; time of the complete command.",
        "",
        "| run | measured on | accuracy | macro-F1 | minutes | processor minutes | peak memory | steps | trainable |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in result["runs"].items():
        entry, half = run["accuracy"], (run["accuracy"]["high"] - run["accuracy"]["low"]) / 2
        what = f"{name.removeprefix(WITHOUT)}, unheard" if name.startswith(WITHOUT) else "test"
        lines.append(
            f"| {name} | {run['rows']:,} ({what}) | {entry['value']:.1%} ±{half:.1%} | {run['macro_f1']['value']:.1%} "
            f"| {run['total_seconds'] / 60:.1f} | {run['cpu_seconds'] / 60:.1f} | {run['peak_memory_bytes'] / 2**20:,.0f} MiB "
            f"| {run['steps']:,} | {run['trainable_parameters'] / 1e6:.3f} M |"
        )
    if "head" not in result["runs"]:
        return lines
    head = result["runs"]["head"]["head"]
    scores = ", ".join(f"{one['layer']}: {one['score']:.1%}" for one in head["candidates"])
    lines += ["", f"The probe of `head` (leave-one-out accuracy of ridge regression by layer): {scores}."]
    lines.append(f"It chose layer {head['layer']}. All features took {head['features_seconds']:.0f} s to compute.")
    return lines


def finished() -> dict[str, Any]:
    """The runs that are in the result file."""
    return dict(json.loads(RESULT.read_text())["runs"]) if RESULT.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(RUNS))
    wanted = parser.parse_args().only.split(",")
    WORK.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        if name in wanted and name not in finished():
            found = measure(name)
            print(name, found["accuracy"], f"{found['total_seconds']:.0f} s", flush=True)
            done = finished() | {name: found}  # read again: several may run at once
            result = {"machine": machine(), "runs": {each: done[each] for each in RUNS if each in done}}
            write("audio", result, lines_of(result))


if __name__ == "__main__":
    main()
