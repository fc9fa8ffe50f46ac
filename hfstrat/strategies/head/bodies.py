"""The body of a model, taken apart: its blocks, its final norm, and the shorter model that ends after some of the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfstrat.errors import UserError
from hfstrat.models.blocks import find_blocks, keep_layers_in_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PROBE_TOKENS = 7


TOLERANCE = 1e-2  # of the largest value; bodies in 16 bits round their norms


@dataclass(frozen=True)
class Body:
    """A body and its parts. `norm` is what stands between the last block and the body's output; None where nothing does."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    norm: nn.Module | None

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the body would put out if it ended with these hidden states."""
        return hidden if self.norm is None else self.norm(hidden)


def hidden_of(given: Any) -> torch.Tensor:
    """A block's hidden states; some families give a tuple."""
    return given[0] if isinstance(given, tuple) else given


@torch.no_grad()
def take_apart(model: PreTrainedModel) -> Body:
    """Find the parts of a body, and prove on a few tokens that its output is that of its last block, normed or as it is.

    Raises:
        UserError: a body whose output comes about in another way.
    """
    found = find_blocks(model)
    name = type(model).__name__
    if found is None:
        raise UserError(f"strategy: {name} is no plain stack of blocks, so it cannot be cut at a layer; take partial or lora")
    blocks = found.modules
    last: list[torch.Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda module, args, given: last.append(hidden_of(given)))
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        output = model(input_ids=torch.arange(3, 3 + PROBE_TOKENS, device=device)[None]).last_hidden_state
        if near(last[-1], output):
            return Body(model, blocks, None)
        for norm in norms(model, blocks):
            if near(norm(last[-1]), output):
                return Body(model, blocks, norm)
    finally:
        hook.remove()
        model.train(was_training)
    raise UserError(f"strategy: the output of {name} is not that of its last block, normed or plain; take partial or lora")


def norms(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """Modules outside of the blocks that may be a final norm."""
    inside = {id(m) for m in blocks.modules()}
    return [m for m in model.modules() if id(m) not in inside and "norm" in type(m).__name__.lower()]


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def cut(body: Body, layer: int) -> Body:
    """The same body, in place, without the blocks after the first `layer`; its config says so too."""
    depth, config = body.depth, body.model.config
    del body.blocks[layer:]
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        keep_layers_in_config(part, depth, list(range(layer)))
    return body
