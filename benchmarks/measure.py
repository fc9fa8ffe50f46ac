"""What the benchmarks share: interleaved timings of fresh processes, the machine, a JSON and a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def interleaved(cases: dict[str, list[str]], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each command over `repeats` rounds of all of them; the first round warms the disk and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, words in cases.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: {"median": statistics.median(s), "min": min(s), "max": max(s), "all": s} for name, s in seconds.items()}


def machine() -> dict[str, Any]:
    from hfstrat.report import LIBRARIES, installed, processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := installed(name))},
    }


def write(name: str, result: dict[str, Any], table: list[str]) -> None:
    """Write the JSON and the table, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join([f"`python -m benchmarks.{name}`", "", *table]) + "\n")
    print("\n".join(table))
