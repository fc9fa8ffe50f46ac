"""Pooled features of all examples, of the layer and the pooling that predict the labels best.

These are selected by ridge regression on training examples that are held out of each fit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from hfstrat.data import cache
from hfstrat.recipe.format import plural
from hfstrat.strategies.head.features import BATCH_TOKENS, Body, extract
from hfstrat.strategies.head.linear import leave_one_out, targets_of
from hfstrat.tasks.rankings import Ranking, mean_of
from hfstrat.trainer.cached_columns import cache_inputs, digest_of_rows, digest_of_weights, read_column, write_column
from hfstrat.trainer.train_data import TrainData

MOST_ROWS = 2000  # more would resolve differences too small to matter
MOST_BYTES = 256 * 2**20  # of the candidates' features
MOST_LAYERS = 12
DOMINANT = 0.8  # share of the most frequent class, from which accuracy says little about the others


class Candidate(NamedTuple):
    """A layer and a pooling, and the score of ridge regression on held-out examples."""

    layer: int
    pooling: str
    score: float


class Probed(NamedTuple):
    """All candidates, the best of them, its features of the probed examples, `[len(places), H]`, and the name of the score."""

    table: list[Candidate]
    best: Candidate
    places: np.ndarray
    features: torch.Tensor
    metric: str


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


def score(predicted: torch.Tensor, targets: torch.Tensor, numbers: bool = False) -> float:
    """Accuracy, or micro-F1 for several labels per example, since most of these are negative; for `numbers` the mean R^2."""
    if numbers:
        return float((1 - (predicted - targets).square().mean(0) / targets.var(0, correction=0).clamp(min=1e-12)).mean())
    if bool((targets.sum(1) == 1).all()):
        return float((predicted.argmax(1) == targets.argmax(1)).float().mean())
    yes = (predicted > 0).float()
    return float(2 * (yes * targets).sum() / (yes.sum() + targets.sum()).clamp(min=1))


def ranking_score(predicted: torch.Tensor, targets: torch.Tensor) -> float:
    """AUROC, the mean over the classes that occur."""
    found, _ = Ranking(predicted.double().numpy(), targets.double().numpy()).score(np.ones(len(targets)))
    return mean_of(found)


def is_dominated(targets: torch.Tensor) -> bool:
    """Whether nearly all examples have the same one of the classes, `[n, K]`."""
    return bool((targets.sum(1) == 1).all()) and float(targets.mean(0).max()) >= DOMINANT


def metric_of(targets: torch.Tensor, numbers: bool) -> str:
    """The name of the score that selects."""
    return "R^2" if numbers else "AUROC" if is_dominated(targets) else "accuracy"


def probe(
    body: Body, data: TrainData, labels: torch.Tensor, classes: int, layers: Sequence[int], poolings: Sequence[str], seed: int
) -> Probed:
    """Score every layer with every pooling; the best score is selected, on ties the shorter body.

    Args:
        labels: of the training examples, `[n]` or `[n, K]`.
        seed: for sampling, if there are more examples than needed.
    """
    places = sample_rows(len(data.train), len(layers) * len(poolings) * body.width, seed)
    found = extract(body, data.train, places, data.collate, layers, poolings, data.dtype, data.group)
    targets, numbers = targets_of(labels[torch.as_tensor(places)], classes), data.collate.units is not None
    metric = metric_of(targets, numbers)

    def scored(features: torch.Tensor) -> float:
        predicted = leave_one_out(features, targets, numbers)
        return ranking_score(predicted, targets) if metric == "AUROC" else score(predicted, targets, numbers)

    pairs = [(i, j) for i in range(len(layers)) for j in range(len(poolings))]
    table = [Candidate(layers[i], poolings[j], scored(found[:, i, j])) for i, j in pairs]
    best = max(table, key=lambda each: (each.score, -each.layer))
    chosen = found[:, list(layers).index(best.layer), list(poolings).index(best.pooling)]
    return Probed(table, best, places, chosen.clone(), metric)


def probe_lines(table: Sequence[Candidate], best: Candidate, rows: int, metric: str = "accuracy") -> list[str]:
    """The candidates as a small table, with a line for each pooling."""
    layers = sorted({each.layer for each in table})
    lines = [f"{'probe':<9} {metric} of ridge regression on {rows:,} training examples (leave-one-out)"]
    lines.append(f"{'':<9} {'layer':<6}" + "".join(f"{layer:>7}" for layer in layers))
    for pooling in dict.fromkeys(each.pooling for each in table):
        scores = {each.layer: each.score for each in table if each.pooling == pooling}
        lines.append(f"{'':<9} {pooling:<6}" + "".join(f"{scores[layer]:>7.1%}" for layer in layers))
    return [*lines, f"{'probe':<9} chosen: {best.pooling} of layer {best.layer}"]


SLICE = 16_384  # rows whose features are in memory at a time


@dataclass
class Pooled:
    """Features `[n, H]` of the training and evaluation examples, their labels, and the body cut at their layer.

    views: of each training example, one after another: first of all examples the first, and so on.
    """

    body: Body
    layer: int
    pooling: str
    train: torch.Tensor
    eval: torch.Tensor
    train_labels: torch.Tensor
    eval_labels: torch.Tensor
    classes: int
    table: list[Candidate]
    from_cache: bool
    seconds: float
    views: int = 1


def pool_rows(body: Body, data: TrainData, classes: int, layer: int | str, poolings: Sequence[str], seed: int) -> Pooled:
    """Run the body once over all examples, or load the features from the cache.

    If there are several candidates, a part of the training examples runs through the full body to select one; all others stop
    at the selected layer.

    Args:
        layer: a number from 1, or auto.
        poolings: the candidates.
    """
    started, built = time.monotonic(), list[bool]()
    layers = candidate_layers(body.depth, layer)
    labels = data.collate.encode_labels(data.train["label"][:])
    inputs = {
        "weights": digest_of_weights(body.model),
        "rows": [digest_of_rows(rows, np.arange(len(rows))) for rows in (data.train, data.eval)],
        **cache_inputs(data, body.model, data.dtype),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest() if len(layers) * len(poolings) > 1 else "",
        "spec": [layers, list(poolings), BATCH_TOKENS, seed, MOST_ROWS],
    }
    if data.collate.units is None and is_dominated(targets_of(labels, classes)):
        inputs["selected by"] = "AUROC"

    def build(target: Path | None) -> Any:
        built.append(True)
        return _build(target, body, data, labels, classes, layers, poolings, seed)

    views = data.collate.views
    trained = views * len(data.train)
    count = trained + len(data.eval)
    text = f"pooled features of {plural(count, 'example')}, {type(body.model).__name__}"
    entry = data.group.fetch("features", cache.fingerprint(inputs), text, build, needed=4 * count * body.width)
    features, value = read(entry.path, body.width), entry.value
    return Pooled(
        body,
        layer=int(value["layer"]),
        pooling=str(value["pooling"]),
        train=features[:trained],
        eval=features[trained:],
        train_labels=torch.cat([labels] * views),
        eval_labels=data.collate.encode_labels(data.eval["label"][:]),
        classes=classes,
        table=[Candidate(*each) for each in value["table"]],
        from_cache=not built,
        seconds=time.monotonic() - started,
        views=views,
    )


def _build(
    target: Path | None,
    body: Body,
    data: TrainData,
    labels: torch.Tensor,
    classes: int,
    layers: Sequence[int],
    poolings: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Write the features of all examples, training examples first; returns the selected candidate and all of them."""
    body.model.to(data.device)
    known: dict[int, torch.Tensor] = {}
    table: list[Candidate] = []
    layer, pooling = layers[0], poolings[0]
    if len(layers) * len(poolings) > 1:
        probed = probe(body, data, labels, classes, layers, poolings, seed)
        table, layer, pooling = probed.table, probed.best.layer, probed.best.pooling
        known = dict(zip(probed.places.tolist(), probed.features, strict=True))
        for line in probe_lines(table, probed.best, len(probed.places), probed.metric):
            data.say(line)
    blocks = list(body.blocks)
    del body.blocks[layer:]  # the others are not run
    try:
        write(target, _slices(body, data, layer, pooling, known), body.width)
    finally:
        body.blocks.extend(blocks[layer:])
    return {"layer": layer, "pooling": pooling, "table": [list(each) for each in table]}


def _view(collate: Any, number: int) -> Any:
    """The collator of a view of each example; the first one, 0, is the example itself."""
    return lambda rows: collate([{**row, "epoch": number} for row in rows])


def _slices(body: Body, data: TrainData, layer: int, pooling: str, known: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
    none: dict[int, torch.Tensor] = {}
    views = [(data.train, _view(data.collate, number), none) for number in range(1, data.collate.views)]
    for rows, collate, have in ((data.train, data.collate, known), *views, (data.eval, data.collate, none)):
        for start in range(0, len(rows), SLICE):
            places = range(start, min(start + SLICE, len(rows)))
            missing = [place for place in places if place not in have]
            found = torch.empty(len(places), body.width)
            if missing:
                new = extract(body, rows, missing, collate, [layer], [pooling], data.dtype, data.group)
                found[[place - start for place in missing]] = new[:, 0, 0]
            for place in set(places) - set(missing):
                found[place - start] = have[place]
            yield found


def write(target: Path | None, parts: Iterator[torch.Tensor], width: int) -> None:
    """Write features `[rows, width]`, as `write_column` does."""

    def array(part: torch.Tensor) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(part.numpy().reshape(-1), pa.float32()), width)

    write_column(target, "features", pa.list_(pa.float32(), width), map(array, parts))


def read(file: Path, width: int) -> torch.Tensor:
    """All features, `[rows, width]`."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in read_column(file, "features").chunks]
    return torch.from_numpy(np.concatenate(chunks).reshape(-1, width))
