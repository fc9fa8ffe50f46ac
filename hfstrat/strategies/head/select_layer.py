"""Selects the layer and the pooling that predict the labels best, on training examples that are held out of each fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hfstrat.strategies.head.features import Body, extract
from hfstrat.strategies.head.linear import leave_one_out, targets_of
from hfstrat.trainer.collective import SINGLE, ProcessGroup

MOST_ROWS = 2000  # more would resolve differences too small to matter
MOST_BYTES = 256 * 2**20  # of the candidates' features
MOST_LAYERS = 12


class Candidate(NamedTuple):
    """A layer and a pooling, and the score of ridge regression on held-out examples."""

    layer: int
    pooling: str
    score: float


class Probed(NamedTuple):
    """All candidates, the best of them, and its features of the probed examples: `[len(places), H]`."""

    table: list[Candidate]
    best: Candidate
    places: np.ndarray
    features: torch.Tensor


def candidate_layers(depth: int, wanted: int | str) -> list[int]:
    """The given layer; for auto all of them, or twelve evenly spaced ones including the last."""
    if wanted != "auto":
        return [int(wanted)]
    count = min(depth, MOST_LAYERS)
    return sorted({round(depth * (index + 1) / count) for index in range(count)})


def sample_rows(count: int, numbers: int, seed: int) -> np.ndarray:
    """The indices of examples to probe, out of `count`; `numbers` is the number of feature values of one example."""
    most = max(64, min(MOST_ROWS, MOST_BYTES // (4 * numbers)))
    return np.sort(np.random.default_rng((seed, 2)).permutation(count)[:most])


def score(said: torch.Tensor, targets: torch.Tensor, numbers: bool = False) -> float:
    """Accuracy, or micro-F1 for several labels per example, since most of these are negative; for `numbers` the mean R^2."""
    if numbers:
        return float((1 - (said - targets).square().mean(0) / targets.var(0, correction=0).clamp(min=1e-12)).mean())
    if bool((targets.sum(1) == 1).all()):
        return float((said.argmax(1) == targets.argmax(1)).float().mean())
    yes = (said > 0).float()
    return float(2 * (yes * targets).sum() / (yes.sum() + targets.sum()).clamp(min=1))


def probe(
    body: Body,
    rows: Any,
    labels: torch.Tensor,
    classes: int,
    collate: Any,
    layers: Sequence[int],
    poolings: Sequence[str],
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[int], None] | None = None,
    group: ProcessGroup = SINGLE,
) -> Probed:
    """Score every layer with every pooling; the best score is selected, on ties the shorter body.

    Args:
        labels: of `rows`, `[n]` or `[n, K]`.
        seed: for sampling, if there are more examples than needed.
    """
    places = sample_rows(len(rows), len(layers) * len(poolings) * body.width, seed)
    found = extract(body, rows, places, collate, layers, poolings, dtype, progress, group)
    targets, numbers = targets_of(labels[torch.as_tensor(places)], classes), collate.units is not None
    table = [
        Candidate(layer, pooling, score(leave_one_out(found[:, i, j], targets, numbers), targets, numbers))
        for i, layer in enumerate(layers)
        for j, pooling in enumerate(poolings)
    ]
    best = max(table, key=lambda each: (each.score, -each.layer))
    chosen = found[:, list(layers).index(best.layer), list(poolings).index(best.pooling)]
    return Probed(table, best, places, chosen.clone())


def lines(table: Sequence[Candidate], best: Candidate, rows: int, metric: str = "accuracy") -> list[str]:
    """The candidates as a small table, with a line for each pooling."""
    layers = sorted({each.layer for each in table})
    said = [f"{'probe':<9} {metric} of ridge regression on {rows:,} training examples (leave-one-out)"]
    said.append(f"{'':<9} {'layer':<6}" + "".join(f"{layer:>7}" for layer in layers))
    for pooling in dict.fromkeys(each.pooling for each in table):
        scores = {each.layer: each.score for each in table if each.pooling == pooling}
        said.append(f"{'':<9} {pooling:<6}" + "".join(f"{scores[layer]:>7.1%}" for layer in layers))
    return [*said, f"{'probe':<9} chosen: {best.pooling} of layer {best.layer}"]
