"""What learns in a student, and how large its teacher is: for predictions, without torch."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.distillation.shrink import shapes_left
from hfstrat.model import read_shapes

if TYPE_CHECKING:
    from hfstrat.strategies.base import Learning, Shapes
    from hfstrat.strategies.distill import Distill


def of_student(strategy: Distill, shapes: Shapes, tied: bool) -> Learning:
    """A teacher that is not named is the model itself as it was; with an adapter it is the frozen base, there already."""
    found = strategy.student.learning(shapes if strategy.shrink is None else shapes_left(shapes, strategy.shrink), tied)
    found = found._replace(keeps_prefix=False)
    if strategy.teacher is not None:
        theirs = read_shapes(Path(strategy.teacher.name_or_path).expanduser())
        return found._replace(teacher=sum(map(prod, theirs.values())))
    return found._replace(teacher=0 if found.rank else sum(map(prod, shapes.values())))
