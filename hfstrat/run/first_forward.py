"""One forward pass before anything is written: a model that cannot run, or that padding changes, is refused in a sentence."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hfstrat.errors import OUT_OF_MEMORY, UserError, first_line, named
from hfstrat.models.blocks import evaluating
from hfstrat.models.load import Base
from hfstrat.tasks.verify import tolerance, untrained_logits

READS_PADDING = 0.05  # change by padding, as a share of the largest value, from which a model is refused
LARGEST = 10**9  # parameters up to which a body is copied in float32


def first_forward(model: nn.Module, base: Base, inputs: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """The logits of the untrained model for the inputs of the probe.

    Args:
        base: with the model of transformers in it.
        dtype: of the forward pass.

    Raises:
        UserError: the forward pass fails, or the hidden states of a text depend on the padding of its batch.
    """
    with evaluating(model):
        try:
            logits: torch.Tensor = untrained_logits(model, inputs, dtype)
        except Exception as error:  # the code of a family can fail in any way
            if named(error).code == OUT_OF_MEMORY:
                raise
            raise UserError(_failed(base.name_or_path, error, dtype)) from error
        if logits.dim() == 2 and "attention_mask" in inputs:
            _check_padding(model, base, inputs)
    return logits


def _failed(name: str, error: Exception, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    cure = "set model.dtype: float32, or choose" if dtype != torch.float32 else "choose"
    return (
        f"model.name_or_path: {name}: the forward pass of this model fails in the installed transformers, in {kind} "
        f"({type(error).__name__}: {first_line(error)[:200]}); {cure} another model"
    )


@torch.no_grad()
def _check_padding(model: nn.Module, base: Base, inputs: dict[str, Any]) -> None:
    """Refuse a model of texts that reads padding, such as FNet: its results would depend on the batch. Raises UserError.

    Its hidden states are compared, since the outputs of a new head may be zero, and its outputs: XLNet's head reads the last
    position also where it is padding.
    """
    lengths = inputs["attention_mask"].sum(-1).tolist()
    row = lengths.index(min(lengths))
    weights = list(model.parameters())
    is_plain = all(p.is_floating_point() for p in weights) and sum(p.numel() for p in weights) <= LARGEST
    if not is_plain or lengths[row] == inputs["attention_mask"].shape[1]:
        return
    for part, key in ((base.model.base_model, "last_hidden_state"), (model, "logits")):
        exact = all(p.dtype == torch.float32 for p in part.parameters())
        twin = (part if exact else copy.deepcopy(part).float()).eval()  # rounding to 16 bits would hide small differences
        device = next(twin.parameters()).device
        tensors = {key: value.to(device) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        alone = {key: value[row : row + 1, : lengths[row]] for key, value in tensors.items()}
        padded, single = getattr(twin(**tensors), key)[row], getattr(twin(**alone), key)[0]
        padded = padded[: len(single)] if key == "last_hidden_state" else padded
        off, largest = float((single - padded).abs().max()), float(padded.abs().max())
        share = off / largest if largest else 0.0
        if share <= tolerance("float32", True):
            continue
        what = f"what this model computes for a text changes with the padding of its batch ({key} by {share:.2%})"
        if share > READS_PADDING:
            raise UserError(
                f"model.name_or_path: {base.name_or_path}: {what}, so its predictions would depend on the batch; expected a "
                "model that ignores padding, such as BERT or ModernBERT"
            )
        base.say(f"warning: {what}: its convolutions or its approximation of attention read it")
        return
