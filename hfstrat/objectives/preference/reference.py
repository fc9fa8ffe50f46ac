"""The reference of a preference objective: the log-probabilities that the model gives the answers at its start.

They are computed once and cached as a column, so that training needs no second model. The reference is the model to train, in
evaluation mode, before its first step: with a new adapter that is the base model, with a continued one what it continues.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hfstrat.data import cache
from hfstrat.data.splits import column, distinct
from hfstrat.models.blocks import evaluating
from hfstrat.objectives.preference.collate import REFERENCE, split_others
from hfstrat.recipe.format import plural
from hfstrat.tasks.artifact import inner_of
from hfstrat.trainer.cached_columns import (
    WithColumn,
    cache_inputs,
    digest_of_rows,
    digest_of_weights,
    groups_of,
    read_column,
    write_column,
)
from hfstrat.trainer.train_data import TrainData

VERSION = 2  # of the column: increase it where it changes
BYTES = 8  # of a row


def with_reference(model: nn.Module, data: TrainData) -> TrainData:
    """Training and evaluation data with the reference's log-probabilities, from the cache or computed by the model."""
    started, weights, unpacked = time.monotonic(), digest_of_weights(model, trained=True), data.unpacked
    found = {name: _column(model, unpacked, getattr(unpacked, name), weights) for name in ("train", "eval")}
    rows = len(found["train"][0]) + len(found["eval"][0])
    computed = any(is_new for _, is_new in found.values())
    seconds = time.monotonic() - started
    how = f"computed in {seconds:.1f} s" if computed else "loaded from the cache"
    data.say(
        f"{'reference':<9} log-probabilities of {plural(rows, 'row')} by the untrained model, {how}: "
        "training needs no second model"
    )
    data = replace(data, facts={**data.facts, "reference": {"rows": rows, "seconds": seconds, "computed": computed}})
    return data.with_rows(data.collate, found["train"][0], found["eval"][0])


def with_reference_of(model: nn.Module, data: TrainData) -> Any:
    """The evaluation rows with the log-probabilities that this model gives them."""
    return _column(model, data, data.eval, digest_of_weights(model, trained=True))[0]


def _column(model: nn.Module, data: TrainData, rows: Any, weights: str) -> tuple[WithColumn, bool]:
    """The rows with the column, and whether it was computed now."""
    first, which = distinct(rows)
    order = np.lexsort((first, -column(rows, "length")[first]))  # the longest first
    size = data.plan.eval_batch
    inputs = {
        "version": VERSION,
        "weights": weights,
        "rows": digest_of_rows(rows, first, ("row", "text_hash")),
        "batch": size,
        **cache_inputs(data, inner_of(model), data.dtype),
    }
    built: list[bool] = []

    def build(target: Path | None) -> Any:
        built.append(True)
        write_column(target, REFERENCE, pa.list_(pa.float32(), 2), _computed(model, data, rows, first[order], size))

    text = f"log-probabilities of a reference for {plural(len(first), 'row')}"
    entry = data.group.fetch("reference", cache.fingerprint(inputs), text, build, BYTES * len(first))
    values = read_column(entry.path, REFERENCE)
    table = np.concatenate([chunk.flatten().to_numpy().reshape(-1, 2) for chunk in values.chunks])
    places = np.argsort(order)[which]
    return WithColumn(rows, REFERENCE, lambda place: table[place].tolist(), places), bool(built)


def _computed(model: nn.Module, data: TrainData, rows: Any, places: np.ndarray, size: int) -> Iterator[pa.Array]:
    def compute(group: list[int]) -> np.ndarray:
        batch, others = split_others(data.batch([int(place) for place in group], rows))
        with torch.no_grad(), data.autocast():
            logps: torch.Tensor = model(**batch)["logps"]
            if others:  # answers with labels: the second sequences are a batch of their own
                logps = torch.stack([logps, model(**others)["logps"]], dim=1)
        return logps.float().cpu().numpy()

    model.to(data.device)
    with evaluating(model):
        for values in data.each(groups_of(places, size), compute, "computing the reference"):
            yield pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 2)
