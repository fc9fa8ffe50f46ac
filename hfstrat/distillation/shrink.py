"""A smaller model out of a larger one: whole layers and inner channels left out, the rest as it was."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hfstrat.depth import BLOCK
from hfstrat.distillation import narrow
from hfstrat.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from hfstrat.model import Base
    from hfstrat.strategies import Shapes
    from hfstrat.strategies.distill_section import Shrink


def shrunk(wish: Shrink, base: Base, rows: Any) -> PreTrainedModel:
    """The smaller model that is asked for, and what it is in words; `rows` tell which inner channels matter."""
    config = base.model.config.get_text_config()
    keep, channels = kept_layers(wish.layers, config.num_hidden_layers), None
    if wish.layers is not None:
        base.say(f"student: layers {', '.join(map(str, keep))} of {config.num_hidden_layers}")
    if wish.intermediate_size is not None:
        channels = narrow.loudest(base.model, rows, wish.intermediate_size)
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
        weights = {new: narrow.part_of(old, weights[new], channels) for old, new in names.items()}
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
    from hfstrat.blocks import keep_in_config

    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    keep_in_config(text, text.num_hidden_layers, keep)
    return smaller


def shapes_left(shapes: Shapes, wish: Shrink) -> Shapes:
    """The parameters' shapes without what is left out."""
    count = max((int(match.group(1)) for name in shapes if (match := BLOCK.search(name))), default=-1) + 1
    names = renamed(list(shapes), kept_layers(wish.layers, count))
    left = {new: shapes[old] for old, new in names.items()}
    return left if wish.intermediate_size is None else narrow.shapes_left(left, wish.intermediate_size)
