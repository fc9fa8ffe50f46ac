"""What a classifier's evaluation says: accuracy, F1, a table by label, what is taken for what. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

MATRIX = 100  # labels, at most, for which the whole confusion matrix is kept
TOP = 20  # confusions that are kept by name


def of_sums(sums: np.ndarray, marks: np.ndarray, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and the details by label, from what `losses.class_sums` gives of each row.

    Args:
        sums: summed loss and items, `[rows, 2]`.
        marks: true and predicted class `[rows, 2]`, or for several labels a row 2 x true + predicted `[rows, labels]` (int8).
        names: of the labels.
    """
    nll, items = sums.astype("float64").sum(axis=0)
    several = marks.dtype == np.int8
    scores, details = (_several if several else _single)(marks, names)
    return {"loss": nll / max(items, 1), **scores, "rows": float(len(sums))}, details


def _single(marks: np.ndarray, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    true, said = marks[:, 0].astype(np.int64), marks[:, 1].astype(np.int64)
    count = len(names)
    hits = np.bincount(true[true == said], minlength=count)
    support, calls = np.bincount(true, minlength=count), np.bincount(said, minlength=count)
    table, f1 = _table(names, hits, support, calls)
    there = (support + calls) > 0  # as scikit-learn: labels that are neither asked for nor said do not count
    scores = {"accuracy": float((true == said).mean()), "macro_f1": float(f1[there].mean())}
    details: dict[str, Any] = {"labels": table, "confusions": _confusions(true, said, names)}
    largest = int(support.argmax())
    details["largest_label"] = {"label": names[largest], "accuracy_of_always_saying_it": float(support[largest] / len(true))}
    if count <= MATRIX:
        pairs = np.bincount(true * count + said, minlength=count * count)
        details["confusion"] = {"rows_are": "true", "columns_are": "predicted", "counts": pairs.reshape(count, count).tolist()}
    return scores, details


def _several(marks: np.ndarray, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    true, said = marks >= 2, marks % 2 == 1
    hits, support, calls = (true & said).sum(0), true.sum(0), said.sum(0)
    table, f1 = _table(names, hits, support, calls)
    scores = {
        "accuracy": float((true == said).all(1).mean()),  # all labels of a row right, as scikit-learn has it
        "macro_f1": float(f1.mean()),
        "micro_f1": float(2 * hits.sum() / max(1, support.sum() + calls.sum())),
    }
    return scores, {"labels": table}


def _table(
    names: tuple[str, ...], hits: np.ndarray, support: np.ndarray, calls: np.ndarray
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Precision, recall, F1 and support of each label (0 where there is nothing to divide by), and the F1 alone `[labels]`."""
    precision, recall = hits / np.maximum(calls, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + calls, 1)
    rows = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return [dict(zip(("label", "precision", "recall", "f1", "support"), row, strict=True)) for row in rows], f1


def _confusions(true: np.ndarray, said: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    wrong = true != said
    pairs, counts = np.unique(np.stack([true[wrong], said[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:TOP]
    return [{"true": names[pairs[0, i]], "predicted": names[pairs[1, i]], "count": int(counts[i])} for i in order]
