"""Which layer of a student stands beside which of its teacher. No torch: recipes are checked with it."""

from __future__ import annotations

from hfstrat.errors import UserError


def even_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Each layer of the student with the last layer of the part of the teacher that it stands for."""
    return [(layer, round((layer + 1) * teacher / student) - 1) for layer in range(student)]


def check_pairs(pairs: list[tuple[int, int]], student: int, teacher: int) -> None:
    """Raises UserError for a layer that is not there."""
    for given in pairs:
        for layer, count, who in zip(given, (student, teacher), ("student", "teacher"), strict=True):
            if not 0 <= layer < count:
                raise UserError(
                    f"strategy.hidden.layers: {list(given)}: the {who} has no layer {layer}; its {count} layers are "
                    f"counted from 0 to {count - 1}"
                )
