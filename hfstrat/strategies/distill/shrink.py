"""A smaller model made of a larger one by removing layers and MLP channels; the other weights are copied.

The channels with the largest mean absolute activation on some training examples are kept, as in Minitron (arXiv 2407.14679).
Only inner channels of the MLPs are removed: a smaller hidden size would change every norm, so that even channels that are
always zero could not be removed without changing the outputs."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.parameter_names import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from hfstrat.models.load import Base
    from hfstrat.recipe.distill import Shrink
    from hfstrat.recipe.section import Shapes


TOKENS = 4096  # of training examples whose activations are measured
LONGEST = 512  # tokens per example
KEY, WIDTH = "strategy.shrink.intermediate_size", "intermediate_size"


# Llama and similar families; BERT and similar families
INTO = re.compile(r"\.(?:mlp\.(?:gate_proj|up_proj)|intermediate\.dense)\.(?:weight|bias)$")
OUT_OF = re.compile(r"(?:\.mlp\.down_proj|(?<!\.attention)\.output\.dense)\.weight$")


def check_width(wish: int, config: dict[str, Any], shapes: Shapes) -> None:
    """Refuse an impossible width, as far as it is known from a config and the headers of weights.

    Raises:
        UserError: wider than the model, or an MLP of unknown structure.
    """
    width = config.get(WIDTH)
    if not isinstance(width, int):
        if config:
            raise UserError(_unsupported(config.get("model_type")))
        return
    if wish > width:
        raise UserError(f"{KEY}: given {wish}, but this model has {width} channels per layer; expected at most {width}")
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


def most_active_channels(model: PreTrainedModel, rows: Iterable[dict[str, Any]], wish: int) -> dict[int, torch.Tensor]:
    """For each block the sorted indices of the `wish` MLP channels with the largest mean absolute activation.

    Args:
        rows: examples with `input_ids`; the first few thousand tokens are run, one example at a time.

    Raises:
        UserError: MLPs of unknown structure.
    """
    import torch

    config = model.config.get_text_config()
    check_width(wish, config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})
    told: dict[int, torch.Tensor] = {}

    def add_up(block: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            told[block] = told.get(block, 0) + args[0].detach().abs().flatten(0, -2).sum(0, dtype=torch.float64)

        return hook

    readers = [(name, m) for name, m in model.named_modules() if BLOCK.search(f"{name}.") and OUT_OF.search(f".{name}.weight")]
    hooks = [module.register_forward_pre_hook(add_up(_block(f"{name}."))) for name, module in readers]
    was_training, seen = model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for row in rows:
                ids = torch.as_tensor(row["input_ids"][:LONGEST], device=model.device)[None]
                model.base_model(input_ids=ids)
                seen += ids.numel()
                if seen >= TOKENS:
                    break
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    order = {block: torch.argsort(loudness, descending=True, stable=True) for block, loudness in told.items()}
    return {block: found[:wish].sort().values for block, found in order.items()}


def cut_parameter(name: str, tensor: torch.Tensor, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """The part of a parameter that is kept, by its name in the full model."""
    if BLOCK.search(name) and INTO.search(name):
        return tensor.index_select(0, kept[_block(name)])
    if BLOCK.search(name) and OUT_OF.search(name):
        return tensor.index_select(1, kept[_block(name)])
    return tensor


def narrow_shapes(shapes: Shapes, wish: int) -> Shapes:
    """The shapes of the parameters with `wish` MLP channels."""

    def of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if BLOCK.search(name) and INTO.search(name):
            return (wish, *shape[1:])
        return (*shape[:-1], wish) if BLOCK.search(name) and OUT_OF.search(name) else shape

    return {name: of(name, shape) for name, shape in shapes.items()}


def shrink_model(wish: Shrink, base: Base, rows: Any) -> PreTrainedModel:
    """The smaller model, with a remark on what was removed; channels are selected on `rows`."""
    config = base.model.config.get_text_config()
    keep, channels = layers_to_keep(wish.layers, config.num_hidden_layers), None
    if wish.layers is not None:
        base.say(f"student: layers {', '.join(map(str, keep))} of {config.num_hidden_layers}")
    if wish.intermediate_size is not None:
        channels = most_active_channels(base.model, rows, wish.intermediate_size)
        base.say(f"student: the {wish.intermediate_size:,} most active of {config.intermediate_size:,} MLP channels per layer")
    return drop_layers(base.model, keep, channels)


def layers_to_keep(wish: int | list[int] | None, count: int) -> list[int]:
    """The indices of the layers to keep, out of `count`: the given ones, or evenly spaced ones with the first and the last.

    None keeps all of them.

    Raises:
        UserError: more layers than the model has, or an index out of range.
    """
    if wish is None:
        return list(range(count))
    if isinstance(wish, int):
        if wish > count:
            raise UserError(f"strategy.shrink.layers: given {wish}, but this model has {count}; expected at most {count}")
        return [round(place * (count - 1) / (wish - 1)) for place in range(wish)] if wish > 1 else [0]
    if outside := [layer for layer in wish if not 0 <= layer < count]:
        raise UserError(f"strategy.shrink.layers: there is no layer {outside[0]}; expected numbers from 0 to {count - 1}")
    if sorted(set(wish)) != wish:
        raise UserError(f"strategy.shrink.layers: {wish}: expected each layer once, in ascending order")
    return wish


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

    Raises:
        UserError: the smaller config does not describe a model with these layers.
    """
    import torch

    config = smaller_config(model.config, keep)
    names = new_names(list(model.state_dict()), keep)
    weights = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    if channels is not None:
        config.get_text_config().intermediate_size = len(channels[keep[0]])
        weights = {new: cut_parameter(old, weights[new], channels) for old, new in names.items()}
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
    for (_, ours), (_, theirs) in zip(_ordered(smaller), _ordered(model, keep), strict=True):
        ours.data = ours.data.to(theirs.dtype)  # a checkpoint may have several precisions
    return smaller.train(model.training)


def _ordered(model: PreTrainedModel, keep: list[int] | None = None) -> list[tuple[str, Any]]:
    found = dict(model.named_parameters())
    if keep is None:
        return sorted(found.items())
    names = new_names(list(found), keep)
    return sorted((names[name], parameter) for name, parameter in found.items() if name in names)


def smaller_config(config: PretrainedConfig, keep: list[int]) -> PretrainedConfig:
    """The config for these layers only."""
    from hfstrat.models.blocks import keep_in_config

    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    keep_in_config(text, text.num_hidden_layers, keep)
    return smaller


def shrink_shapes(shapes: Shapes, wish: Shrink | None) -> Shapes:
    """The shapes of the parameters that are kept."""
    if wish is None:
        return shapes
    count = max((int(match.group(1)) for name in shapes if (match := BLOCK.search(name))), default=-1) + 1
    names = new_names(list(shapes), layers_to_keep(wish.layers, count))
    left = {new: shapes[old] for old, new in names.items()}
    return left if wish.intermediate_size is None else narrow_shapes(left, wish.intermediate_size)
