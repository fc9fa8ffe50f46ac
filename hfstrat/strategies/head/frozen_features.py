"""The outputs of a linear head on the features of the pretrained body, as a baseline of strategies that train the body."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hfstrat.data.splits import column
from hfstrat.models.load import forward_operations
from hfstrat.strategies.head.features import extract
from hfstrat.strategies.head.heads import body_of
from hfstrat.strategies.head.linear import leave_one_out, solve, targets_of
from hfstrat.strategies.head.pooled import score

if TYPE_CHECKING:
    from hfstrat.models.load import Base
    from hfstrat.trainer.train_data import TrainData

MOST_ROWS = 5000
OPERATIONS = {"cpu": 1e13, "gpu": 1e15}  # on the CPU about ten seconds for the training examples
LEAST_ROWS = 8
SEED = 42


def sample(base: Base, data: TrainData) -> np.ndarray:
    """The indices of the training examples to solve the head on: as many as fit into some seconds, in random order."""
    lengths = column(data.train, "length")
    tokens = OPERATIONS["cpu" if data.device.type == "cpu" else "gpu"] / forward_operations(base.model)
    order = np.random.default_rng(SEED).permutation(len(lengths))[:MOST_ROWS]
    return np.sort(order[: max(LEAST_ROWS, int(np.searchsorted(np.cumsum(lengths[order]), tokens)))])


def outputs(base: Base, data: TrainData, classes: int) -> tuple[torch.Tensor, int]:
    """The head's outputs for the evaluation examples `[n, K]` (in units of the targets where these are numbers), and the number
    of training examples; on the pooling that predicts these best.

    All processes of a run have to call it. Raises UserError: a body whose last hidden states cannot be found.
    """
    body = body_of(base, data)
    places, units = sample(base, data), data.collate.units
    if not base.quantized:
        base.model.to(data.device)
    labels = data.collate.encode_labels([data.train[int(place)]["label"] for place in places])
    poolings = body.poolings
    found = extract(body, data.train, places, data.collate, [body.depth], poolings, data.dtype, data.group)[:, 0]
    targets, numbers = targets_of(labels, classes), units is not None
    scores = [score(leave_one_out(found[:, i], targets, numbers), targets, numbers) for i in range(len(poolings))]
    best = int(np.argmax(scores))
    layer, _ = solve(found[:, best], labels, classes, None, True, units, SEED)
    every = np.arange(len(data.eval))
    tested = extract(body, data.eval, every, data.collate, [body.depth], [poolings[best]], data.dtype, data.group)
    return layer.logits(tested[:, 0, 0]), len(places)
