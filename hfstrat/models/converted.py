"""Weights that transformers converts when it saves (experts of Mixtral, heads of GPT-NeoX, ...), read back into a model.

`save_pretrained` writes such models with the names and shapes of their original checkpoints; `Trainer` reads a checkpoint's
files as they are, so every key differs. `from_pretrained` knows the way back.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class LoadResult(NamedTuple):
    """What `load_state_dict` returns: keys without a weight, and weights without a key."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def is_converted(model: nn.Module) -> bool:
    """Whether transformers saves this model under other names or shapes than those of its parameters."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return isinstance(model, PreTrainedModel) and bool(get_model_conversion_mapping(model, add_legacy=False))


def load_converted(model: Any, folder: Path) -> LoadResult:
    """Load the weights of a folder that `save_pretrained` wrote, in place, so that an optimizer keeps its parameters.

    The weights are first loaded into a second model of the same class, on the CPU and in a type that holds all types of
    the model's weights, so that nothing is rounded.

    Returns:
        The missing and unexpected keys, as `load_state_dict` names them.
    """
    types = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    widest = reduce(torch.promote_types, types)
    copy, info = type(model).from_pretrained(folder, dtype=widest, output_loading_info=True, local_files_only=True)
    state = copy.state_dict()
    del copy
    found = model.load_state_dict(state, strict=False)
    return LoadResult([*found.missing_keys, *info["missing_keys"]], [*found.unexpected_keys, *info["unexpected_keys"]])
