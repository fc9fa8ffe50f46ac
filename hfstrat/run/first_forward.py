"""One forward pass before anything is written: a model that cannot run, or that padding changes, is refused in a sentence."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hfstrat.errors import OUT_OF_MEMORY, UserError, first_line, named
from hfstrat.models.blocks import evaluating
from hfstrat.tasks.verify import tolerance, untrained_logits

LARGEST = 10**9  # parameters up to which a body is copied in float32


def first_forward(model: nn.Module, base: Any, inputs: dict[str, Any], dtype: torch.dtype, name: str) -> torch.Tensor:
    """The logits of the untrained model for the inputs of the probe.

    Args:
        base: the model of transformers in it.
        dtype: of the forward pass.
        name: of the model, for messages.

    Raises:
        UserError: the forward pass fails, or the hidden states of a text depend on the padding of its batch.
    """
    with evaluating(model):
        try:
            logits: torch.Tensor = untrained_logits(model, inputs, dtype)
        except Exception as error:  # the code of a family can fail in any way
            if named(error).code == OUT_OF_MEMORY:
                raise
            raise UserError(_failed(name, error, dtype)) from error
        if logits.dim() == 2 and "attention_mask" in inputs:
            _check_padding(base.base_model, inputs, name)
    return logits


def _failed(name: str, error: Exception, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    cure = "set model.dtype: float32, or choose" if dtype != torch.float32 else "choose"
    return (
        f"model.name_or_path: {name}: the forward pass of this model fails in the installed transformers, in {kind} "
        f"({type(error).__name__}: {first_line(error)[:200]}); {cure} another model"
    )


@torch.no_grad()
def _check_padding(body: Any, inputs: dict[str, Any], name: str) -> None:
    """Refuse an encoder that reads padding, such as FNet: its results would depend on the batch. Raises UserError."""
    lengths = inputs["attention_mask"].sum(-1).tolist()
    row = lengths.index(min(lengths))
    if lengths[row] == inputs["attention_mask"].shape[1] or sum(p.numel() for p in body.parameters()) > LARGEST:
        return
    exact = all(p.dtype == torch.float32 for p in body.parameters())
    twin = (body if exact else copy.deepcopy(body).float()).eval()  # rounding to 16 bits would hide small differences
    device = next(twin.parameters()).device
    tensors = {key: value.to(device) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    padded = twin(**tensors).last_hidden_state[row, : lengths[row]]
    alone = {key: value[row : row + 1, : lengths[row]] for key, value in tensors.items()}
    off, largest = float((twin(**alone).last_hidden_state[0] - padded).abs().max()), float(padded.abs().max())
    if off > tolerance("float32", False) * largest:
        raise UserError(
            f"model.name_or_path: {name}: the hidden states of this model for a text change with the padding of its batch (by "
            f"{off:.2g}; the largest is {largest:.2g}), so its predictions would depend on the batch; expected a model that "
            "ignores padding, such as BERT or ModernBERT"
        )
