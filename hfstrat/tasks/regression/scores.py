"""Errors and correlations of predicted numbers, as functions of how often each example counts. Numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hfstrat.tasks.base import Score

DRAWN_TARGETS, DRAWN_POINTS = 4, 200  # whose targets and predictions the report keeps, spread over the evaluation examples


def score_of(sums: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> Score:
    """The metrics as a function of weights `[examples]`, from squared errors with items `[examples, 2]`, and targets and
    predictions `[examples, targets]`; means over targets."""
    sums, ranks = sums.astype(np.float64), [[_order(each) for each in both.T] for both in (true, predicted)]
    error = true - predicted

    def score(weights: np.ndarray) -> dict[str, float]:
        squared, items = weights @ sums
        total = weights.sum()
        pairs = range(true.shape[1])
        return {
            "loss": float(squared / max(items, 1)),
            "mae": float((weights @ np.abs(error) / total).mean()),
            "rmse": float(np.sqrt(weights @ np.square(error) / total).mean()),
            "pearson": float(np.mean([correlation(true[:, k], predicted[:, k], weights) for k in pairs])),
            "spearman": float(
                np.mean([correlation(_ranks(*ranks[0][k], weights), _ranks(*ranks[1][k], weights), weights) for k in pairs])
            ),
        }

    return score


def correlation(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's correlation of weighted values; 0 where one of them is constant, as it predicts nothing."""
    total = weights.sum()
    one, other = (values - weights @ values / total for values in (one, other))
    spread = np.sqrt((weights @ np.square(one)) * (weights @ np.square(other)))
    return float(weights @ (one * other) / spread) if spread > 0 else 0.0


def _order(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The number of each value among the different ones in ascending order, and how many there are."""
    different, number = np.unique(values, return_inverse=True)
    return number, len(different)


def _ranks(number: np.ndarray, count: int, weights: np.ndarray) -> np.ndarray:
    """The rank of each example where it counts `weights` times; equal values have the mean of their ranks."""
    sizes = np.bincount(number, weights, count)
    ends: np.ndarray = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[number]


def by_target(true: np.ndarray, predicted: np.ndarray, names: tuple[str, ...], mean: np.ndarray | None) -> dict[str, Any]:
    """The metrics of each target, and the errors of always predicting the mean of the training targets, the baseline."""
    weights, table = np.ones(len(true)), list[dict[str, Any]]()
    for k, name in enumerate(names):
        squared = np.square(true[:, k] - predicted[:, k])[:, None]
        values = score_of(np.hstack([squared, np.ones_like(squared)]), true[:, [k]], predicted[:, [k]])(weights)
        table.append({"target": name} | {key: value for key, value in values.items() if key != "loss"})
        if k < DRAWN_TARGETS:
            places = np.unique(np.linspace(0, len(true) - 1, min(DRAWN_POINTS, len(true))).astype(int))
            table[-1]["points"] = np.stack([true[places, k], predicted[places, k]], 1).tolist()
    details: dict[str, Any] = {"targets": table}
    if mean is not None:
        error = true - mean
        details["baseline"] = {
            "mae": float(np.abs(error).mean(0).mean()),
            "rmse": float(np.sqrt(np.square(error).mean(0)).mean()),
        }
    return details


def lines_of(details: dict[str, Any]) -> list[str]:
    """The baseline, and the metrics of each target where there are several."""
    lines = []
    if baseline := details.get("baseline"):
        lines.append(
            f"baseline         MAE {baseline['mae']:.4g}, RMSE {baseline['rmse']:.4g} by always predicting the training mean"
        )
    table = details.get("targets", [])
    for row in table if len(table) > 1 else ():
        values = f"MAE {row['mae']:.4g}, RMSE {row['rmse']:.4g}, Pearson {row['pearson']:.3f}, Spearman {row['spearman']:.3f}"
        lines.append(f"target           {row['target']}: {values}")
    return lines
