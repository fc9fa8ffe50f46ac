"""One forward pass before anything is written: a model that cannot run, or that padding changes, is refused in a sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfstrat.errors import OUT_OF_MEMORY, UserError, first_line, named
from hfstrat.models.blocks import evaluating
from hfstrat.tasks.verify import tolerance, untrained_logits


def first_forward(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype, name: str) -> torch.Tensor:
    """The logits of the untrained model for the inputs of the probe.

    Args:
        dtype: of the forward pass.
        name: of the model, for messages.

    Raises:
        UserError: the forward pass fails, or the output for a text depends on the padding of its batch.
    """
    with evaluating(model):
        try:
            logits: torch.Tensor = untrained_logits(model, inputs, dtype)
        except Exception as error:  # the code of a family can fail in any way
            if named(error).code == OUT_OF_MEMORY:
                raise
            raise UserError(_failed(name, error, dtype)) from error
        if logits.dim() == 2 and "attention_mask" in inputs:
            _check_padding(model, inputs, dtype, name, logits)
    return logits


def _failed(name: str, error: Exception, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    cure = "set model.dtype: float32, or choose" if dtype != torch.float32 else "choose"
    return (
        f"model.name_or_path: {name}: the forward pass of this model fails in the installed transformers, in {kind} "
        f"({type(error).__name__}: {first_line(error)[:200]}); {cure} another model"
    )


def _check_padding(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype, name: str, logits: torch.Tensor) -> None:
    """Refuse a model of texts that does not mask padding, such as FNet: its results would depend on the batch."""
    lengths = inputs["attention_mask"].sum(-1).tolist()
    row = lengths.index(min(lengths))
    if lengths[row] == inputs["attention_mask"].shape[1]:
        return
    alone = {key: value[row : row + 1, : lengths[row]] for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    single = untrained_logits(model, alone, dtype)[0]
    off, largest = float((single - logits[row]).abs().max()), float(logits.abs().max())
    # of another shape: sums are rounded as differently as on another device
    if off > tolerance(str(dtype).removeprefix("torch."), False) * largest:
        raise UserError(
            f"model.name_or_path: {name}: the outputs of this model for a text change with the padding of its batch (by "
            f"{off:.2g}; the largest is {largest:.2g}): it has no attention mask; expected a model that ignores padding, such "
            "as BERT or ModernBERT"
        )
