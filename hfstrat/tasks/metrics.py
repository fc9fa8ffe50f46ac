"""Scores of metrics that are ratios of sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Score = Callable[[np.ndarray], dict[str, float]]
"""From how often each row counts (`[rows]`, numbers of at least 0) to metrics by name."""


def ratios(columns: dict[str, np.ndarray], metrics: Mapping[str, Callable[[dict[str, float]], float]]) -> Score:
    """A score of sums over rows, from columns `[rows]` in float64."""
    names, table = list(columns), np.stack([np.asarray(c, dtype=np.float64) for c in columns.values()], axis=1)

    def score(weights: np.ndarray) -> dict[str, float]:
        sums = dict(zip(names, (weights @ table).tolist(), strict=True))
        return {name: metric(sums) for name, metric in metrics.items()}

    return score
