"""The accuracy of a solved head on all rows, from a probe on some of them: its learning curve continued, with an interval.

The error of a classifier falls about as a power of the number of examples (Hestness et al. 2017, arXiv 1712.00409). The power
is fitted to the parts of the probe, between 0 (more rows do not help) and 1/2 (the fastest that is usual). The interval is that
of counts of wrong examples, by the delta method, on the logarithm of the error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

FASTEST = 0.5  # power of the number of examples
NORMAL_80 = 1.2816  # standard deviations to each side that hold 80 % of a normal distribution


class Accuracy(NamedTuple):
    """An accuracy with its 80 % interval."""

    value: float
    low: float
    high: float


def continued(curve: Mapping[int, float], rows: float) -> Accuracy:
    """The accuracy with this number of rows, from accuracies by smaller numbers of them.

    Args:
        curve: each measured on as many examples as its key says.
    """
    counts = np.asarray(sorted(curve), dtype=np.float64)
    # half an example is added to both sides, so that an error of 0 has a logarithm
    wrong = (1 - np.asarray([curve[int(count)] for count in counts])) * counts
    errors = (wrong + 0.5) / (counts + 1)
    deviations = np.sqrt((1 - errors) / (wrong + 0.5))
    more = math.log(max(1.0, rows / counts[-1]))
    power, unsure = fitted(np.log(counts), np.log(errors), deviations)
    center = math.log(errors[-1]) - power * more
    half = NORMAL_80 * math.hypot(float(deviations[-1]), unsure * more)
    low, value, high = (1 - min(1.0, math.exp(center + side * half)) for side in (1, 0, -1))
    return Accuracy(value, low, high)


def fitted(counts: np.ndarray, errors: np.ndarray, deviations: np.ndarray) -> tuple[float, float]:
    """The power by which errors fall, and its standard deviation, from logarithms of counts and of errors."""
    if len(counts) < 2:
        return FASTEST / 2, FASTEST / 4
    weights = 1 / deviations**2
    middle = float(np.average(counts, weights=weights))
    spread = float((weights * (counts - middle) ** 2).sum())
    power = -float((weights * (counts - middle) * errors).sum()) / spread
    # a small probe says little: it is combined with what is usual
    usual, known = FASTEST / 2, 1 / (1 + 1 / (spread * (FASTEST / 4) ** 2))
    return min(FASTEST, max(0.0, known * power + (1 - known) * usual)), math.sqrt(known / spread)
