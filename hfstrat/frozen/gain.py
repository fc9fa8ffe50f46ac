"""Does it pay to compute what is frozen once? Floating-point operations, counted from parameters and lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.parts import column
from hfstrat.frozen.boundary import named_blocks
from hfstrat.quantization import elements

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.feed import Feed
    from hfstrat.frozen.prefix import Prefix


def predicted_gain(feed: Feed, prefix: Prefix) -> float:
    """How many times faster `E` epochs are: `E (Ff + 3 Ft) / (Ff + 3 E Ft)`.

    `Ff` is the forward pass of the frozen part and `Ft` that of the rest, whose backward pass costs twice as much, or once
    where its weights are frozen too. Rows that stand in the data more than once are computed once.
    """
    length = float(np.mean(column(feed.train, "length")))
    blocks = named_blocks(prefix.boundary.model)
    costs = [_forward(block.module, length, prefix.boundary.model.config) for block in blocks]
    once = sum(costs[: prefix.frozen])
    rest = sum(
        cost * (2 + _learning(b.module)) for cost, b in zip(costs[prefix.frozen :], blocks[prefix.frozen :], strict=True)
    )
    rest += _head(feed, prefix.boundary.model)
    return gain(once, rest, feed.epochs, feed.different_rows / len(feed.train))


def gain(once: float, rest: float, epochs: float, share: float = 1.0) -> float:
    """The formula; `rest` is forward and backward of what is not frozen, `share` that of the rows that are different ones."""
    return epochs * (once + rest) / (share * once + epochs * rest)


def _forward(block: nn.Module, length: float, config: Any) -> float:
    """Operations a token: two for each weight, and those of attention."""
    width = getattr(config.get_text_config(), "hidden_size", 0)
    return 2.0 * sum(elements(p) for p in block.parameters()) + 4.0 * length * width


def _learning(module: nn.Module) -> float:
    sizes = [(elements(p), p.requires_grad) for p in module.parameters()]
    return sum(n for n, learns in sizes if learns) / max(1, sum(n for n, _ in sizes))


def _head(feed: Feed, model: Any) -> float:
    """Operations a token of the LM head, through which only tokens go that carry loss; heads of classifiers cost nothing."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return 0.0
    return 2.0 * weight.numel() * feed.supervised_share * (2 + weight.requires_grad)
