"""What a frozen body says of whole texts: hidden states of several layers, pooled as they come, in one pass.

No hidden states are kept. What is pooled is the *normed* output of the body cut at each layer, so it is what the shorter
model puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hfstrat.strategies.head.bodies import Body, hidden_of
from hfstrat.trainer.collective import SINGLE, ProcessGroup

POOLINGS = ("mean", "last", "first")
BATCH_TOKENS = 2048  # of a CPU batch, padding included: MiniLM and SmolLM2 are slower with 512 and with 8,192
GPU_BATCH_TOKENS = 32_768
Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """`[B, T, H]` with a right-padded mask `[B, T]` to `[B, H]` in float32.

    mean: over the real tokens; last: the last real token; first: the first (CLS where the tokenizer has one).
    """
    hidden = hidden.float()
    if pooling == "mean":
        weights = mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return hidden[:, 0]


def extract(
    body: Body,
    rows: Any,
    places: Sequence[int] | np.ndarray,
    collate: Collate,
    layers: Sequence[int],
    poolings: Sequence[str],
    dtype: torch.dtype,
    told: Callable[[int], None] | None = None,
    group: ProcessGroup = SINGLE,
) -> torch.Tensor:
    """Features of rows, `[len(places), len(layers), len(poolings), H]`, float32 on the CPU.

    Args:
        rows: tokenised rows, with `input_ids` and `length`.
        places: which of them, in the order of the result.
        collate: makes `input_ids`, `attention_mask` and what else the body takes of a list of rows.
        layers: after which blocks, from 1.
        dtype: of the forward pass.
        told: is given the number of rows done, after each batch.
        group: who shares the batches; all get all features.
    """
    device = next(body.model.parameters()).device
    found = torch.empty(len(places), len(layers), len(poolings), body.width)
    where = {layer: index for index, layer in enumerate(layers)}
    state: dict[str, Any] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, given: Any) -> None:
            hidden = body.end(hidden_of(given))
            pooled = torch.stack([pool(hidden, state["mask"], name) for name in poolings], dim=1)
            state["made"][:, where[layer]] = pooled.cpu()

        return hook

    hooks = [body.blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    body.model.eval()
    budget, done = (GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS), 0
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):

            def one(batch: list[int]) -> torch.Tensor:
                inputs = collate([rows[int(places[index])] for index in batch])
                given = {name: value.to(device) for name, value in inputs.items() if name in INPUTS}
                state["mask"] = given["attention_mask"]
                state["made"] = torch.empty(len(batch), *found.shape[1:])
                body.model(**given)
                return state["made"]

            groups = list(batches(lengths_of(rows, places), budget))
            for batch, made in zip(groups, group.each(groups, one, for_all=True), strict=True):
                found[batch] = made
                done += len(batch)
                if told:
                    told(done)
    finally:
        for hook in hooks:
            hook.remove()
    return found


INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of a body; the rest of a batch is its loss's


def lengths_of(rows: Any, places: Sequence[int] | np.ndarray) -> np.ndarray:
    from hfstrat.data.splits import column

    return column(rows, "length")[np.asarray(places, dtype=np.int64)]


def batches(lengths: np.ndarray, budget: int) -> Iterator[list[int]]:
    """Rows of like length together, longest first, as many as make `budget` tokens with their padding."""
    batch: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def extract_inputs(
    model: Any, layer: torch.nn.Module, rows: Any, collate: Collate, dtype: torch.dtype, group: ProcessGroup = SINGLE
) -> torch.Tensor:
    """What a layer of a whole model is given, `[rows, H]`, float32: for classes that pool in a way of their own."""
    device = next(model.parameters()).device
    taken: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    found: torch.Tensor | None = None
    model.eval()
    budget = GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):

            def one(batch: list[int]) -> torch.Tensor:
                inputs = collate([rows[index] for index in batch])
                model(**{name: value.to(device) for name, value in inputs.items() if name in INPUTS})
                return taken.pop().float().cpu()

            groups = list(batches(lengths_of(rows, range(len(rows))), budget))
            for batch, said in zip(groups, group.each(groups, one, for_all=True), strict=True):
                found = torch.empty(len(rows), said.shape[1]) if found is None else found
                found[batch] = said
    finally:
        hook.remove()
    assert found is not None
    return found
