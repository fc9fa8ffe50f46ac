"""Metrics of a classifier by its probabilities: balanced accuracy, AUROC, average precision, recall at a fixed precision, equal
error rate. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

PRECISION = 0.9  # at which the recall of a rare class is measured
RARE = 0.5  # of the examples of the most frequent class: with fewer the rarest class is measured by itself
MOST = 400_000  # examples times classes, above which resampling the rankings would take minutes: they are left out


def ranks_are_kept(rows: int, classes: int) -> bool:
    """Whether AUROC and average precision are measured."""
    return 0 < rows * classes <= MOST


def score_of(marks: np.ndarray, chances: np.ndarray, count: int) -> Callable[[np.ndarray], dict[str, float]]:
    """Metrics from how often each row counts, `[rows]`: means over the classes that occur.

    Args:
        marks: as of `text_classification.scores.class_sums`.
        chances: the probability of each class, `[rows, classes]`; of no columns where there are too many.
        count: of the classes.
    """
    true = truth_of(marks, count)
    ranked = Ranking(chances, true) if ranks_are_kept(*chances.shape) else None
    several, right = marks.dtype == np.int8, None if marks.dtype == np.int8 else marks[:, 0] == marks[:, 1]
    rare = rarest(true)
    of_rare = None if ranked is None or rare is None else Ranking(chances[:, [rare]], true[:, [rare]])

    def score(weights: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        if not several:
            support, hits = weights @ true, (weights * right) @ true
            found["balanced_accuracy"] = float((hits[support > 0] / support[support > 0]).mean())
        if ranked is not None:
            auroc, precision = ranked.score(weights)
            found |= {"auroc": mean_of(auroc), "average_precision": mean_of(precision)}
        if of_rare is not None:
            found["recall_at_90_precision"] = float(of_rare.recall(weights, PRECISION)[0])
        return found

    return score


def by_class(marks: np.ndarray, chances: np.ndarray, count: int) -> list[dict[str, float]]:
    """AUROC, average precision and recall at a precision of 90 % of each class; empty where they are not measured."""
    if not ranks_are_kept(*chances.shape):
        return []
    ranked, ones = Ranking(chances, truth_of(marks, count)), np.ones(len(marks))
    columns = zip(*ranked.score(ones), ranked.recall(ones, PRECISION), strict=True)
    names = ("auroc", "average_precision", "recall_at_90_precision")
    return [dict(zip(names, map(float, values), strict=True)) for values in columns]


def rarest(true: np.ndarray) -> int | None:
    """The class with the fewest rows, where it is rare: it has few beside the most frequent one.

    Args:
        true: whether a row has a class, `[rows, classes]`.
    """
    return rarest_of(true.sum(0))


def rarest_of(support: np.ndarray) -> int | None:
    """The same by the number of rows of each class, `[classes]`."""
    if not len(support) or not (support > 0).any():
        return None
    place = int(np.argmin(np.where(support > 0, support, np.inf)))
    return place if support[place] < RARE * support.max() else None


def truth_of(marks: np.ndarray, count: int) -> np.ndarray:
    """Whether each row has each class, `[rows, classes]` in float64."""
    if marks.dtype == np.int8:
        return (marks >= 2).astype(np.float64)
    return (marks[:, :1].astype(np.int64) == np.arange(count)).astype(np.float64)


def mean_of(values: np.ndarray) -> float:
    """The mean of the values that are numbers; NaN without any."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


class Ranking:
    """The rows in the order of each class's probability, computed once for all resamples.

    Args:
        chances: `[rows, classes]`.
        true: whether a row has a class, `[rows, classes]`.
    """

    def __init__(self, chances: np.ndarray, true: np.ndarray) -> None:
        self.order = np.argsort(-chances, axis=0, kind="stable")
        self.true = np.take_along_axis(true, self.order, 0)
        ordered = np.take_along_axis(chances, self.order, 0)
        places = np.arange(len(chances))[:, None]
        starts = np.ones(ordered.shape, bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        ends = np.ones(ordered.shape, bool)
        ends[:-1] = starts[1:]
        self.first = np.maximum.accumulate(np.where(starts, places, 0), axis=0)  # of rows with an equal probability
        backwards = np.where(ends, places, len(chances) - 1)[::-1]
        self.last = np.minimum.accumulate(backwards, axis=0)[::-1]

    def _counted(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The weights of rows of each class in its order, and the sums so far of these and of the others, `[rows, classes]`."""
        ordered = weights[self.order]
        positive = ordered * self.true
        return positive, np.cumsum(positive, 0), np.cumsum(ordered - positive, 0)

    def score(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision of each class, `[classes]`; NaN where rows with or without it are missing.

        Ties count one half in AUROC, and are one threshold in the average precision, as in scikit-learn.
        """
        positive, hits, misses = self._counted(weights)
        of_class, others = hits[-1], misses[-1]
        through = np.take_along_axis(misses, self.last, 0)
        before = np.where(self.first > 0, np.take_along_axis(misses, np.maximum(self.first - 1, 0), 0), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            above = (positive * (others - (before + through) / 2)).sum(0)
            caught = np.take_along_axis(hits, self.last, 0)
            precision = np.where(caught + through > 0, caught / (caught + through), 0.0)
            average = np.where(of_class > 0, (positive * precision).sum(0) / of_class, np.nan)
            return np.where(others > 0, above / (of_class * others), np.nan), average

    def recall(self, weights: np.ndarray, precision: float) -> np.ndarray:
        """The largest recall of each class at a threshold with at least this precision, `[classes]`; 0 where there is none."""
        _, hits, misses = self._counted(weights)
        caught, through = (np.take_along_axis(counts, self.last, 0) for counts in (hits, misses))
        with np.errstate(divide="ignore", invalid="ignore"):
            allowed = np.where(caught >= precision * (caught + through), caught, 0.0).max(0)
            return np.where(hits[-1] > 0, allowed / hits[-1], np.nan)


def eer_of(marks: np.ndarray, chances: np.ndarray, count: int) -> Callable[[np.ndarray], dict[str, float]]:
    """The equal error rate of two classes from how often each row counts: where as many rows of one class are taken for the
    other as the other way round, with linear interpolation between thresholds. Empty for other numbers of classes."""
    if count != 2 or marks.dtype == np.int8 or not ranks_are_kept(*chances.shape):
        return lambda weights: {}
    ranking = Ranking(chances[:, 1:], truth_of(marks, count)[:, 1:])
    ends = np.flatnonzero(ranking.last[:, 0] == np.arange(len(chances)))

    def score(weights: np.ndarray) -> dict[str, float]:
        ordered = weights[ranking.order[:, 0]]
        positive = ordered * ranking.true[:, 0]
        hits, misses = np.cumsum(positive)[ends], np.cumsum(ordered - positive)[ends]
        if not (hits[-1] > 0 and misses[-1] > 0):
            return {"eer": float("nan")}
        rejected = np.concatenate([[1.0], 1 - hits / hits[-1]])  # false negatives, from the highest threshold on
        accepted = np.concatenate([[0.0], misses / misses[-1]])  # false positives
        after = int(np.argmax(accepted >= rejected))
        gaps = rejected[after - 1] - accepted[after - 1], accepted[after] - rejected[after]
        share = gaps[0] / (gaps[0] + gaps[1])
        return {"eer": float(accepted[after - 1] + share * (accepted[after] - accepted[after - 1]))}

    return score


def lines_of(details: dict[str, Any]) -> list[str]:
    """The classes with the lowest average precision."""
    rows = [row for row in details.get("labels", []) if "average_precision" in row and row["support"]]
    if not rows:
        return []
    worst = sorted(rows, key=lambda row: row["average_precision"])[:3]
    words = ", ".join(f"{row['label']} {row['average_precision']:.1%} (AUROC {row['auroc']:.1%})" for row in worst)
    return [f"{'lowest AP':<16} {words}"]
