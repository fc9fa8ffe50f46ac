"""Results of the two from-scratch recipes after four minutes of training, relative to the baselines they have to beat.

    make data/stdlib/train.jsonl && python -m benchmarks.scratch_recipes [stdlib] [shakespeare]

Writes benchmarks/results/scratch_recipes.json and .md, from the report.json of each run; a recipe that is not named keeps its
stored result. shakespeare is scratch/text_file on ../shared/data/tinyshakespeare, and is left out where that is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, machine, write

SHAKESPEARE = "../shared/data/tinyshakespeare/input.txt"
DATA = {"stdlib": "data/stdlib/train.jsonl", "shakespeare": SHAKESPEARE}
RECIPES = {
    "stdlib": ["recipes/scratch/stdlib.yaml"],
    "shakespeare": ["recipes/scratch/text_file.yaml", f"data.train={SHAKESPEARE}"],
}
FIELDS = (
    *("metrics_before", "metrics_after", "baselines", "overfitting", "total_parameters", "steps", "best_step", "train_seconds"),
    *("total_seconds", "tokens", "tokens_per_second", "peak_memory_bytes", "artifact_bytes", "answers"),
)


def one(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "hfstrat", "train", *RECIPES[name], f"output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((folder / "report.json").read_text())["result"]
    return {key: result[key] for key in FIELDS} | {"bit_equal": result["verified"]["bit_equal"], "machine": machine()}


def row(name: str, run: dict[str, Any]) -> str:
    before, after, bars = run["metrics_before"], run["metrics_after"], run["baselines"]
    return (
        f"| {name} | {run['total_parameters'] / 1e6:.2f} M | {bars['uniform']:.2f} | {before['loss']:.2f} | "
        f"{bars['unigram']:.2f} ({bars['unigram_bits_per_byte']:.2f}) | {after['loss']:.2f} ({after['bits_per_byte']:.2f}) | "
        f"{bars['unigram'] - after['loss']:.2f} | {run['tokens'] / bars['unique_tokens']:.1f} | {run['train_seconds']:.0f} s | "
        f"{run['total_seconds']:.0f} s | {run['tokens_per_second']:,.0f} | {run['peak_memory_bytes'] / 2**30:.2f} GiB |"
    )


def main() -> None:
    file = RESULTS / "scratch_recipes.json"
    runs: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name in sys.argv[1:] or [name for name, data in DATA.items() if (ROOT / data).is_file()]:
        with tempfile.TemporaryDirectory() as scratch:
            runs[name] = one(name, Path(scratch) / "run")
    write("scratch_recipes", runs, lines_of(runs))


def lines_of(result: dict[str, Any]) -> list[str]:
    return [
        "Losses in nats per token, in brackets bits per byte.",
        "",
        "| recipe | parameters | uniform baseline (ln V) | loss before | unigram baseline | loss after | below unigram | "
        "epochs | training | in total | tokens/s | peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(name, run) for name, run in sorted(result.items())),
    ]


if __name__ == "__main__":
    main()
