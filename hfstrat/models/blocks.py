"""The blocks of a transformer: which modules they are, and what is done to each of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_LAYER = re.compile(r"layer|block")  # names of configuration lists that speak of layers


class Blocks(NamedTuple):
    """The list of blocks and its name in the model."""

    name: str
    modules: nn.ModuleList


def find_blocks(model: Any) -> Blocks | None:
    """The one list of modules as long as the config says the model is deep, and in no other such list.

    None where nobody can tell which it is. (Experts and the like are lists inside of blocks.)
    """
    whole: Any = getattr(model, "config", None)
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    depth = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False) or not depth:
        return None
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return Blocks(outer[0], lists[outer[0]]) if len(outer) == 1 else None


def keep_in_config(config: Any, depth: int, keep: list[int]) -> None:
    """Say in a config of `depth` layers that only these are left: their number, and each list with an entry for every layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and PER_LAYER.search(name):
            setattr(config, name, type(value)(value[layer] for layer in keep))
    if len(keep) < depth and isinstance(getattr(config, "max_window_layers", None), int):
        config.max_window_layers = min(config.max_window_layers, len(keep))
    config.num_hidden_layers = len(keep)


def checkpointable(model: nn.Module) -> list[Any]:
    """What transformers can checkpoint, one by one, in order: the blocks of every stack that there is."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # code that comes with a model may be older than that class
    return found or [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and not hasattr(m, "layers")]


def compile_blocks(model: PreTrainedModel) -> str:
    """Have each block compiled when it first runs, all of them once for each width; returns what to expect, in words.

    Blocks rather than the whole model: they share one compiled function, and nothing around them has to be traceable.
    What is saved knows nothing of it.
    """
    compiled = checkpointable(model)
    for block in compiled:
        block.compile()  # type: ignore[no-untyped-call]
    if not compiled:
        return "torch_compile: no block of this model can be told apart, so nothing is compiled"
    return (
        f"torch_compile: {len(compiled)} blocks are compiled at the first step of each new width, which takes up to minutes; "
        "on a CPU under 16-bit autocast it gains nothing"
    )


def checkpoint_activations(model: PreTrainedModel, enable: bool) -> None:
    """Recompute activations in the backward pass, in the blocks that have one.

    transformers makes the embeddings' output require gradients, which reentrant checkpointing needs and which drags
    the backward pass through every frozen block. Checkpointing here is not reentrant, so that is taken back, and
    blocks before the first learning parameter are left alone.
    """
    if not enable:
        return
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    learns_before = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    for module in checkpointable(model):
        if getattr(module, "gradient_checkpointing", False):
            learns_before = learns_before or any(p.requires_grad for p in module.parameters())
            module.gradient_checkpointing = learns_before
