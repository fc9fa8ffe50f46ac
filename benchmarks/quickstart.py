"""Gain and cost of the quickstart, over three seeds.

    make quickstart && python -m benchmarks.quickstart

Writes benchmarks/results/quickstart.json and .md, from the report.json of each run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

SEEDS = (42, 43, 44)
FIELDS = ("metrics_before", "metrics_after", "train_seconds", "total_seconds", "tokens_per_second", "peak_memory_bytes")


def one(seed: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "hfstrat", "train", "recipes/quickstart.yaml", f"seed={seed}", f"output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((folder / "report.json").read_text())["result"]
    return {"seed": seed, **{key: result[key] for key in FIELDS}, "bit_equal": result["verified"]["bit_equal"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        runs = [one(seed, Path(scratch) / str(seed)) for seed in SEEDS]
    result = {"machine": machine(), "runs": runs}
    write("quickstart", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    table = [
        "| seed | loss before | after | perplexity before | after | token accuracy before | after "
        "| training | tokens/s | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        before, after = run["metrics_before"], run["metrics_after"]
        table.append(
            f"| {run['seed']} | {before['loss']:.3f} | {after['loss']:.3f} | {before['perplexity']:.1f} | "
            f"{after['perplexity']:.1f} | {before['token_accuracy']:.1%} | {after['token_accuracy']:.1%} | "
            f"{run['train_seconds']:.0f} s | {run['tokens_per_second']:.0f} | {run['peak_memory_bytes'] / 2**30:.2f} GiB |"
        )
    gains = [run["metrics_before"]["loss"] - run["metrics_after"]["loss"] for run in runs]
    fall = f"{statistics.mean(gains):.2f} nats per token ({min(gains):.2f} to {max(gains):.2f})"
    return [*table, "", f"The evaluation loss falls by {fall}."]


if __name__ == "__main__":
    main()
