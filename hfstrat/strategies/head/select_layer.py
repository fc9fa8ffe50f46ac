"""Which layer, pooled how, says most about the labels: decided on training rows, each held out of the fit that judges it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hfstrat.strategies.head.bodies import Body
from hfstrat.strategies.head.features import extract
from hfstrat.strategies.head.linear import leave_one_out, targets_of
from hfstrat.trainer.collective import SINGLE, ProcessGroup

MOST_ROWS = 2000  # more would tell smaller differences apart than matter
MOST_BYTES = 256 * 2**20  # of the candidates' features
MOST_LAYERS = 12


class Candidate(NamedTuple):
    """A layer and a pooling, and how well ridge regression tells the labels of rows that it was not shown."""

    layer: int
    pooling: str
    score: float


class Probed(NamedTuple):
    """All candidates, the best of them, and its features of the probed rows: `[len(places), H]`."""

    table: list[Candidate]
    best: Candidate
    places: np.ndarray
    features: torch.Tensor


def candidate_layers(depth: int, wanted: int | str) -> list[int]:
    """The layer asked for; for auto all of them, or twelve evenly spread with the last."""
    if wanted != "auto":
        return [int(wanted)]
    count = min(depth, MOST_LAYERS)
    return sorted({round(depth * (index + 1) / count) for index in range(count)})


def drawn(count: int, numbers: int, seed: int) -> np.ndarray:
    """The rows to probe, of `count`, in order; `numbers` are what the candidates' features of one row take."""
    most = max(64, min(MOST_ROWS, MOST_BYTES // (4 * numbers)))
    return np.sort(np.random.default_rng((seed, 2)).permutation(count)[:most])


def score(said: torch.Tensor, targets: torch.Tensor, numbers: bool = False) -> float:
    """Accuracy; with several labels per row micro-F1, since most of them are absent; for `numbers` the mean R^2."""
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
    told: Callable[[int], None] | None = None,
    group: ProcessGroup = SINGLE,
) -> Probed:
    """Compare every layer with every pooling; the best score wins, and of equal ones the shorter body.

    Args:
        labels: of `rows`, `[n]` or `[n, K]`.
        seed: draws the rows, where there are more than are needed.
    """
    places = drawn(len(rows), len(layers) * len(poolings) * body.width, seed)
    found = extract(body, rows, places, collate, layers, poolings, dtype, told, group)
    targets, numbers = targets_of(labels[torch.as_tensor(places)], classes), collate.units is not None
    table = [
        Candidate(layer, pooling, score(leave_one_out(found[:, i, j], targets, numbers), targets, numbers))
        for i, layer in enumerate(layers)
        for j, pooling in enumerate(poolings)
    ]
    best = max(table, key=lambda each: (each.score, -each.layer))
    chosen = found[:, list(layers).index(best.layer), list(poolings).index(best.pooling)]
    return Probed(table, best, places, chosen.clone())


def lines(table: Sequence[Candidate], best: Candidate, rows: int, metric: str) -> list[str]:
    """The candidates as a small table: a line for each pooling."""
    layers = sorted({each.layer for each in table})
    said = [f"{'probe':<9} {metric} by ridge regression on {rows:,} training rows, each held out of its fit"]
    said.append(f"{'':<9} {'layer':<6}" + "".join(f"{layer:>7}" for layer in layers))
    for pooling in dict.fromkeys(each.pooling for each in table):
        scores = {each.layer: each.score for each in table if each.pooling == pooling}
        said.append(f"{'':<9} {pooling:<6}" + "".join(f"{scores[layer]:>7.1%}" for layer in layers))
    return [*said, f"{'probe':<9} chosen: {best.pooling} of layer {best.layer}"]
