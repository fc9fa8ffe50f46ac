"""Narrower feed-forward layers: of each layer's inner channels those stay that speak loudest on some training rows.

Importance is the mean absolute activation, as in Minitron (arXiv 2407.14679). Only inner channels are left out: what is left
is exactly the model without them. With fewer channels of the hidden width every norm would be another one, so that not even
silent channels could go without a change.


A smaller model out of a larger one: whole layers and inner channels left out, the rest as it was."""

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


TOKENS = 4096  # of training rows that are listened to


LONGEST = 512  # tokens of one of them


KEY, WIDTH = "strategy.shrink.intermediate_size", "intermediate_size"


# Llama and its like; BERT and its like
INTO = re.compile(r"\.(?:mlp\.(?:gate_proj|up_proj)|intermediate\.dense)\.(?:weight|bias)$")


OUT_OF = re.compile(r"(?:\.mlp\.down_proj|(?<!\.attention)\.output\.dense)\.weight$")


def check_width(wish: int, config: dict[str, Any], shapes: Shapes) -> None:
    """Refuse a width that cannot be, as far as a config and the headers of weights tell.

    Raises:
        UserError: wider than the model, or layers whose inner channels nobody knows.
    """
    width = config.get(WIDTH)
    if not isinstance(width, int):
        if config:
            raise UserError(_not_understood(config.get("model_type")))
        return
    if wish > width:
        raise UserError(f"{KEY}: {wish} of a model that has {width}; give at most {width}")
    if shapes and not _is_understood(shapes, width):
        raise UserError(_not_understood(config.get("model_type")))


def _not_understood(family: Any) -> str:
    return (
        f"{KEY}: the feed-forward layers of a {family} model are not built as those of Llama (gate_proj, up_proj, down_proj) "
        "or BERT (intermediate, output); remove it, and leave out layers"
    )


def _is_understood(shapes: Shapes, width: int) -> bool:
    """Whether each block has one matrix that reads as many channels, and others that make them."""
    readers = [name for name, shape in shapes.items() if BLOCK.search(name) and OUT_OF.search(name) and shape[-1] == width]
    makers = [name for name, shape in shapes.items() if BLOCK.search(name) and INTO.search(name) and shape[0] == width]
    blocks = {_block(name) for name in shapes if BLOCK.search(name)}
    return len(readers) == len(blocks) and {_block(name) for name in readers} == {_block(name) for name in makers} == blocks


def _block(name: str) -> int:
    match = BLOCK.search(name)
    assert match is not None
    return int(match.group(1))


def loudest(model: PreTrainedModel, rows: Iterable[dict[str, Any]], wish: int) -> dict[int, torch.Tensor]:
    """For each block the numbers of the `wish` inner channels with the largest mean absolute activation, in their order.

    Args:
        rows: with `input_ids`; as many of them as make some thousand tokens are read, one at a time.

    Raises:
        UserError: layers whose inner channels nobody knows.
    """
    import torch

    config = model.config.get_text_config()
    check_width(wish, config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})
    told: dict[int, torch.Tensor] = {}

    def listen(block: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            told[block] = told.get(block, 0) + args[0].detach().abs().flatten(0, -2).sum(0, dtype=torch.float64)

        return hook

    readers = [(name, m) for name, m in model.named_modules() if BLOCK.search(f"{name}.") and OUT_OF.search(f".{name}.weight")]
    hooks = [module.register_forward_pre_hook(listen(_block(f"{name}."))) for name, module in readers]
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


def part_of(name: str, tensor: torch.Tensor, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """What is left of a parameter by its name in the whole model."""
    if BLOCK.search(name) and INTO.search(name):
        return tensor.index_select(0, kept[_block(name)])
    if BLOCK.search(name) and OUT_OF.search(name):
        return tensor.index_select(1, kept[_block(name)])
    return tensor


def narrow_shapes_left(shapes: Shapes, wish: int) -> Shapes:
    """The parameters' shapes with `wish` inner channels."""

    def of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if BLOCK.search(name) and INTO.search(name):
            return (wish, *shape[1:])
        return (*shape[:-1], wish) if BLOCK.search(name) and OUT_OF.search(name) else shape

    return {name: of(name, shape) for name, shape in shapes.items()}


def shrunk(wish: Shrink, base: Base, rows: Any) -> PreTrainedModel:
    """The smaller model that is asked for, and what it is in words; `rows` tell which inner channels matter."""
    config = base.model.config.get_text_config()
    keep, channels = kept_layers(wish.layers, config.num_hidden_layers), None
    if wish.layers is not None:
        base.say(f"student: layers {', '.join(map(str, keep))} of {config.num_hidden_layers}")
    if wish.intermediate_size is not None:
        channels = loudest(base.model, rows, wish.intermediate_size)
        base.say(f"student: {wish.intermediate_size:,} of {config.intermediate_size:,} inner channels a layer, the loudest")
    return drop_layers(base.model, keep, channels)


def kept_layers(wish: int | list[int] | None, count: int) -> list[int]:
    """The numbers of the layers that stay, out of `count`: those named, or so many, evenly spaced with the first and the last.

    None is all of them.

    Raises:
        UserError: more layers than there are, or a number outside of them.
    """
    if wish is None:
        return list(range(count))
    if isinstance(wish, int):
        if wish > count:
            raise UserError(f"strategy.shrink.layers: {wish} of a model that has {count}; give at most {count}")
        return [round(place * (count - 1) / (wish - 1)) for place in range(wish)] if wish > 1 else [0]
    if outside := [layer for layer in wish if not 0 <= layer < count]:
        raise UserError(
            f"strategy.shrink.layers: there is no layer {outside[0]} in a model of {count}, counted from 0 to {count - 1}"
        )
    if sorted(set(wish)) != wish:
        raise UserError(f"strategy.shrink.layers: {wish}: expected each layer once, in the order of the model")
    return wish


def renamed(names: list[str], keep: list[int]) -> dict[str, str]:
    """For each parameter that stays, its name in the smaller model: old name to new."""
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
    """A new model of the layers `keep`, with copies of their weights and everything around them; ties are tied again.

    Of each layer's inner channels those in `channels` stay, by the layer's old number; all of them if it is None. It is made
    anew from its configuration, so that nothing in it remembers the number of a layer that it no longer is.

    Raises:
        UserError: the smaller configuration does not describe a model of these layers.
    """
    import torch

    config = smaller_config(model.config, keep)
    names = renamed(list(model.state_dict()), keep)
    weights = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    if channels is not None:
        config.get_text_config().intermediate_size = len(channels[keep[0]])
        weights = {new: part_of(old, weights[new], channels) for old, new in names.items()}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    state = torch.get_rng_state()  # fresh weights are drawn, only to be overwritten
    smaller: PreTrainedModel = type(model)._from_config(
        config, dtype=dtype, attn_implementation=model.config._attn_implementation
    )
    torch.set_rng_state(state)
    try:
        smaller.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"strategy.shrink: layers of a {model.config.model_type} model cannot be left out: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    smaller.tie_weights()
    if hasattr(model, "generation_config"):
        smaller.generation_config = copy.deepcopy(model.generation_config)
    for (_, ours), (_, theirs) in zip(_ordered(smaller), _ordered(model, keep), strict=True):
        ours.data = ours.data.to(theirs.dtype)  # a checkpoint may hold several precisions
    return smaller.train(model.training)


def _ordered(model: PreTrainedModel, keep: list[int] | None = None) -> list[tuple[str, Any]]:
    found = dict(model.named_parameters())
    if keep is None:
        return sorted(found.items())
    names = renamed(list(found), keep)
    return sorted((names[name], parameter) for name, parameter in found.items() if name in names)


def smaller_config(config: PretrainedConfig, keep: list[int]) -> PretrainedConfig:
    """The configuration for these layers only."""
    from hfstrat.models.blocks import keep_layers_in_config

    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    keep_layers_in_config(text, text.num_hidden_layers, keep)
    return smaller


def shapes_left(shapes: Shapes, wish: Shrink | None) -> Shapes:
    """The parameters' shapes without what is left out."""
    if wish is None:
        return shapes
    count = max((int(match.group(1)) for name in shapes if (match := BLOCK.search(name))), default=-1) + 1
    names = renamed(list(shapes), kept_layers(wish.layers, count))
    left = {new: shapes[old] for old, new in names.items()}
    return left if wish.intermediate_size is None else narrow_shapes_left(left, wish.intermediate_size)
