"""The parts of a model: finding its blocks and its classification head, compiling blocks, recomputing their activations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_LAYER = re.compile(r"layer|block")  # names of lists in a config with an entry per layer


class Blocks(NamedTuple):
    """The list of blocks and its name in the model."""

    name: str
    modules: nn.ModuleList


def find_blocks(model: Any) -> Blocks | None:
    """The outermost list of `num_hidden_layers` modules; None if it is not unique.

    Experts, for example, are lists inside of blocks.
    """
    full: Any = getattr(model, "config", None)
    config = full.get_text_config() if hasattr(full, "get_text_config") else full
    depth = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False) or not depth:
        return None
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return Blocks(outer[0], lists[outer[0]]) if len(outer) == 1 else None


def keep_layers_in_config(config: Any, depth: int, keep: list[int]) -> None:
    """Reduce a config of `depth` layers to those in `keep`: their number, and each list with an entry per layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and PER_LAYER.search(name):
            setattr(config, name, type(value)(value[layer] for layer in keep))
    if len(keep) < depth and isinstance(getattr(config, "max_window_layers", None), int):
        config.max_window_layers = min(config.max_window_layers, len(keep))
    config.num_hidden_layers = len(keep)
    if len(getattr(config, "stage_names", None) or ()) == depth + 1:  # of a model that can also be a backbone
        config.stage_names = list(config.stage_names)[: len(keep) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode, and restore the mode of each module afterwards."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in were:
            module.training = training


def keep_statistics(model: nn.Module) -> None:
    """Keep batch norms without trainable weights in evaluation mode whatever the Trainer sets.

    In training mode they would change their running statistics, which are no parameters: an adapter does not save them.
    """
    for module in model.modules():
        if hasattr(module, "running_mean") and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train = MethodType(_stay_still, module)  # type: ignore[method-assign]
            module.training = False


def _stay_still(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def checkpointable(model: nn.Module) -> list[Any]:
    """The modules whose activations transformers can recompute, in order: the blocks of all stacks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # code in a model's repository may be older than that class
    return found or [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and not hasattr(m, "layers")]


def compile_blocks(model: PreTrainedModel) -> str:
    """Compile each block when it first runs, once for each width; returns a line for the user.

    Blocks rather than the model: they share one compiled function, and the code around them need not be traceable. Saved
    weights do not depend on it.
    """
    compiled = checkpointable(model)
    for block in compiled:
        block.compile()  # type: ignore[no-untyped-call]
    if not compiled:
        return "torch_compile: the blocks of this model cannot be identified, so nothing is compiled"
    return (
        f"torch_compile: {len(compiled)} blocks are compiled at the first step of each new width, which may take minutes; "
        "on a CPU with 16-bit autocast this saves no time"
    )


def checkpoint_activations(model: PreTrainedModel, enable: bool) -> None:
    """Recompute activations in the backward pass, in the blocks that have one.

    transformers makes the embeddings' output require gradients. Reentrant checkpointing needs that, and it extends the backward
    pass to all frozen blocks. Checkpointing is not reentrant here, so this is disabled, and blocks before the first trainable
    parameter are not recomputed.
    """
    if not enable:
        return
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    trains_before = any(p.requires_grad for p in input_parameters(model))
    for module in checkpointable(model):
        if getattr(module, "gradient_checkpointing", False):
            trains_before = trains_before or any(p.requires_grad for p in module.parameters())
            module.gradient_checkpointing = trains_before


def input_parameters(model: Any) -> list[Any]:
    """The parameters of the input embeddings; all parameters where transformers does not know which these are."""
    try:
        return list(model.get_input_embeddings().parameters())
    except NotImplementedError:
        return list(model.parameters())


def body_name(model: Any) -> str:
    """The name of the body in a classification model: `base_model_prefix`, or the largest child where the class has no such
    attribute, as Whisper's, whose body is its `encoder`."""
    if hasattr(model, model.base_model_prefix):
        return str(model.base_model_prefix)
    sizes = {name: sum(1 for _ in child.modules()) for name, child in model.named_children()}
    return max(sizes, key=lambda name: sizes[name])


def head_modules(model: Any) -> list[str]:
    """The names of the head's modules in a classification model: those next to the body, and the pooler."""
    body = body_name(model)
    beside = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    inner = getattr(model, body, None)
    within = [f"{body}.pooler"] if getattr(inner, "pooler", None) is not None else []
    return [*beside, *within]


def final_linear(model: Any) -> nn.Linear:
    """The last linear layer of a classifier, whose outputs are the logits. Raises UserError if there is none."""
    body = body_name(model)
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{body}.") and module.out_features == model.config.num_labels
    ]
    if not found:
        raise UserError(f"strategy: {type(model).__name__} has no linear head; use partial or lora")
    return found[-1]
