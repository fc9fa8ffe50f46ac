"""Features of a classifier that pools its hidden states itself, as the classes of transformers for images do.

They are the inputs of its last linear layer. Those of the model cut at a block are computed without cutting it: the hidden
states after each block are kept in one forward pass, and what follows the last block is run on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfstrat.errors import UserError
from hfstrat.models.blocks import evaluating, final_linear, find_blocks
from hfstrat.strategies.head.features import Body, hidden_of, near

OWN = "class"  # the only pooling: what a class of transformers computes


@dataclass(frozen=True)
class OwnPooling(Body):
    """A complete classifier. `final` is its last linear layer; without blocks that are alike it cannot be cut."""

    final: nn.Linear

    @property
    def depth(self) -> int:
        return max(1, len(self.blocks))

    @property
    def width(self) -> int:
        return self.final.in_features

    @property
    def poolings(self) -> tuple[str, ...]:
        return (OWN,)

    def features(self, inputs: dict[str, torch.Tensor], layers: Sequence[int], poolings: Sequence[str]) -> torch.Tensor:
        if list(layers) == [self.depth] or not len(self.blocks):
            return self.pooled(inputs).float().cpu()[:, None, None]
        given: dict[int, Any] = {}
        hooks = [
            self.blocks[layer - 1].register_forward_hook(lambda _, args, output, at=layer: given.__setitem__(at, output))
            for layer in layers
        ]
        try:
            self.pooled(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        found = []
        for layer in layers:
            with only(self.blocks, given[layer]):
                found.append(self.pooled(inputs).float().cpu())
        return torch.stack(found, dim=1)[:, :, None]

    def pooled(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The inputs of the last linear layer, `[B, width]`."""
        return inputs_of(self.model, self.final, inputs)


def inputs_of(model: Any, layer: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a layer of the model is given in a forward pass."""
    taken: list[torch.Tensor] = []
    with layer.register_forward_pre_hook(lambda module, args: taken.append(args[0])):
        model(**inputs)
    return taken[0]


class _Given(nn.Module):
    """Returns an output that was computed before, whatever it is given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@contextmanager
def only(blocks: nn.ModuleList, output: Any) -> Iterator[None]:
    """A single block in the place of all of them, which returns this output."""
    kept = list(blocks)
    del blocks[:]
    blocks.append(_Given(output))
    try:
        yield
    finally:
        del blocks[:]
        blocks.extend(kept)


@torch.no_grad()
def own_pooling(model: Any, sample: Callable[[], dict[str, torch.Tensor]]) -> OwnPooling:
    """The parts of a classifier that pools itself.

    Args:
        sample: makes inputs on which is checked that what follows the last block depends on its output alone.

    Raises:
        UserError: it has no linear head.
    """
    final, found = final_linear(model), find_blocks(model)
    whole = OwnPooling(model, nn.ModuleList() if found is None else found.modules, None, final)
    if found is None or not are_alike(found.modules):
        return OwnPooling(model, nn.ModuleList(), None, final)
    dtype, last = next(model.parameters()).dtype, list[Any]()  # of a checkpoint, which may have 16 bits
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in sample().items()}
    try:
        with evaluating(model), found.modules[-1].register_forward_hook(lambda module, args, given: last.append(given)):
            expected = whole.pooled(inputs)
        with evaluating(model), only(found.modules, last[-1]):
            again = whole.pooled(inputs)
    except UserError:
        raise
    except Exception:  # the code of a family can fail in any way
        return OwnPooling(model, nn.ModuleList(), None, final)
    is_same = hidden_of(last[-1]).dim() == 3 and near(again, expected)
    return whole if is_same else OwnPooling(model, nn.ModuleList(), None, final)


def are_alike(blocks: nn.ModuleList) -> bool:
    """Whether all blocks have parameters of the same shapes, so that the model is complete with fewer of them.

    The first may have more, such as position embeddings that all share (WavLM).
    """
    first, *others = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    return all(each == others[0] for each in others) and (not others or others[0].items() <= first.items())
