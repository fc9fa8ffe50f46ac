"""The size of a classifier cut at a layer, from the shapes of its parameters. No torch."""

from __future__ import annotations

from math import prod

from hfstrat.errors import UserError
from hfstrat.models.classifier_heads import CLASS_HEAD
from hfstrat.models.parameter_names import BLOCK

LAST_LAYERS = ("score", "classifier", "out_proj")
Shapes = dict[str, tuple[int, ...]]


def depth_of(shapes: Shapes) -> int:
    """The number of blocks."""
    return 1 + max((int(match.group(1)) for name in shapes if (match := BLOCK.search(name))), default=-1)


def check_depth(layer: int | str | None, depth: int) -> None:
    """Raises UserError for a layer beyond the last."""
    if isinstance(layer, int) and layer > depth:
        raise UserError(f"strategy.layer: given {layer}, but this model has {depth} layers")


def classifier_of(shapes: Shapes) -> str | None:
    """The name of a classifier's last linear layer, or None."""
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight") and not BLOCK.search(name)]
    return next((name for name in reversed(names) if name.rpartition(".")[2] in LAST_LAYERS), None)


def cut(shapes: Shapes, layer: int | None) -> Shapes:
    """The shapes without the blocks after the first `layer`; None keeps all of them."""
    if layer is None:
        return shapes
    return {name: s for name, s in shapes.items() if not (match := BLOCK.search(name)) or int(match.group(1)) < layer}


def head_size(shapes: Shapes, classifier: str, hidden: int | None, reads_last: bool) -> int:
    """Parameters of a head on pooled features.

    Args:
        hidden: width of an MLP's hidden layer.
        reads_last: whether the last token is pooled, for which heads of transformers on decoders have no bias.
    """
    classes, width = shapes[f"{classifier}.weight"]
    if hidden is not None:
        return width * hidden + hidden + hidden * classes + classes
    return width * classes + (0 if reads_last and f"{classifier}.bias" not in shapes else classes)


def body_size(shapes: Shapes, layer: int | None) -> int:
    """Parameters of the body cut at a layer, without transformers' own head."""
    return sum(prod(s) for name, s in cut(shapes, layer).items() if not CLASS_HEAD.search(name) or ".pooler." in name)
