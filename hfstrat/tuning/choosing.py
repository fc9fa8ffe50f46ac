"""Which held-out rows choose the winner, scores on them, and how much of the winner's score was the luck of being chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfstrat.evaluation import intervals
from hfstrat.objectives import task_of
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks.base import Quality

LEVEL = 0.95
RESAMPLES = 2000
CHOOSING = 0.6  # share of the held-out rows that choose, where no other data measures the winner
LEAST = 2  # rows on either side
SHRINK = 20  # rows for choosing at which right and wrong count as much as the probability of the right class
IN_BYTES = Quality("bits_per_byte", False, "bits", "bytes")


def quality_of(recipe: Recipe, in_bytes: bool) -> Quality:
    """The metric that is maximized or minimized: that of task and objective, or bits per byte where tokenizers differ."""
    return IN_BYTES if in_bytes else task_of(recipe).metrics.quality


def places(rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Positions of the rows that choose, drawn by seed, `[n]`; all of them for a share of 1.

    Args:
        rows: the indices of the held-out rows in their source, ascending, `[rows]`.
        share: of the rows.
        seed: of the draw, which depends on nothing else but the number of rows.
    """
    count = len(rows)
    if share >= 1 or count < 2 * LEAST:
        return np.arange(count)
    drawn = np.random.default_rng((seed, 2, count)).permutation(count)
    return np.sort(drawn[: min(count - LEAST, max(LEAST, round(share * count)))])


def score(columns: Mapping[str, np.ndarray], quality: Quality, chosen: np.ndarray) -> dict[str, Any]:
    """The metric and the loss on some rows. `score` chooses: it is signed such that higher is better.

    The score of a share of right answers is shrunk towards the mean probability of the right class, which varies less from row
    to row: a few rows cannot rank candidates by right and wrong alone (a barely trained one is right in half of two classes).
    """
    above, below = columns[quality.above][chosen].astype(float), columns[quality.below][chosen].astype(float)
    value = float(above.sum() / below.sum())
    loss = float(columns["nll"][chosen].sum() / columns["items"][chosen].sum())
    low, high = interval(above, below)
    signed = value if quality.higher_is_better else -value
    if quality.above == "right" and (columns["items"][chosen] == 1).all() and len(above) == below.sum():
        weight = len(above) / (len(above) + SHRINK)
        signed = weight * value + (1 - weight) * float(np.exp(-columns["nll"][chosen]).mean())
    return {
        "score": signed,
        "quality": value,
        "low": low,
        "high": high,
        "loss": loss,
        "rows": len(chosen),
    }


def draws(above: np.ndarray, below: np.ndarray, seed: int = 0) -> np.ndarray:
    """The metric on rows drawn with replacement, `[RESAMPLES]`."""
    random = np.random.default_rng((seed, len(above)))
    weights = random.multinomial(len(above), np.full(len(above), 1 / len(above)), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ above) / (weights @ below)


def interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a metric: Wilson's for a share of rows that are right or wrong, else the bootstrap over rows."""
    if (below == 1).all() and np.isin(above, (0, 1)).all():
        return intervals.wilson(float(above.mean()), len(above))
    low, high = np.nanquantile(draws(above, below), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def luck(folder: Path, quality: Quality, share: float, seed: int) -> dict[str, Any] | None:
    """The winner on the held-out rows that did not choose it, and the difference from those that did.

    Args:
        folder: of the winner's rung, with the scores of each row.
        quality: the metric.
        share, seed: of the rows that choose.

    Returns:
        None without stored scores, or where all rows choose.
    """
    columns = intervals.read_rows(folder)
    if not columns:
        return None
    chosen = places(columns["row"], share, seed)
    others = np.setdiff1d(np.arange(len(columns["row"])), chosen)
    if not len(others):
        return None
    parts = [(columns[quality.above][at].astype(float), columns[quality.below][at].astype(float)) for at in (chosen, others)]
    first, second = (float(above.sum() / below.sum()) for above, below in parts)
    low, high = interval(*parts[1])
    return {"value": second, "low": low, "high": high, "rows": len(others)} | difference(first, second, parts)


def difference(first: float, second: float, parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The difference of two independent samples of rows with its bootstrap interval."""
    spread = draws(*parts[0], seed=1) - draws(*parts[1], seed=2)
    low, high = np.nanquantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"luck": first - second, "luck_low": float(low), "luck_high": float(high)}


def luck_against(chosen: Mapping[str, Any], others: Mapping[str, float], rows: int) -> dict[str, Any]:
    """The same for other data, from two intervals of independent samples, whose half-widths add in squares (Newcombe 1998).

    Args:
        chosen: the winner on the rows that chose it: `quality`, `low`, `high`.
        others: on other rows: `value`, `low`, `high`.
        rows: their number.
    """
    gap = float(chosen["quality"]) - float(others["value"])
    down = ((chosen["quality"] - chosen["low"]) ** 2 + (others["high"] - others["value"]) ** 2) ** 0.5
    up = ((chosen["high"] - chosen["quality"]) ** 2 + (others["value"] - others["low"]) ** 2) ** 0.5
    return {**others, "rows": rows, "luck": gap, "luck_low": gap - down, "luck_high": gap + up}
