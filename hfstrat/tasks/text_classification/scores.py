"""What a classifier's evaluation says: accuracy, F1, a table by label, what is taken for what. Numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MATRIX = 100  # labels, at most, for which the whole confusion matrix is kept
TOP = 20  # confusions that are kept by name
PRINTED = 3  # labels and confusions
LONGEST = 24  # characters of a label there


def of_sums(sums: np.ndarray, marks: np.ndarray, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and the details by label, from what `losses.class_sums` gives of each row.

    Args:
        sums: summed loss and items, `[rows, 2]`.
        marks: true and predicted class `[rows, 2]`, or for several labels a row 2 x true + predicted `[rows, labels]` (int8).
        names: of the labels.
    """
    details = (_several if marks.dtype == np.int8 else _single)(marks, names)
    return {**score_of(sums, marks, len(names))(np.ones(len(sums))), "rows": float(len(sums))}, details


def score_of(sums: np.ndarray, marks: np.ndarray, count: int) -> Callable[[np.ndarray], dict[str, float]]:
    """The metrics from how often each row counts (`[rows]`); `sums` and `marks` as for `of_sums`, `count` labels."""
    sums = sums.astype("float64")
    parts = _several_parts(marks) if marks.dtype == np.int8 else _single_parts(marks, count)

    def score(weights: np.ndarray) -> dict[str, float]:
        nll, items = weights @ sums
        return {"loss": float(nll / max(items, 1)), **parts(weights)}

    return score


def columns_of(sums: np.ndarray, marks: np.ndarray) -> dict[str, np.ndarray]:
    """`nll` (nats) over `items` of each row, and whether all of its labels are `right`; of a single one also which it is
    (`true`) and was `predicted`. `sums` and `marks` as for `of_sums`."""
    nll, items = sums.astype(np.float64).T
    true, said = (marks >= 2, marks % 2 == 1) if marks.dtype == np.int8 else marks.astype(np.int64).T[:, :, None]
    found = {"nll": nll, "items": items, "right": (true == said).all(1).astype(np.float64)}
    return found if marks.dtype == np.int8 else {**found, "true": true[:, 0], "predicted": said[:, 0]}


def _single_parts(marks: np.ndarray, count: int) -> Callable[[np.ndarray], dict[str, float]]:
    true, said = marks[:, 0].astype(np.int64), marks[:, 1].astype(np.int64)
    right = true == said

    def score(weights: np.ndarray) -> dict[str, float]:
        hits = np.bincount(true[right], weights[right], count)
        both = np.bincount(true, weights, count) + np.bincount(said, weights, count)
        f1 = 2 * hits / np.maximum(both, 1)
        there = both > 0  # as scikit-learn: labels that are neither asked for nor said do not count
        return {"accuracy": float(hits.sum() / weights.sum()), "macro_f1": float(f1[there].mean())}

    return score


def _several_parts(marks: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    true, said = marks >= 2, marks % 2 == 1
    whole, counted = (true == said).all(1), [each.astype(np.float64) for each in (true & said, true, said)]

    def score(weights: np.ndarray) -> dict[str, float]:
        hits, support, calls = (weights @ each for each in counted)
        return {
            "accuracy": float(weights @ whole / weights.sum()),  # all labels of a row right, as scikit-learn has it
            "macro_f1": float((2 * hits / np.maximum(support + calls, 1)).mean()),
            "micro_f1": float(2 * hits.sum() / max(1, support.sum() + calls.sum())),
        }

    return score


def _single(marks: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    true, said = marks[:, 0].astype(np.int64), marks[:, 1].astype(np.int64)
    count = len(names)
    hits = np.bincount(true[true == said], minlength=count)
    support, calls = np.bincount(true, minlength=count), np.bincount(said, minlength=count)
    table = _table(names, hits, support, calls)
    details: dict[str, Any] = {"labels": table, "confusions": _confusions(true, said, names)}
    largest = int(support.argmax())
    details["largest_label"] = {"label": names[largest], "accuracy": float(support[largest] / len(true))}
    if count <= MATRIX:
        pairs = np.bincount(true * count + said, minlength=count * count)
        details["confusion"] = {"rows_are": "true", "columns_are": "predicted", "counts": pairs.reshape(count, count).tolist()}
    return details


def _several(marks: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    true, said = marks >= 2, marks % 2 == 1
    return {"labels": _table(names, (true & said).sum(0), true.sum(0), said.sum(0))}


def _table(names: tuple[str, ...], hits: np.ndarray, support: np.ndarray, calls: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label (0 where there is nothing to divide by)."""
    precision, recall = hits / np.maximum(calls, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + calls, 1)
    rows = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return [dict(zip(("label", "precision", "recall", "f1", "support"), row, strict=True)) for row in rows]


def _confusions(true: np.ndarray, said: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    wrong = true != said
    pairs, counts = np.unique(np.stack([true[wrong], said[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:TOP]
    return [{"true": names[pairs[0, i]], "predicted": names[pairs[1, i]], "count": int(counts[i])} for i in order]


def lines_of(details: dict[str, Any]) -> list[str]:
    """What to beat, the labels that are hardest, and what is taken for what."""
    lines = []
    if largest := details.get("largest_label"):
        share = largest["accuracy"]
        lines.append(f"to beat          accuracy {share:.1%} by always saying {_short(largest['label'])}")
    worst = sorted((row for row in details.get("labels", []) if row["support"]), key=lambda row: row["f1"])[:PRINTED]
    if worst:
        said = ", ".join(f"{_short(row['label'])} {row['f1']:.1%} (of {row['support']:,})" for row in worst)
        lines.append(f"lowest F1        {said}")
    if pairs := details.get("confusions", [])[:PRINTED]:
        said = ", ".join(f"{_short(pair['true'])} as {_short(pair['predicted'])} {pair['count']:,}x" for pair in pairs)
        lines.append(f"taken for        {said}")
    return lines


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else label[: LONGEST - 3] + "..."
