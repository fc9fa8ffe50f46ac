"""Probabilities above which labels are predicted, chosen on held-out examples: each of several labels, for F1; or a rare class,
for a precision. numpy only.

For F1 one half is too high where a label is rare: the optimum is half of the best F1 (Lipton et al. 2014, arXiv 1402.1892).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

KEY = "label_thresholds"  # of a model's config: the threshold of each label by its name; with one class, that of the rare one
DEFAULT = 0.5
FEW = 5  # positive examples of a label; with fewer, one threshold is chosen for all such labels together
LEAST, MOST = 0.01, 0.99


def choose(chances: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The threshold of each label, `[L]`, with the highest F1 on these examples.

    Args:
        chances: probabilities, `[n, L]`.
        true: whether an example has a label, `[n, L]`.
    """
    true = np.asarray(true, dtype=bool)
    found, rare = np.full(chances.shape[1], DEFAULT), true.sum(0) < FEW
    for label in np.flatnonzero(~rare):
        found[label] = best(chances[:, label], true[:, label])
    if true[:, rare].sum() >= FEW:
        found[rare] = best(chances[:, rare].ravel(), true[:, rare].ravel())
    return found


def best(chances: np.ndarray, true: np.ndarray) -> float:
    """The threshold with the highest F1 of one label, halfway between two probabilities; the one nearest to 0.5 on ties.

    Args:
        chances, true: `[n]`.
    """
    order = np.argsort(-chances, kind="stable")
    sorted_chances, hits = chances[order].astype(np.float64), np.cumsum(true[order])
    calls = np.arange(1, len(order) + 1)
    f1 = 2 * hits / (calls + hits[-1])
    following = np.append(sorted_chances[1:], 0.0)
    cuts, possible = (sorted_chances + following) / 2, sorted_chances > following
    f1 = np.where(possible, f1, -1.0)
    top = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(np.clip(min(cuts[top], key=lambda cut: abs(cut - DEFAULT)), LEAST, MOST))


def at_precision(chances: np.ndarray, true: np.ndarray, precision: float) -> float | None:
    """The lowest threshold with this precision of one class, halfway between two probabilities; None where there is none.

    Args:
        chances, true: `[n]`.
    """
    order = np.argsort(-chances, kind="stable")
    ordered, hits = chances[order].astype(np.float64), np.cumsum(np.asarray(true, dtype=bool)[order])
    following = np.append(ordered[1:], 0.0)
    is_precise = hits >= precision * np.arange(1, len(order) + 1) - 1e-9  # of rounding
    allowed = np.flatnonzero((ordered > following) & is_precise & (hits > 0))
    if not len(allowed):
        return None
    last = int(allowed[-1])
    return float((ordered[last] + following[last]) / 2)


def rare_of(config: Any, names: Sequence[str]) -> tuple[int, float] | None:
    """The place and the threshold of the class that a config names one for; None where it names none."""
    stored = getattr(config, KEY, None)
    found = [(names.index(name), float(value)) for name, value in stored.items() if name in names] if stored else []
    return found[0] if len(found) == 1 else None


def of_config(config: Any, names: Sequence[str]) -> np.ndarray | None:
    """The thresholds that a config names for these labels, `[L]`; None where it names none."""
    stored = getattr(config, KEY, None)
    if not isinstance(stored, dict):
        return None
    return np.array([float(stored.get(name, DEFAULT)) for name in names])


def as_logits(thresholds: np.ndarray) -> np.ndarray:
    """The logits at which the probabilities are the thresholds."""
    return np.log(thresholds) - np.log1p(-thresholds)
