"""Helpers of all benchmarks: interleaved timings of fresh processes, the machine, and the result as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import yaml

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def interleaved(cases: dict[str, list[str]], repeats: int) -> dict[str, dict[str, Any]]:
    """Time each command over `repeats` interleaved rounds, in seconds; the first round warms the disk cache and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, words in cases.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: {"median": statistics.median(s), "min": min(s), "max": max(s), "all": s} for name, s in seconds.items()}


def rounds(name: str, cases: list[list[str]], repeats: int, minutes: float = inf) -> dict[str, list[dict[str, float]]]:
    """Run `python -m benchmarks.NAME --one CASE...` in interleaved rounds and collect the last line that each run prints.

    Each case runs `repeats` times. Every result is stored at once, so that an interrupted benchmark resumes; `make clean`
    deletes the stored results. After `minutes` no new case starts and the process exits: start it again to continue.
    """
    began = time.monotonic()
    stored = ROOT / "runs" / "benchmarks" / f"{name}.jsonl"
    stored.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    for turn in range(repeats):
        for case in cases:
            if sum(entry["case"] == case for entry in done) > turn:
                continue
            if time.monotonic() - began > 60 * minutes:
                sys.exit(f"{len(done)} of {repeats * len(cases)} runs are stored; run the same command again to continue")
            words = [sys.executable, "-m", f"benchmarks.{name}", "--one", *case]
            ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
            if ended.returncode:
                sys.exit(f"{' '.join(case)} failed: {ended.stderr[-2000:]}")
            done.append({"case": case, "result": json.loads(ended.stdout.strip().splitlines()[-1])})
            with stored.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(*case, done[-1]["result"], flush=True)
    found = {" ".join(case): [entry["result"] for entry in done if entry["case"] == case][:repeats] for case in cases}
    if all(len(results) == repeats for results in found.values()):
        stored.unlink()
    return found


def speeds(results: list[dict[str, float]], ours: list[dict[str, float]]) -> list[str]:
    """Cells of a table: the median of real tokens per second, all of them, and how many times faster `ours` is."""
    own, speed = (statistics.median(run["tokens_per_second"] for run in runs) for runs in (ours, results))
    return [f"{speed:.0f}", ", ".join(f"{run['tokens_per_second']:.0f}" for run in results), f"{own / speed:.2f}x"]


class Trained(NamedTuple):
    """The report of a run, and seconds of its complete command, and of processors."""

    report: dict[str, Any]
    seconds: float
    cpu_seconds: float


def train(name: str, recipe: dict[str, Any], work: Path, cache: Path | None = None, module: str = "hfstrat.train") -> Trained:
    """Train a recipe in a process of its own on one thread, offline; its files are deleted. The process exits if it fails.

    Args:
        name: of the run, for the error.
        recipe: without `output_dir`.
        work: a folder for its files.
        cache: the folder of the cache; by default an empty one.
        module: `python -m` of the command, with its words, before the recipe.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file, output = Path(folder) / "recipe.yaml", Path(folder) / "run"
        file.write_text(yaml.safe_dump({**recipe, "output_dir": str(output)}))
        own = {"OMP_NUM_THREADS": "1", "HFSTRAT_CACHE": str(cache or f"{folder}/cache"), "HF_HUB_OFFLINE": "1"}
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.monotonic()
        words = [sys.executable, "-m", *module.split(), str(file)]
        ended = subprocess.run(words, env=os.environ | own, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"{name} failed: {ended.stdout[-1000:]}{ended.stderr[-2000:]}")
        seconds, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        return Trained(json.loads((output / "report.json").read_text()), seconds, used)


def machine() -> dict[str, Any]:
    """Return processor, cores, Python and versions of the libraries."""
    from hfstrat.models.fingerprint import LIBRARIES, installed, processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := installed(name))},
    }


def write(name: str, result: dict[str, Any], lines: list[str]) -> None:
    """Write the result as JSON and its lines of Markdown to benchmarks/results, and print the lines."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page(name, lines))
    print("\n".join(lines))


def page(name: str, lines: list[str]) -> str:
    """Return the text of benchmarks/results/NAME.md."""
    return "\n".join([f"`python -m benchmarks.{name}`", "", *lines]) + "\n"
