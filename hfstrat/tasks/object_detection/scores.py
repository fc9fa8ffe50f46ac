"""Average precision of boxes as in COCO (arXiv 1405.0312), as a function of how often each image counts. numpy only.

Detections are matched with boxes once; what depends on the weights of the images is a sum over sorted detections. So an
interval by the bootstrap over images costs little, which pycocotools and faster-coco-eval do not offer. The tests compare the
values with both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfstrat.recipe.format import plural

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of an image
MOST_RANKED = 300_000  # detections of all classes, above which no intervals are computed: they would take minutes
EPSILON = np.spacing(1)
NO_SCORE = -1.0  # of rows that fill up
SHOWN = 5  # classes
MOST_NAMED = 20  # classes whose average precision has an interval


class Ranked(NamedTuple):
    """The detections of a class by score: `hits` `[thresholds, n]` and `images` `[n]`; and the `boxes` of each image."""

    hits: np.ndarray
    images: np.ndarray
    boxes: np.ndarray


def overlaps(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Intersection over union of corners `[n, 4]` and `[m, 4]`: `[n, m]` in float64."""
    low, high = np.maximum(found[:, None, :2], true[None, :, :2]), np.minimum(found[:, None, 2:], true[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)
    areas = [(one[:, 2] - one[:, 0]) * (one[:, 3] - one[:, 1]) for one in (found, true)]
    union = areas[0][:, None] + areas[1][None] - shared
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(union > 0, shared / union, 0.0)


def match(overlap: np.ndarray) -> np.ndarray:
    """Which detections hit a box, `[thresholds, n]`: each takes the free box with the largest overlap, the best score first.

    Args:
        overlap: `[n, m]`, detections by score.
    """
    hits = np.zeros((len(THRESHOLDS), len(overlap)), dtype=bool)
    if not overlap.shape[1]:
        return hits
    for at, threshold in enumerate(THRESHOLDS):
        free = np.ones(overlap.shape[1], dtype=bool)
        least = min(threshold, 1 - 1e-10)
        for index in np.flatnonzero((overlap >= least).any(1)):
            row = np.where(free, overlap[index], -1.0)
            best = len(row) - 1 - int(row[::-1].argmax())  # of equal overlaps COCO takes the last
            if row[best] >= least:
                free[best], hits[at, index] = False, True
    return hits


class Detections:
    """The detections and boxes of all images, matched by class.

    Args:
        found: score, class and corners of detections, `[images, K, 6]`, filled up with scores of `NO_SCORE`.
        true: class and corners of boxes, `[images, M, 5]`, filled up with classes below 0.
        classes: their number.
    """

    def __init__(self, found: np.ndarray, true: np.ndarray, classes: int) -> None:
        found, true = found.astype(np.float64), true.astype(np.float64)
        self.ranked = [self._of_class(found, true, label) for label in range(classes)]
        self.count = sum(len(one.images) for one in self.ranked)

    @staticmethod
    def _of_class(found: np.ndarray, true: np.ndarray, label: int) -> Ranked:
        scores, hits, images = list[np.ndarray](), list[np.ndarray](), list[int]()
        boxes = (true[:, :, 0] == label).sum(1).astype(np.float64)
        for index, (each, box) in enumerate(zip(found, true, strict=True)):
            mine = each[(each[:, 0] > NO_SCORE) & (each[:, 1] == label)]
            mine = mine[np.argsort(-mine[:, 0], kind="mergesort")][:MOST]
            if not len(mine):
                continue
            scores.append(mine[:, 0])
            hits.append(match(overlaps(mine[:, 2:], box[box[:, 0] == label][:, 1:])))
            images += [index] * len(mine)
        if not scores:
            return Ranked(np.zeros((len(THRESHOLDS), 0), dtype=bool), np.zeros(0, dtype=np.int64), boxes)
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        return Ranked(np.concatenate(hits, axis=1)[:, order], np.asarray(images)[order], boxes)

    def by_class(self, weights: np.ndarray) -> np.ndarray:
        """The average precision of each class at each threshold, `[classes, thresholds]`; NaN for classes without boxes.

        Args:
            weights: how often each image counts, `[images]`.
        """
        return np.stack([_precision(one, weights) for one in self.ranked])

    def score(self, weights: np.ndarray, names: tuple[str, ...] = ()) -> dict[str, float]:
        """`map`, `map50` and `map75`: means over the classes with boxes; and `ap50_NAME` of each class with a name here."""
        table = self.by_class(weights)
        there = table[np.isfinite(table[:, 0])]
        if not len(there):
            return {"map": 0.0, "map50": 0.0, "map75": 0.0}
        means = {"map": float(there.mean()), "map50": float(there[:, 0].mean()), "map75": float(there[:, 5].mean())}
        return means | {f"ap50_{name}": float(row[0]) for name, row in zip(names, table, strict=False) if np.isfinite(row[0])}

    def recalls(self, weights: np.ndarray) -> np.ndarray:
        """The share of the boxes of each class that are found at an overlap of one half, `[classes]`."""
        totals = [float(weights @ one.boxes) for one in self.ranked]
        hits = [float((one.hits[0] * weights[one.images]).sum()) for one in self.ranked]
        return np.asarray([hit / total if total else np.nan for hit, total in zip(hits, totals, strict=True)])


def _precision(ranked: Ranked, weights: np.ndarray) -> np.ndarray:
    total = float(weights @ ranked.boxes)
    if total <= 0:
        return np.full(len(THRESHOLDS), np.nan)
    each = weights[ranked.images]
    right = np.cumsum(ranked.hits * each, axis=1)
    wrong = np.cumsum(~ranked.hits * each, axis=1)
    recall, precision = right / total, right / (right + wrong + EPSILON)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best precision at this recall or a higher one
    found = np.zeros(len(THRESHOLDS))
    for at in range(len(THRESHOLDS)):
        places = np.searchsorted(recall[at], RECALLS, side="left")
        found[at] = precision[at][places[places < precision.shape[1]]].sum() / len(RECALLS)
    return found


def details_of(detections: Detections, names: tuple[str, ...], images: int) -> list[dict[str, Any]]:
    """For the report: average precision, recall and number of boxes of each class."""
    ones = np.ones(images)
    table, recalls = detections.by_class(ones), detections.recalls(ones)
    return [
        {
            "label": name,
            "support": int(ranked.boxes.sum()),
            "ap": _number(row.mean()),
            "ap50": _number(row[0]),
            "recall50": _number(recall),
        }
        for name, ranked, row, recall in zip(names, detections.ranked, table, recalls, strict=True)
    ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def lines_of(details: dict[str, Any]) -> list[str]:
    """The classes with the lowest average precision at an overlap of one half."""
    rows = [row for row in details.get("labels", []) if row.get("ap50") is not None]
    if not rows:
        return []
    worst = sorted(rows, key=lambda row: row["ap50"])[:SHOWN]
    words = ", ".join(f"{row['label']} {row['ap50']:.1%} of {plural(row['support'], 'box', 'boxes')}" for row in worst)
    return [f"{'lowest AP50':<16} {words}"]
