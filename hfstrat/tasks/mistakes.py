"""The evaluation examples that a result gets most wrong, as cards of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages.blocks import Card, Part, Picture
from hfstrat.recipe import format

if TYPE_CHECKING:
    from hfstrat.tasks.base import Pictures
    from hfstrat.tasks.report_parts import Mistake


def cards(mistakes: list[Mistake], pictures: Pictures, is_number: bool = False) -> list[Card]:
    """A card for each; `is_number`: its score is an error, and not a probability."""
    return [_card(at, one, pictures.of_mistake(at), is_number) for at, one in enumerate(mistakes)]


def _card(at: int, one: Mistake, source: str, is_number: bool) -> Card:
    if one.score is None:
        note = ""
    elif is_number:
        note = f" (error {one.score:.4g})"
    else:
        note = f" ({format.percent(one.score)})"
    expected, predicted = (one.expected, one.predicted + note) if is_number else (one.expected + note, one.predicted)
    described = f"evaluation image {at + 1}: expected {one.expected}, predicted {one.predicted}"
    picture = Picture(source, described) if source else None
    parts = [] if picture else [Part("input", one.text)]
    named = [Part("file", one.text)] if picture and one.text else []
    return Card(f"Row {one.row:,}", parts, [Part("expected", expected), Part("predicted", predicted), *named], picture)
