"""Which layer, pooled how, says most about the labels: decided on training rows, each held out of the fit that judges it."""

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
from hfstrat.strategies.frozen.states import digest_of_rows, digest_of_weights, surroundings
from hfstrat.trainer.collective import exhaust

if TYPE_CHECKING:
    from hfstrat.trainer.feed import Feed

from hfstrat.strategies.head.features import BATCH_TOKENS, Body, Collate, extract
from hfstrat.strategies.head.linear import leave_one_out, targets_of
from hfstrat.trainer.collective import ALONE, Team

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


def score(said: torch.Tensor, targets: torch.Tensor) -> float:
    """Accuracy; of several labels a row micro-F1, since most of their answers are no."""
    if bool((targets.sum(1) == 1).all()):
        return float((said.argmax(1) == targets.argmax(1)).float().mean())
    yes = (said > 0).float()
    return float(2 * (yes * targets).sum() / (yes.sum() + targets.sum()).clamp(min=1))


def probe(
    body: Body,
    rows: Any,
    labels: torch.Tensor,
    classes: int,
    collate: Collate,
    layers: Sequence[int],
    poolings: Sequence[str],
    dtype: torch.dtype,
    seed: int,
    told: Callable[[int], None] | None = None,
    team: Team = ALONE,
) -> Probed:
    """Compare every layer with every pooling; the best score wins, and of equal ones the shorter body.

    Args:
        labels: of `rows`, `[n]` or `[n, K]`.
        seed: draws the rows, where there are more than are needed.
    """
    places = drawn(len(rows), len(layers) * len(poolings) * body.width, seed)
    found = extract(body, rows, places, collate, layers, poolings, dtype, told, team)
    targets = targets_of(labels[torch.as_tensor(places)], classes)
    table = [
        Candidate(layer, pooling, score(leave_one_out(found[:, i, j], targets), targets))
        for i, layer in enumerate(layers)
        for j, pooling in enumerate(poolings)
    ]
    best = max(table, key=lambda each: (each.score, -each.layer))
    chosen = found[:, list(layers).index(best.layer), list(poolings).index(best.pooling)]
    return Probed(table, best, places, chosen.clone())


def lines(table: Sequence[Candidate], best: Candidate, rows: int) -> list[str]:
    """The candidates as a small table: a line for each pooling."""
    layers = sorted({each.layer for each in table})
    said = [f"{'probe':<9} accuracy by ridge regression on {rows:,} training rows, each held out of its fit"]
    said.append(f"{'':<9} {'layer':<6}" + "".join(f"{layer:>7}" for layer in layers))
    for pooling in dict.fromkeys(each.pooling for each in table):
        scores = {each.layer: each.score for each in table if each.pooling == pooling}
        said.append(f"{'':<9} {pooling:<6}" + "".join(f"{scores[layer]:>7.1%}" for layer in layers))
    return [*said, f"{'probe':<9} chosen: {best.pooling} of layer {best.layer}"]


SLICE = 16_384  # rows whose features are in memory at a time


@dataclass
class Pooled:
    """Features `[n, H]` of the training and evaluation rows, their labels, and the body they come from, cut at its layer."""

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


def labels_of(rows: Any, classes: int, several: bool) -> torch.Tensor:
    """`[n]` int64, or `[n, K]` float32 of 0 and 1 where a row may have several."""
    given = rows["label"][:]
    if not several:
        return torch.as_tensor(np.asarray(given), dtype=torch.long)
    marks = torch.zeros(len(given), classes)
    for index, labels in enumerate(given):
        marks[index, labels] = 1.0
    return marks


def pool_rows(
    body: Body, feed: Feed, classes: int, several: bool, layer: int | str, poolings: Sequence[str], seed: int
) -> Pooled:
    """Run the body once over all rows, or take what it said before from the cache.

    Where there is a choice, a part of the training rows goes through the whole body and decides it; all others stop at the
    chosen layer.

    Args:
        layer: a number from 1, or auto.
        poolings: one, or those to choose from.
    """
    started = time.monotonic()
    layers = candidate_layers(body.depth, layer)
    labels = labels_of(feed.train, classes, several)
    inputs = {
        "weights": digest_of_weights(body.model),
        "rows": [digest_of_rows(rows, np.arange(len(rows))) for rows in (feed.train, feed.eval)],
        **surroundings(feed, body.model, feed.dtype),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest() if len(layers) * len(poolings) > 1 else "",
        "spec": [layers, list(poolings), BATCH_TOKENS, seed, MOST_ROWS],
    }
    built: list[bool] = []

    def build(target: Path | None) -> Any:
        built.append(True)
        return _build(target, body, feed, labels, classes, layers, poolings, seed)

    count = len(feed.train) + len(feed.eval)
    words = f"pooled features of {count:,} rows, {type(body.model).__name__}"
    entry = feed.team.fetch("features", cache.fingerprint(inputs), words, build, needed=4 * count * body.width)
    table = [Candidate(*each) for each in entry.value["table"]]
    features = read(entry.path, body.width)
    return Pooled(
        body,
        int(entry.value["layer"]),
        str(entry.value["pooling"]),
        features[: len(feed.train)],
        features[len(feed.train) :],
        labels,
        labels_of(feed.eval, classes, several),
        classes,
        table,
        from_cache=not built,
        seconds=time.monotonic() - started,
    )


def _build(
    target: Path | None,
    body: Body,
    feed: Feed,
    labels: torch.Tensor,
    classes: int,
    layers: Sequence[int],
    poolings: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Write the features of all rows, training rows first; returns what was chosen, and from what."""
    device = feed.device
    body.model.to(device)
    known: dict[int, torch.Tensor] = {}
    table: list[Candidate] = []
    layer, pooling = layers[0], poolings[0]
    if len(layers) * len(poolings) > 1:
        probed = probe(body, feed.train, labels, classes, feed.collate, layers, poolings, feed.dtype, seed, team=feed.team)
        table, layer, pooling = probed.table, probed.best.layer, probed.best.pooling
        known = dict(zip(probed.places.tolist(), probed.features, strict=True))
        for line in lines(table, probed.best, len(probed.places)):
            feed.say(line)
    blocks = list(body.blocks)
    del body.blocks[layer:]  # the others need not be computed
    try:
        parts = _slices(body, feed, layer, pooling, known)
        write(target, parts, body.width)
    finally:
        body.blocks.extend(blocks[layer:])
    return {"layer": layer, "pooling": pooling, "table": [list(each) for each in table]}


def _slices(body: Body, feed: Feed, layer: int, pooling: str, known: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
    for rows, have in ((feed.train, known), (feed.eval, dict[int, torch.Tensor]())):
        for start in range(0, len(rows), SLICE):
            places = range(start, min(start + SLICE, len(rows)))
            missing = [place for place in places if place not in have]
            found = torch.empty(len(places), body.width)
            if missing:
                new = extract(body, rows, missing, feed.collate, [layer], [pooling], feed.dtype, team=feed.team)
                found[[place - start for place in missing]] = new[:, 0, 0]
            for place in set(places) - set(missing):
                found[place - start] = have[place]
            yield found


def write(target: Path | None, parts: Iterator[torch.Tensor], width: int) -> None:
    """Write the features; without a target they are only computed: others write them."""
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
