"""Pooled features of all examples, and the body that they come from, cut at the best layer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfstrat.data import cache
from hfstrat.strategies.frozen.states import cache_inputs, digest_of_rows, digest_of_weights
from hfstrat.strategies.head import select_layer
from hfstrat.strategies.head.features import BATCH_TOKENS, Body, extract
from hfstrat.trainer.collective import exhaust

if TYPE_CHECKING:
    from hfstrat.trainer.train_data import TrainData

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
    table: list[select_layer.Candidate]
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
    layers = select_layer.candidate_layers(body.depth, layer)
    labels = feed.collate.encode_labels(feed.train["label"][:])
    inputs = {
        "weights": digest_of_weights(body.model),
        "rows": [digest_of_rows(rows, np.arange(len(rows))) for rows in (feed.train, feed.eval)],
        **cache_inputs(feed, body.model, feed.dtype),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest() if len(layers) * len(poolings) > 1 else "",
        "spec": [layers, list(poolings), BATCH_TOKENS, seed, select_layer.MOST_ROWS],
    }
    built: list[bool] = []

    def build(target: Path | None) -> Any:
        built.append(True)
        return _build(target, body, feed, labels, classes, layers, poolings, seed)

    count = len(feed.train) + len(feed.eval)
    words = f"pooled features of {count:,} examples, {type(body.model).__name__}"
    entry = feed.group.fetch("features", cache.fingerprint(inputs), words, build, needed=4 * count * body.width)
    table = [select_layer.Candidate(*each) for each in entry.value["table"]]
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
    table: list[select_layer.Candidate] = []
    layer, pooling = layers[0], poolings[0]
    if len(layers) * len(poolings) > 1:
        probed = select_layer.probe(
            body, feed.train, labels, classes, feed.collate, layers, poolings, feed.dtype, seed, group=feed.group
        )
        table, layer, pooling = probed.table, probed.best.layer, probed.best.pooling
        known = dict(zip(probed.places.tolist(), probed.features, strict=True))
        metric = "accuracy" if feed.collate.units is None else "R^2"
        for line in select_layer.lines(table, probed.best, len(probed.places), metric):
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
