"""How sure a number is: confidence intervals by the bootstrap over rows, paired where two models answered the same rows.

Rows, not tokens, are drawn: the tokens of a row belong together (Miller 2024, arXiv 2411.00640, on clustered errors). The
interval is that of the percentiles (Efron and Tibshirani 1993, chapter 13). Of two models the difference is drawn with the
same rows for both (Koehn 2004, W04-3250), which is much narrower than two intervals side by side. Where each row is right or
wrong, and nothing else, the interval of a share is Wilson's (1927), which says something even where all rows are right. Numpy
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from hfstrat.tasks.metrics import Score, ratios

LEVEL = 0.95


Z = 1.959963984540054  # standard normal, at (1 + LEVEL) / 2


RESAMPLES, FEWEST, DRAWS = 1000, 200, 2 * 10**8  # DRAWS: rows drawn in all, beyond which there are fewer resamples


SEED = 20240401


METHOD = (
    "95 %: percentile bootstrap over rows, 1000 resamples (Efron and Tibshirani 1993); differences paired by row (Koehn 2004); "
    "single shares of right rows by Wilson's score (1927)"
)


@dataclass(frozen=True)
class Found:
    """What one model made of one set of rows.

    Args:
        rows: how many.
        score: metrics, from how often each row counts.
        shares: names of metrics that are a share of right rows.
        counts: numbers without an interval, such as tokens.
        details: for the report.
        given: metrics whose interval (value, low, high) was made elsewhere.
        order: a digest of which rows these are, in which order: only the same can be paired.
    """

    rows: int
    score: Score
    shares: tuple[str, ...] = ()
    counts: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    given: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    order: str = ""

    def values(self) -> dict[str, float]:
        """The metrics themselves."""
        return {**self.score(np.ones(self.rows)), **{name: value for name, (value, _, _) in self.given.items()}}


def means(columns: dict[str, np.ndarray]) -> Score:
    """A score of means over rows."""
    if not columns:
        return lambda weights: {}
    score = ratios(columns, {name: itemgetter(name) for name in columns})
    return lambda weights: {name: total / weights.sum() for name, total in score(weights).items()}


def draws(rows: int) -> Iterator[np.ndarray]:
    """How often each row counts in each resample, `[rows]`; the same ones whenever there are as many rows."""
    source = np.random.default_rng((SEED, rows))
    for _ in range(max(FEWEST, min(RESAMPLES, DRAWS // max(rows, 1)))):
        yield np.bincount(source.integers(0, rows, rows), minlength=rows).astype(np.float64)


def together(before: Found | None, after: Found) -> dict[str, Any]:
    """For the report: value and interval of each metric `before` and `after`, and of their difference.

    A difference of rows that are not the same has no interval.
    """
    paired = before is not None and before.rows == after.rows and before.order == after.order
    found = {"before": before, "after": after} if before is not None else {"after": after}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in (*found, "difference")}
    if max(one.rows for one in found.values()) > 1:
        for name, one in found.items():
            samples[name] = [one.score(weights) for weights in draws(one.rows)] if one.rows > 1 else []
        if paired:
            both = zip(samples["before"], samples["after"], strict=True)
            samples["difference"] = [{name: b[name] - a[name] for name in b if name in a} for a, b in both]
    whole: dict[str, Any] = {"rows": after.rows, **after.counts}
    for name, one in found.items():
        whole[name] = _single(one, samples[name])
    if before is not None:
        whole["difference"] = _difference(before, after, samples["difference"])
    return whole | ({"details": after.details} if after.details else {})


def _single(found: Found, samples: list[dict[str, float]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in found.score(np.ones(found.rows)).items():
        low, high = wilson(value, found.rows) if name in found.shares else between(samples, name)
        entries[name] = entry(value, low, high)
    return entries | {name: entry(*three) for name, three in found.given.items()}


def _difference(before: Found, after: Found, samples: list[dict[str, float]]) -> dict[str, Any]:
    old, new = before.values(), after.values()
    return {name: entry(new[name] - old[name], *between(samples, name)) for name in new if name in old}


def entry(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def between(samples: list[dict[str, float]], name: str) -> tuple[float | None, float | None]:
    """The middle 95 % of a metric's resamples; nothing where there are none."""
    values = [each[name] for each in samples if name in each]
    if not values or not all(map(math.isfinite, values)):
        return None, None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(share: float, rows: int) -> tuple[float, float]:
    """The score interval of a share of `rows`."""
    middle = share + Z * Z / (2 * rows)
    half = Z * math.sqrt(share * (1 - share) / rows + Z * Z / (4 * rows * rows))
    size = 1 + Z * Z / rows
    return max(0.0, (middle - half) / size), min(1.0, (middle + half) / size)
