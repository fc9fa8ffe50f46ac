"""Narrower feed-forward layers: of each layer's inner channels those stay that speak loudest on some training rows.

Importance is the mean absolute activation, as in Minitron (arXiv 2407.14679). Only inner channels are left out: what is left
is exactly the model without them. With fewer channels of the hidden width every norm would be another one, so that not even
silent channels could go without a change.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hfstrat.depth import BLOCK
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PreTrainedModel

    from hfstrat.strategies import Shapes

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


def shapes_left(shapes: Shapes, wish: int) -> Shapes:
    """The parameters' shapes with `wish` inner channels."""

    def of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if BLOCK.search(name) and INTO.search(name):
            return (wish, *shape[1:])
        return (*shape[:-1], wish) if BLOCK.search(name) and OUT_OF.search(name) else shape

    return {name: of(name, shape) for name, shape in shapes.items()}
