"""What can be said of qualities measured with several seeds on the same rows. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
AT_ONCE = 4_000_000  # numbers of resampling weights that are held at a time
SEED = 0  # of the resampling: the same measurements always give the same intervals


class Interval(NamedTuple):
    low: float
    high: float


def student(freedom: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above it, for so many degrees of freedom.

    By bisection on its distribution function, which for whole degrees is a finite sum (Abramowitz and Stegun, 26.7.3 and 4).
    """
    low, high = 0.0, 1000.0
    while high - low > 1e-9 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, freedom) < LEVEL else (low, middle)
    return (low + high) / 2


def _between(t: float, freedom: int) -> float:
    """The probability of lying between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = 1.0, 0.0
    if freedom % 2:
        term = math.cos(angle)
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= math.cos(angle) ** 2 * (2 * k) / (2 * k + 1)
        return 2 / math.pi * (angle + math.sin(angle) * total)
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k - 1) / (2 * k)
    return math.sin(angle) * total


def over_seeds(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of the mean over all seeds there could be (Student's t); None of fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = student(count - 1) * spread / math.sqrt(count)
    return Interval(mean - reach, mean + reach)


def ratio(above: np.ndarray, below: np.ndarray) -> float:
    """The measure over all rows, mean over seeds: `[seeds, rows]` each."""
    return float((above.sum(1) / below.sum(1)).mean())


def resampled(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, np.ndarray]:
    """The measure on rows drawn with replacement, the same rows for everybody: `[resamples]` for each name.

    Args:
        parts: by name, the measure's numerator and denominator of each row, `[seeds, rows]` each, rows in the same order.
    """
    rows = next(iter(parts.values()))[0].shape[1]
    random = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    block = max(1, AT_ONCE // max(rows, 1))
    for start in range(0, resamples, block):
        weights = random.multinomial(rows, np.full(rows, 1 / rows), size=min(block, resamples - start)).astype(np.float64)
        for name, (above, below) in parts.items():
            with np.errstate(invalid="ignore", divide="ignore"):  # rows without a single item may be all that were drawn
                found[name].append(((weights @ above.T) / (weights @ below.T)).mean(1))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def interval(draws: np.ndarray) -> Interval:
    """The middle 95 % of them."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def front(points: dict[str, tuple[float, float]], higher_is_better: bool) -> set[str]:
    """The names of those than which no other is as good and cheaper, or better at no higher price.

    Args:
        points: quality and price of each.
    """
    sign = -1.0 if higher_is_better else 1.0
    costs = {name: (sign * quality, price) for name, (quality, price) in points.items()}
    return {
        name
        for name, (worse, dear) in costs.items()
        if not any(a <= worse and b <= dear and (a < worse or b < dear) for a, b in costs.values())
    }
