"""How much each class counts in the training loss, where some classes are rare. numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.data.classes import Classes

KEY = "training.class_weights"
GAMMA = 2.0  # of the focal loss: the best value in its paper (Lin et al. 2017, arXiv 1708.02002, table 1b)


def weights_of(wanted: Any, data: Any) -> tuple[tuple[float, ...], float]:
    """The weight of each class (empty: equal) and the gamma of the focal loss (0: cross-entropy).

    With `balanced` a class of `n_c` of `n` training rows in `K` classes has the weight `n / (K n_c)`, so that all classes count
    equally and the mean weight over rows is 1. Given weights are scaled to the same mean.

    Args:
        wanted: of the recipe: None, balanced, focal, a list in the order of the classes, or a mapping by their names.
        data: of the run, a `Classes`.

    Raises:
        UserError: several labels per row, or weights that are not of these classes.
    """
    if wanted is None:
        return (), 0.0
    classes: Classes = data
    if classes.many:
        raise UserError(f"{KEY}: {wanted}: rows have any number of labels, and weights are for one class per row; remove it")
    if wanted == "focal":
        return (), GAMMA
    counts = [max(1, int(count)) for count in classes.counts]
    given = [1 / count for count in counts] if wanted == "balanced" else _given(wanted, list(classes.label_names))
    mean = sum(weight * count for weight, count in zip(given, counts, strict=True)) / sum(counts)
    return tuple(weight / mean for weight in given), 0.0


def _given(wanted: Any, names: list[str]) -> list[float]:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if isinstance(wanted, dict):
        if odd := sorted(set(wanted) ^ set(names)):
            what = "is no class of the data" if odd[0] in wanted else "has no weight"
            raise UserError(f"{KEY}: '{odd[0]}' {what}; expected a weight for each of {shown}")
        return [float(wanted[name]) for name in names]
    if len(wanted) != len(names):
        raise UserError(f"{KEY}: {len(wanted)} weights, but the data have {len(names)} classes: {shown}; give one for each")
    return [float(weight) for weight in wanted]
