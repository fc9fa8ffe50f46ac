"""Loss and metrics of a classifier: accuracy, F1, a table by label, confusions. Metrics need numpy only, losses torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.tasks.base import Wrong
from hfstrat.tasks.text_classification.thresholds import as_logits

if TYPE_CHECKING:
    import torch

MATRIX = 100  # labels, at most, for which the whole confusion matrix is kept
TOP = 20  # confusions that are kept by name
PRINTED = 3  # labels and confusions
LONGEST = 24  # characters of a label there


def of_sums(sums: np.ndarray, marks: np.ndarray, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and the details by label, from what `class_sums` returns for each row.

    Args:
        sums: summed loss and items, `[rows, 2]`.
        marks: true and predicted class `[rows, 2]`, or for several labels per row 2 x true + predicted `[rows, labels]` (int8).
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
    true, predicted = (marks >= 2, marks % 2 == 1) if marks.dtype == np.int8 else marks.astype(np.int64).T[:, :, None]
    found = {"nll": nll, "items": items, "right": (true == predicted).all(1).astype(np.float64)}
    return found if marks.dtype == np.int8 else {**found, "true": true[:, 0], "predicted": predicted[:, 0]}


def _single_parts(marks: np.ndarray, count: int) -> Callable[[np.ndarray], dict[str, float]]:
    true, predicted = marks[:, 0].astype(np.int64), marks[:, 1].astype(np.int64)
    right = true == predicted

    def score(weights: np.ndarray) -> dict[str, float]:
        hits = np.bincount(true[right], weights[right], count)
        both = np.bincount(true, weights, count) + np.bincount(predicted, weights, count)
        f1 = 2 * hits / np.maximum(both, 1)
        there = both > 0  # as scikit-learn: labels that are neither true nor predicted do not count
        return {"accuracy": float(hits.sum() / weights.sum()), "macro_f1": float(f1[there].mean())}

    return score


def _several_parts(marks: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    true, predicted = marks >= 2, marks % 2 == 1
    whole, counted = (true == predicted).all(1), [each.astype(np.float64) for each in (true & predicted, true, predicted)]

    def score(weights: np.ndarray) -> dict[str, float]:
        hits, support, calls = (weights @ each for each in counted)
        return {
            "accuracy": float(weights @ whole / weights.sum()),  # all labels of a row right, as scikit-learn has it
            "macro_f1": float((2 * hits / np.maximum(support + calls, 1)).mean()),
            "micro_f1": float(2 * hits.sum() / max(1, support.sum() + calls.sum())),
        }

    return score


def _single(marks: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    true, predicted = marks[:, 0].astype(np.int64), marks[:, 1].astype(np.int64)
    count = len(names)
    hits = np.bincount(true[true == predicted], minlength=count)
    support, calls = np.bincount(true, minlength=count), np.bincount(predicted, minlength=count)
    table = _table(names, hits, support, calls)
    details: dict[str, Any] = {"labels": table, "confusions": _confusions(true, predicted, names)}
    largest = int(support.argmax())
    details["largest_label"] = {"label": names[largest], "accuracy": float(support[largest] / len(true))}
    if count <= MATRIX:
        pairs = np.bincount(true * count + predicted, minlength=count * count)
        details["confusion"] = {"rows_are": "true", "columns_are": "predicted", "counts": pairs.reshape(count, count).tolist()}
    return details


def _several(marks: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    true, predicted = marks >= 2, marks % 2 == 1
    return {"labels": _table(names, (true & predicted).sum(0), true.sum(0), predicted.sum(0))}


def _table(names: tuple[str, ...], hits: np.ndarray, support: np.ndarray, calls: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label (0 where there is nothing to divide by)."""
    precision, recall = hits / np.maximum(calls, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + calls, 1)
    rows = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return [dict(zip(("label", "precision", "recall", "f1", "support"), row, strict=True)) for row in rows]


def _confusions(true: np.ndarray, predicted: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    wrong = true != predicted
    pairs, counts = np.unique(np.stack([true[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:TOP]
    return [{"true": names[pairs[0, i]], "predicted": names[pairs[1, i]], "count": int(counts[i])} for i in order]


def worst_of(sums: np.ndarray, marks: np.ndarray, names: tuple[str, ...], most: int) -> list[Wrong]:
    """The rows with a wrong prediction and the highest loss; `sums` and `marks` as for `of_sums`."""
    several = marks.dtype == np.int8
    true, predicted = (marks >= 2, marks % 2 == 1) if several else marks.astype(np.int64).T[:, :, None]
    places = np.flatnonzero((true != predicted).any(1))
    places = places[np.argsort(-sums[places, 0], kind="stable")][:most]

    def words(row: np.ndarray) -> str:
        chosen = np.flatnonzero(row) if several else row
        return ", ".join(names[label] for label in chosen.tolist()) or "(none)"

    return [
        Wrong(at, words(true[at]), words(predicted[at]), None if several else float(np.exp(-sums[at, 0])))
        for at in places.tolist()
    ]


def lines_of(details: dict[str, Any]) -> list[str]:
    """The baseline, the labels with the lowest F1, and the most frequent confusions."""
    lines = []
    if largest := details.get("largest_label"):
        share = largest["accuracy"]
        lines.append(f"baseline         accuracy {share:.1%} by always predicting {_short(largest['label'])}")
    worst = sorted((row for row in details.get("labels", []) if row["support"]), key=lambda row: row["f1"])[:PRINTED]
    if worst:
        words = ", ".join(f"{_short(row['label'])} {row['f1']:.1%} (of {row['support']:,})" for row in worst)
        lines.append(f"lowest F1        {words}")
    if pairs := details.get("confusions", [])[:PRINTED]:
        words = ", ".join(f"{_short(pair['true'])} as {_short(pair['predicted'])} {pair['count']:,}x" for pair in pairs)
        lines.append(f"confusions       {words}")
    return lines


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else label[: LONGEST - 3] + "..."


def class_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    weights: Sequence[float] = (),
    gamma: float = 0.0,
    mixes: bool = False,
) -> torch.Tensor:
    """A classifier's loss summed over this micro-batch and divided by the items of the whole optimizer step.

    Labels `[B]` (int64, one class per row): cross-entropy, an item is a row. Labels `[B, L]` (float, 0 or 1, any number of
    labels per row): binary cross-entropy, an item is a row's yes or no to one label. The losses of transformers' classification
    heads ignore `num_items_in_batch`, so that their gradients grow with the number of micro-batches.

    Args:
        weights: of the classes, for one class per row; the divisor stays the number of rows.
        gamma: of the focal loss `(1 - p)^gamma * -log p` (Lin et al. 2017, arXiv 1708.02002), for one class per row.
        mixes: whether labels `[B, L]` are shares of the classes of a row, which add up to 1: their cross-entropy, an item is a
            row.
    """
    import torch

    if mixes and labels.is_floating_point():
        total = mixed_nll(outputs["logits"], labels, weights).sum()
        count = len(labels) if num_items_in_batch is None else num_items_in_batch / labels.shape[1]
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)
    nll = class_nll(outputs["logits"], labels)
    if gamma:
        nll = (1 - torch.exp(-nll)).pow(gamma) * nll
    if weights:
        nll = nll * torch.tensor(weights, dtype=nll.dtype, device=nll.device)[labels]
    total = nll.sum()
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def mixed_nll(logits: torch.Tensor, shares: torch.Tensor, weights: Sequence[float] = ()) -> torch.Tensor:
    """The cross-entropy of each row `[B]` (nats), from logits and the shares of its classes, `[B, L]` each."""
    import torch

    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    of_classes = -logits.log_softmax(-1) * shares.to(logits.dtype)
    if weights:
        of_classes = of_classes * torch.tensor(weights, dtype=logits.dtype, device=logits.device)
    return of_classes.sum(1)


def class_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each row `[B]` (nats), in at least float32, from logits `[B, L]`; with several labels summed over them."""
    from torch.nn import functional

    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if labels.is_floating_point():
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(1)
    return functional.cross_entropy(logits, labels, reduction="none")


def predicted_classes(logits: torch.Tensor, rare: tuple[int, float] | None = None) -> torch.Tensor:
    """The class of each row `[B]` from logits `[B, L]`: the most probable one.

    Args:
        rare: the place of a class that is predicted where its probability is above a threshold, and nowhere else.
    """
    import torch

    if rare is None:
        return logits.argmax(-1)
    place, threshold = rare
    is_it = torch.arange(logits.shape[-1], device=logits.device) == place
    others = logits.masked_fill(is_it, float("-inf")).argmax(-1)
    exact = logits.double() if not logits.is_mps else logits.float()  # a threshold may be close to 0 or to 1
    return torch.where(exact.softmax(-1)[:, place] > threshold, place, others)


def class_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    thresholds: np.ndarray | None = None,
    rare: tuple[int, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row: summed loss and items, `[B, 2]`; and the true and predicted labels.

    These are the class and that of `predicted_classes` (int64 `[B, 2]`); with several labels (int8 `[B, L]`) 2 where a label
    is true plus 1 where it is predicted, with a probability above its threshold (`[L]`; by default one half).
    """
    import torch

    nll = class_nll(logits, labels)
    sums = torch.stack([nll, torch.full_like(nll, labels.numel() / max(1, len(labels)))], dim=1)
    sums = sums.to(torch.float64 if not nll.is_mps else nll.dtype)
    if labels.is_floating_point():
        above = 0.0 if thresholds is None else torch.as_tensor(as_logits(thresholds), dtype=logits.dtype, device=logits.device)
        return sums, (2 * (labels > 0.5) + (logits > above)).to(torch.int8)
    return sums, torch.stack([labels, predicted_classes(logits, rare)], dim=1)
