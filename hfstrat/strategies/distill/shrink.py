"""A smaller model made of a larger one by removing layers and MLP channels; the other weights are copied.

The channels with the largest mean absolute activation on some training examples are kept, as in Minitron (arXiv 2407.14679).
Only inner channels of the MLPs are removed: a smaller hidden size would change every norm, so that even channels that are
always zero could not be removed without changing the outputs."""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.parameter_names import BLOCK, count_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PreTrainedModel

    from hfstrat.models.load import Base
    from hfstrat.recipe.distill import Shrink
    from hfstrat.recipe.section import Shapes


TOKENS = 4096  # of training examples whose activations are measured
LONGEST = 512  # tokens per example
KEY, WIDTH = "strategy.shrink.intermediate_size", "intermediate_size"


# Llama and similar families; BERT and similar families
INTO = re.compile(r"\.(?:mlp\.(?:gate_proj|up_proj)|intermediate\.dense)\.(?:weight|bias)$")
OUT_OF = re.compile(r"(?:\.mlp\.down_proj|(?<!\.attention)\.output\.dense)\.weight$")


def check_width(wanted: int, config: dict[str, Any], shapes: Shapes) -> None:
    """Refuse an impossible width, as far as it is known from a config and the headers of weights.

    Raises UserError: wider than the model, or an MLP of unknown structure.
    """
    width = config.get(WIDTH)
    if not isinstance(width, int):
        if config:
            raise UserError(_unsupported(config.get("model_type")))
        return
    if wanted > width:
        raise UserError(f"{KEY}: given {wanted}, but this model has {width} channels per layer; expected at most {width}")
    if shapes and not _is_supported(shapes, width):
        raise UserError(_unsupported(config.get("model_type")))


def _unsupported(family: Any) -> str:
    return (
        f"{KEY}: the MLPs of a {family} model are not structured like those of Llama (gate_proj, up_proj, down_proj) "
        "or BERT (intermediate, output); remove it, and set strategy.shrink.layers"
    )


def _is_supported(shapes: Shapes, width: int) -> bool:
    """Whether each block has one matrix with so many input channels, and others with so many output channels."""
    readers = [name for name, shape in shapes.items() if BLOCK.search(name) and OUT_OF.search(name) and shape[-1] == width]
    makers = [name for name, shape in shapes.items() if BLOCK.search(name) and INTO.search(name) and shape[0] == width]
    blocks = {_block(name) for name in shapes if BLOCK.search(name)}
    return len(readers) == len(blocks) and {_block(name) for name in readers} == {_block(name) for name in makers} == blocks


def _block(name: str) -> int:
    match = BLOCK.search(name)
    assert match is not None
    return int(match.group(1))


def most_active_channels(model: PreTrainedModel, rows: Iterable[dict[str, Any]], wanted: int) -> dict[int, torch.Tensor]:
    """For each block the sorted indices of the `wanted` MLP channels with the largest mean absolute activation.

    Args:
        rows: examples with `input_ids`; the first few thousand tokens are run, one example at a time.

    Raises:
        UserError: MLPs of unknown structure.
    """
    import torch

    from hfstrat.models.blocks import evaluating

    config = model.config.get_text_config()
    check_width(wanted, config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})
    activations: dict[int, torch.Tensor] = {}

    def add_up(block: int, args: Any) -> None:
        total = args[0].detach().abs().flatten(0, -2).sum(0, dtype=torch.float64)
        activations[block] = activations.get(block, 0) + total

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if BLOCK.search(f"{name}.") and OUT_OF.search(f".{name}.weight"):
                block = _block(f"{name}.")
                hooks.enter_context(module.register_forward_pre_hook(lambda _, args, at=block: add_up(at, args)))
        seen = 0
        for row in rows:
            ids = torch.as_tensor(row["input_ids"][:LONGEST], device=model.device)[None]
            model.base_model(input_ids=ids)
            seen += ids.numel()
            if seen >= TOKENS:
                break
    order = {block: torch.argsort(total, descending=True, stable=True) for block, total in activations.items()}
    return {block: found[:wanted].sort().values for block, found in order.items()}


def _narrowed_axis(name: str) -> int | None:
    """The axis of a parameter that has an entry per MLP channel."""
    if not BLOCK.search(name):
        return None
    return 0 if INTO.search(name) else -1 if OUT_OF.search(name) else None


def narrow_shapes(shapes: Shapes, wanted: int) -> Shapes:
    """The shapes of the parameters with `wanted` MLP channels."""
    return {
        name: shape if (axis := _narrowed_axis(name)) is None else (wanted, *shape[1:]) if axis == 0 else (*shape[:-1], wanted)
        for name, shape in shapes.items()
    }


def shrink_model(wanted: Shrink, base: Base, rows: Any) -> PreTrainedModel:
    """The smaller model, with a remark on what was removed; channels are selected on `rows`."""
    config = base.model.config.get_text_config()
    keep, channels = layers_to_keep(wanted.layers, config.num_hidden_layers), None
    if wanted.layers is not None:
        base.say(f"student: layers {', '.join(map(str, keep))} of {config.num_hidden_layers}")
    if wanted.intermediate_size is not None:
        channels = most_active_channels(base.model, rows, wanted.intermediate_size)
        base.say(
            f"student: the {wanted.intermediate_size:,} most active of {config.intermediate_size:,} MLP channels per layer"
        )
    return drop_layers(base.model, keep, channels)


def layers_to_keep(wanted: int | list[int] | None, count: int) -> list[int]:
    """The indices of the layers to keep, out of `count`: the given ones, or evenly spaced ones with the first and the last.

    None keeps all of them.

    Raises UserError: more layers than the model has, or an index out of range.
    """
    if wanted is None:
        return list(range(count))
    if isinstance(wanted, int):
        if wanted > count:
            raise UserError(f"strategy.shrink.layers: given {wanted}, but this model has {count}; expected at most {count}")
        return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)] if wanted > 1 else [0]
    if outside := [layer for layer in wanted if not 0 <= layer < count]:
        raise UserError(f"strategy.shrink.layers: there is no layer {outside[0]}; expected numbers from 0 to {count - 1}")
    if sorted(set(wanted)) != wanted:
        raise UserError(f"strategy.shrink.layers: {wanted}: expected each layer once, in ascending order")
    return wanted


def new_names(names: list[str], keep: list[int]) -> dict[str, str]:
    """A map from the name of each kept parameter to its name in the smaller model."""
    places = {layer: place for place, layer in enumerate(keep)}
    found = {}
    for name in names:
        match = BLOCK.search(name)
        if match is None:
            found[name] = name
        elif int(match.group(1)) in places:
            found[name] = f"{name[: match.start(1)]}{places[int(match.group(1))]}{name[match.end(1) :]}"
    return found


def drop_layers(model: PreTrainedModel, keep: list[int], channels: dict[int, torch.Tensor] | None = None) -> PreTrainedModel:
    """A new model with the layers `keep`, and copies of their weights and of everything else; tied weights are tied again.

    Of the MLP channels of each layer those in `channels` are kept, by the layer's old index; all of them if it is None. The
    model is created from its config, so that no module stores the index of its old layer.

    Raises UserError: the smaller config does not describe a model with these layers.
    """
    import torch

    from hfstrat.models.blocks import keep_layers_in_config

    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    keep_layers_in_config(text, text.num_hidden_layers, keep)
    names = new_names(list(model.state_dict()), keep)
    weights = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    if channels is not None:
        text.intermediate_size = len(channels[keep[0]])
        for old, new in names.items():
            if (axis := _narrowed_axis(old)) is not None:
                weights[new] = weights[new].index_select(axis, channels[_block(old)])
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    state = torch.get_rng_state()  # random weights are sampled, only to be overwritten
    smaller: PreTrainedModel = type(model)._from_config(
        config, dtype=dtype, attn_implementation=model.config._attn_implementation
    )
    torch.set_rng_state(state)
    try:
        smaller.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"strategy.shrink: layers of a {model.config.model_type} model cannot be removed: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    smaller.tie_weights()
    if hasattr(model, "generation_config"):
        smaller.generation_config = copy.deepcopy(model.generation_config)
    originals = {names[name]: parameter for name, parameter in model.named_parameters() if name in names}
    for name, parameter in smaller.named_parameters():
        parameter.data = parameter.data.to(originals[name].dtype)  # a checkpoint may have several precisions
    return smaller.train(model.training)


def shrink_shapes(shapes: Shapes, wanted: Shrink | None) -> Shapes:
    """The shapes of the parameters that are kept."""
    if wanted is None:
        return shapes
    names = new_names(list(shapes), layers_to_keep(wanted.layers, count_blocks(shapes)))
    left = {new: shapes[old] for old, new in names.items()}
    return left if wanted.intermediate_size is None else narrow_shapes(left, wanted.intermediate_size)
