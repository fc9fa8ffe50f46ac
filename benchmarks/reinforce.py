"""Does a reward rise? recipes/reinforce/json_answers with three seeds: greedy answers to held-out prompts before and after.

    python -m benchmarks.reinforce [--core N]

One core and one thread for each run, one after the other. Finished runs are read again and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.measure import ROOT, machine, write

RECIPE = "recipes/reinforce/json_answers.yaml"
SEEDS = (1, 2, 3)
SHOWN = ("reward", "rewards/json_valid/mean", "rewards/json_schema/mean", "rewards/exact_match/mean", "completions/mean_length")


def run(seed: int, core: int) -> dict[str, Any]:
    """The finished run of a seed, as report.json has it."""
    folder = ROOT / "runs" / "benchmarks" / "reinforce" / str(seed)
    file = folder / "report.json"
    if not file.is_file() or json.loads(file.read_text())["result"]["status"] != "done":
        words = [sys.executable, "-m", "hfstrat.train", RECIPE, f"seed={seed}", f"output_dir={folder}", "--overwrite"]
        subprocess.run(["taskset", "-c", str(core), *words], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def summary(report: dict[str, Any]) -> dict[str, Any]:
    result = report["result"]
    return {
        "measured": result["measured"]["evaluation rows"],
        "control": result["measured"]["control text"],
        "sampled": result["rewards"],
        "seconds": result["train_seconds"],
        "total_seconds": result["total_seconds"],
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, default=0)
    given = parser.parse_args()
    found = {str(seed): summary(run(seed, given.core)) for seed in SEEDS}
    result = {"machine": machine(), "recipe": RECIPE, "seeds": found}
    write("reinforce", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["seeds"]
    first, last = ([run["sampled"][place]["reward"] for run in runs.values()] for place in (0, -1))
    minutes = ", ".join(f"{run['seconds'] / 60:.1f}" for run in runs.values())
    words = (
        f"`{RECIPE}`: 24 steps of 2 prompts with 8 answers each, {minutes} minutes of training on one core. Reward of the "
        "sampled answers (of 3), mean of the first and of the last four steps: "
        + "; ".join(f"{one:.2f} -> {two:.2f}" for one, two in zip(first, last, strict=True))
        + ". Greedy answers to 100 held-out prompts, with 95 % intervals over prompts:"
    )
    rows = ["| metric | before | " + " | ".join(f"seed {seed}" for seed in runs) + " |", "|---|---|" + "---|" * len(runs)]
    for name in SHOWN:
        before = next(iter(runs.values()))["measured"]["before"][name]
        after = [run["measured"]["after"][name] for run in runs.values()]
        rows.append(f"| `{name}` | {cell(before)} | " + " | ".join(map(cell, after)) + " |")
    losses = [run["control"]["difference"]["loss"] for run in runs.values()]
    rows.append("| loss on the control text, change | | " + " | ".join(f"{one['value']:+.4f}" for one in losses) + " |")
    return [words, "", *rows]


def cell(one: dict[str, Any]) -> str:
    return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


if __name__ == "__main__":
    main()
