"""How far off the predictions were where they were checked: read from what the benchmarks stored."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Band(NamedTuple):
    """Median and worst relative error of a stored validation, and of how many configurations."""

    median: float
    worst: float
    runs: int

    def words(self) -> str:
        return f"within {self.worst:.0%} ({self.median:.0%} at the median) in the {self.runs} runs that it was checked with"


@lru_cache
def constants() -> dict[str, Any]:
    """What was fitted on measured runs: see benchmarks/memory_prediction.py."""
    found: dict[str, Any] = json.loads((HERE / "constants.json").read_text(encoding="utf-8"))
    return found


def memory_band() -> Band | None:
    found = constants().get("memory_band")
    return Band(found["median"], found["worst"], found["count"]) if found else None


def time_band(source: str) -> float | None:
    """The worst relative error of times whose rate is from this source; None: it was not validated."""
    found = constants().get("time_bands", {}).get(source)
    return float(found["worst"]) if found else None
