"""The body of a model, taken apart: its blocks, its final norm, and the shorter model that ends after some of the blocks.

From a loaded classifier and its rows to features and a body cut at the best layer: what the `head` strategy does first."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hfstrat.data import cache
from hfstrat.errors import UserError
from hfstrat.models.blocks import find_blocks, keep_in_config
from hfstrat.strategies.frozen.states import digest_of_rows, digest_of_weights, surroundings
from hfstrat.strategies.head import select_layer
from hfstrat.strategies.head.features import BATCH_TOKENS, extract
from hfstrat.trainer.collective import exhaust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfstrat.trainer.train_data import TrainData


PROBE_TOKENS = 7


TOLERANCE = 1e-2  # of the largest value; bodies in 16 bits round their norms


@dataclass(frozen=True)
class Body:
    """A body and its parts. `norm` is what stands between the last block and the body's output; None where nothing does."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    norm: nn.Module | None

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the body would put out if it ended with these hidden states."""
        return hidden if self.norm is None else self.norm(hidden)


def hidden_of(given: Any) -> torch.Tensor:
    """A block's hidden states; some families give a tuple."""
    return given[0] if isinstance(given, tuple) else given


@torch.no_grad()
def take_apart(model: PreTrainedModel) -> Body:
    """Find the parts of a body, and prove on a few tokens that its output is that of its last block, normed or as it is.

    Raises:
        UserError: a body whose output comes about in another way.
    """
    found = find_blocks(model)
    name = type(model).__name__
    if found is None:
        raise UserError(f"strategy: {name} is no plain stack of blocks, so it cannot be cut at a layer; take partial or lora")
    blocks = found.modules
    last: list[torch.Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda module, args, given: last.append(hidden_of(given)))
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        output = model(input_ids=torch.arange(3, 3 + PROBE_TOKENS, device=device)[None]).last_hidden_state
        if near(last[-1], output):
            return Body(model, blocks, None)
        for norm in norms(model, blocks):
            if near(norm(last[-1]), output):
                return Body(model, blocks, norm)
    finally:
        hook.remove()
        model.train(was_training)
    raise UserError(f"strategy: the output of {name} is not that of its last block, normed or plain; take partial or lora")


def norms(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """Modules outside of the blocks that may be a final norm."""
    inside = {id(m) for m in blocks.modules()}
    return [m for m in model.modules() if id(m) not in inside and "norm" in type(m).__name__.lower()]


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def cut(body: Body, layer: int) -> Body:
    """The same body, in place, without the blocks after the first `layer`; its config says so too."""
    depth, config = body.depth, body.model.config
    del body.blocks[layer:]
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        keep_in_config(part, depth, list(range(layer)))
    return body


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
    table: list[select_layer.Candidate]
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
    body: Body, feed: TrainData, classes: int, several: bool, layer: int | str, poolings: Sequence[str], seed: int
) -> Pooled:
    """Run the body once over all rows, or take what it said before from the cache.

    Where there is a choice, a part of the training rows goes through the whole body and decides it; all others stop at the
    chosen layer.

    Args:
        layer: a number from 1, or auto.
        poolings: one, or those to choose from.
    """
    started = time.monotonic()
    layers = select_layer.candidate_layers(body.depth, layer)
    labels = labels_of(feed.train, classes, several)
    inputs = {
        "weights": digest_of_weights(body.model),
        "rows": [digest_of_rows(rows, np.arange(len(rows))) for rows in (feed.train, feed.eval)],
        **surroundings(feed, body.model, feed.dtype),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest() if len(layers) * len(poolings) > 1 else "",
        "spec": [layers, list(poolings), BATCH_TOKENS, seed, select_layer.MOST_ROWS],
    }
    built: list[bool] = []

    def build(target: Path | None) -> Any:
        built.append(True)
        return _build(target, body, feed, labels, classes, layers, poolings, seed)

    count = len(feed.train) + len(feed.eval)
    words = f"pooled features of {count:,} rows, {type(body.model).__name__}"
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
        labels_of(feed.eval, classes, several),
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
    """Write the features of all rows, training rows first; returns what was chosen, and from what."""
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
        for line in select_layer.lines(table, probed.best, len(probed.places)):
            feed.say(line)
    blocks = list(body.blocks)
    del body.blocks[layer:]  # the others need not be computed
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
