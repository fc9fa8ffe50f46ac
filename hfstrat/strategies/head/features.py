"""The body of a model split into its parts, and pooled hidden states of several layers in one forward pass.

No hidden states are stored. The *normed* output of the body cut at each layer is pooled, which is the output of the shorter
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hfstrat.data.splits import column
from hfstrat.errors import UserError
from hfstrat.models.blocks import evaluating, find_blocks, keep_layers_in_config
from hfstrat.models.pooling import pool
from hfstrat.trainer.collective import SINGLE, ProcessGroup

PROBE_TOKENS = 7
TOLERANCE = 1e-2  # share of the largest value; 16-bit bodies round their norms


@dataclass(frozen=True)
class Body:
    """A body and its parts; `norm` is between the last block and the output, None if there is none."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    norm: nn.Module | None

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Numbers of a feature vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def poolings(self) -> tuple[str, ...]:
        """The ways in which its hidden states may be pooled."""
        return POOLINGS

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the body if it ended with these hidden states."""
        return hidden if self.norm is None else self.norm(hidden)

    def features(self, inputs: dict[str, torch.Tensor], layers: Sequence[int], poolings: Sequence[str]) -> torch.Tensor:
        """The pooled outputs of the body cut at each layer, `[B, len(layers), len(poolings), H]`, float32 on the CPU."""
        mask = inputs["attention_mask"]
        found = torch.empty(len(mask), len(layers), len(poolings), self.width)

        def keep(index: int, given: Any) -> None:
            hidden = self.end(hidden_of(given))
            found[:, index] = torch.stack([pool(hidden, mask, name) for name in poolings], dim=1).cpu()

        with ExitStack() as hooks:
            for index, layer in enumerate(layers):
                hook = self.blocks[layer - 1].register_forward_hook(lambda _, args, given, at=index: keep(at, given))
                hooks.enter_context(hook)
            self.model(**inputs)
        return found


def hidden_of(given: Any) -> torch.Tensor:
    """The hidden states of a block's output, which is a tuple in some families."""
    return given[0] if isinstance(given, tuple) else given


@torch.no_grad()
def split_body(model: PreTrainedModel) -> Body:
    """The parts of a body; checks on a few tokens that its output is that of its last block, with or without a norm.

    Raises UserError: a body whose output is computed in another way.
    """
    found, name = find_blocks(model), type(model).__name__
    if found is None:
        raise UserError(f"strategy: {name} is not a stack of blocks, so it cannot be cut at a layer; use partial or lora")
    last: list[torch.Tensor] = []
    hook = found.modules[-1].register_forward_hook(lambda module, args, given: last.append(hidden_of(given)))
    with hook, evaluating(model):
        ids = torch.arange(3, 3 + PROBE_TOKENS, device=next(model.parameters()).device)
        output = model(input_ids=ids[None]).last_hidden_state
        for norm in (None, *norms(model, found.modules)):
            body = Body(model, found.modules, norm)
            if last and near(body.end(last[-1]), output):  # a block that is not called as a module is not seen
                return body
    raise UserError(
        f"strategy: the output of {name} is not that of its last block, with or without a norm; use partial or lora"
    )


def norms(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """Modules outside of the blocks that may be the final norm."""
    inside = {id(m) for m in blocks.modules()}
    return [m for m in model.modules() if id(m) not in inside and "norm" in type(m).__name__.lower()]


def check_depth(layer: int | str, depth: int) -> None:
    """Refuse a layer beyond the last. Raises UserError."""
    if isinstance(layer, int) and layer > depth:
        raise UserError(f"strategy.layer: given {layer}, but this model has {depth} layers")


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def cut(body: Body, layer: int) -> Body:
    """Remove the blocks after the first `layer`, in place, also from the config."""
    depth, config = body.depth, body.model.config
    if layer == depth:
        return body
    del body.blocks[layer:]
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        keep_layers_in_config(part, depth, list(range(layer)))
    return body


POOLINGS = ("mean", "last", "first")
BATCH_TOKENS = 2048  # per CPU batch, padding included: MiniLM and SmolLM2 are slower with 512 and with 8,192
GPU_BATCH_TOKENS = 32_768
INPUTS = (  # of a body; the rest of a batch is for the loss
    *("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_features", "input_values"),
)
Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def extract(
    body: Body,
    rows: Any,
    places: Sequence[int] | np.ndarray,
    collate: Collate,
    layers: Sequence[int],
    poolings: Sequence[str],
    dtype: torch.dtype,
    group: ProcessGroup = SINGLE,
) -> torch.Tensor:
    """Features of examples, `[len(places), len(layers), len(poolings), H]`, float32 on the CPU.

    Args:
        rows: prepared examples, with `length`.
        places: their indices, in the order of the result.
        collate: from a list of examples to inputs of the body.
        layers: numbers of the blocks, from 1.
        dtype: of the forward pass.
        group: the processes that share the batches; all of them get all features.
    """

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return body.features(inputs, layers, poolings)

    return _run(body.model, rows, places, collate, dtype, group, run)


def extract_inputs(
    model: Any, layer: torch.nn.Module, rows: Any, collate: Collate, dtype: torch.dtype, group: ProcessGroup = SINGLE
) -> torch.Tensor:
    """The inputs of a layer of the full model, `[rows, H]`, float32: for classes with a pooling of their own."""

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        taken: list[torch.Tensor] = []
        with layer.register_forward_pre_hook(lambda module, args: taken.append(args[0])):
            model(**inputs)
        return taken[0].float().cpu()

    return _run(model, rows, range(len(rows)), collate, dtype, group, run)


def _run(
    model: Any,
    rows: Any,
    places: Sequence[int] | np.ndarray,
    collate: Collate,
    dtype: torch.dtype,
    group: ProcessGroup,
    run: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> torch.Tensor:
    """The results of `run` for the inputs of all batches, `[len(places), ...]`."""
    device = next(model.parameters()).device
    lengths = column(rows, "length")[np.asarray(places, dtype=np.int64)]
    groups = list(batches(lengths, GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS))

    def one(batch: list[int]) -> torch.Tensor:
        inputs = collate([rows[int(places[index])] for index in batch])
        return run({name: value.to(device) for name, value in inputs.items() if name in INPUTS})

    model.eval()
    found = torch.empty(0)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch, made in zip(groups, group.each(groups, one, for_all=True), strict=True):
            if not len(found):
                found = torch.empty(len(places), *made.shape[1:])
            found[batch] = made
    return found


def batches(lengths: np.ndarray, budget: int) -> Iterator[list[int]]:
    """Groups of similar length, longest first, of at most `budget` tokens with their padding."""
    batch: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
