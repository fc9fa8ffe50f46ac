"""Pooled features of all examples, of the layer and the pooling that predict the labels best.

These are selected by ridge regression on training examples that are held out of each fit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hfstrat.data import cache
from hfstrat.strategies.cached_columns import cache_inputs, digest_of_rows, digest_of_weights
from hfstrat.strategies.head.features import BATCH_TOKENS, Body, extract
from hfstrat.strategies.head.linear import leave_one_out, targets_of
from hfstrat.trainer.collective import SINGLE, ProcessGroup, exhaust

if TYPE_CHECKING:
    from hfstrat.trainer.train_data import TrainData

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


def probe_lines(table: Sequence[Candidate], best: Candidate, rows: int, metric: str = "accuracy") -> list[str]:
    """The candidates as a small table, with a line for each pooling."""
    layers = sorted({each.layer for each in table})
    said = [f"{'probe':<9} {metric} of ridge regression on {rows:,} training examples (leave-one-out)"]
    said.append(f"{'':<9} {'layer':<6}" + "".join(f"{layer:>7}" for layer in layers))
    for pooling in dict.fromkeys(each.pooling for each in table):
        scores = {each.layer: each.score for each in table if each.pooling == pooling}
        said.append(f"{'':<9} {pooling:<6}" + "".join(f"{scores[layer]:>7.1%}" for layer in layers))
    return [*said, f"{'probe':<9} chosen: {best.pooling} of layer {best.layer}"]


SLICE = 16_384  # rows whose features are in memory at a time


@dataclass
class Pooled:
    """Features `[n, H]` of the training and evaluation examples, their labels, and the body cut at their layer."""

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


def pool_rows(body: Body, feed: TrainData, classes: int, layer: int | str, poolings: Sequence[str], seed: int) -> Pooled:
    """Run the body once over all examples, or load the features from the cache.

    If there are several candidates, a part of the training examples runs through the full body to select one; all others stop
    at the selected layer.

    Args:
        layer: a number from 1, or auto.
        poolings: the candidates.
    """
    started = time.monotonic()
    layers = candidate_layers(body.depth, layer)
    labels = feed.collate.encode_labels(feed.train["label"][:])
    inputs = {
        "weights": digest_of_weights(body.model),
        "rows": [digest_of_rows(rows, np.arange(len(rows))) for rows in (feed.train, feed.eval)],
        **cache_inputs(feed, body.model, feed.dtype),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest() if len(layers) * len(poolings) > 1 else "",
        "spec": [layers, list(poolings), BATCH_TOKENS, seed, MOST_ROWS],
    }
    built: list[bool] = []

    def build(target: Path | None) -> Any:
        built.append(True)
        return _build(target, body, feed, labels, classes, layers, poolings, seed)

    count = len(feed.train) + len(feed.eval)
    words = f"pooled features of {count:,} examples, {type(body.model).__name__}"
    entry = feed.group.fetch("features", cache.fingerprint(inputs), words, build, needed=4 * count * body.width)
    table = [Candidate(*each) for each in entry.value["table"]]
    features = read(entry.path, body.width)
    return Pooled(
        body,
        int(entry.value["layer"]),
        str(entry.value["pooling"]),
        features[: len(feed.train)],
        features[len(feed.train) :],
        labels,
        feed.collate.encode_labels(feed.eval["label"][:]),
        classes,
        table,
        from_cache=not built,
        seconds=time.monotonic() - started,
    )


def _build(
    target: Path | None,
    body: Body,
    feed: TrainData,
    labels: torch.Tensor,
    classes: int,
    layers: Sequence[int],
    poolings: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Write the features of all examples, training examples first; returns the selected candidate and all of them."""
    device = feed.device
    body.model.to(device)
    known: dict[int, torch.Tensor] = {}
    table: list[Candidate] = []
    layer, pooling = layers[0], poolings[0]
    if len(layers) * len(poolings) > 1:
        probed = probe(body, feed.train, labels, classes, feed.collate, layers, poolings, feed.dtype, seed, group=feed.group)
        table, layer, pooling = probed.table, probed.best.layer, probed.best.pooling
        known = dict(zip(probed.places.tolist(), probed.features, strict=True))
        metric = "accuracy" if feed.collate.units is None else "R^2"
        for line in probe_lines(table, probed.best, len(probed.places), metric):
            feed.say(line)
    blocks = list(body.blocks)
    del body.blocks[layer:]  # the others are not run
    try:
        parts = _slices(body, feed, layer, pooling, known)
        write(target, parts, body.width)
    finally:
        body.blocks.extend(blocks[layer:])
    return {"layer": layer, "pooling": pooling, "table": [list(each) for each in table]}


def _slices(body: Body, feed: TrainData, layer: int, pooling: str, known: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
    for rows, have in ((feed.train, known), (feed.eval, dict[int, torch.Tensor]())):
        for start in range(0, len(rows), SLICE):
            places = range(start, min(start + SLICE, len(rows)))
            missing = [place for place in places if place not in have]
            found = torch.empty(len(places), body.width)
            if missing:
                new = extract(body, rows, missing, feed.collate, [layer], [pooling], feed.dtype, group=feed.group)
                found[[place - start for place in missing]] = new[:, 0, 0]
            for place in set(places) - set(missing):
                found[place - start] = have[place]
            yield found


def write(target: Path | None, parts: Iterator[torch.Tensor], width: int) -> None:
    """Write the features; without a target they are only computed, since another process writes them."""
    import pyarrow as pa

    if target is None:
        exhaust(parts)
        return

    schema = pa.schema([("features", pa.list_(pa.float32(), width))])
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for part in parts:
            flat = pa.array(part.numpy().reshape(-1), pa.float32())
            stream.write_batch(pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, width)], schema=schema))


def read(file: Path, width: int) -> torch.Tensor:
    """All features, `[rows, width]`."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column("features").chunks]
    return torch.from_numpy(np.concatenate(chunks).reshape(-1, width))
