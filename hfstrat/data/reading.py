"""How the rows of a source are read: told once, from the first of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hfstrat.data import formats
from hfstrat.data.formats import Example
from hfstrat.data.readers import GLANCE, Row
from hfstrat.data_section import Data
from hfstrat.errors import UserError


@dataclass
class Reading:
    """How the rows of one source are read: its format, and their names for our columns."""

    source: str
    kind: str
    names: dict[str, str]

    @classmethod
    def of(cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str]) -> Reading:
        """Told from the first rows.

        Raises:
            UserError: columns that are not there, or that fit no format.
        """
        names = formats.rename(dict.fromkeys(name for row in head for name in row), mapping, source)
        return cls(source, formats.choose(wanted, names.values(), source), names)

    def example(self, row: Row) -> Example:
        """Raises BadRow where the row does not fit."""
        named = {ours: row.get(theirs) for theirs, ours in self.names.items()}
        return formats.FORMATS[self.kind][1](named)

    def resolve(self, train_on: str) -> str:
        """What `train_on: auto` comes to for these rows."""
        if train_on != "auto":
            return train_on
        return {"text": "all", "messages": "assistant", "conversations": "assistant"}.get(self.kind, "completions")

    def where(self, index: int) -> str:
        return f"{self.source}: row {index + 1}"


def read_as(
    rows: Iterable[Row], source: str, wanted: str, mapping: dict[str, str], told: Callable[..., Any] = Reading.of
) -> tuple[Iterator[Row], Any]:
    """The rows, and how to read them, which `told` tells from the first of them."""
    rows = iter(rows)
    head = list(itertools.islice(rows, GLANCE))
    if not head:
        raise UserError(f"{source}: there is no row; expected at least one")
    return itertools.chain(head, rows), told(head, source, wanted, mapping)


def check_train_on(data: Data, reading: Reading) -> None:
    """Raises UserError where `train_on` speaks of turns and the rows have none."""
    if reading.kind == "text" and data.train_on in ("completions", "assistant"):
        raise UserError(
            f"data.train_on: {data.train_on}: {reading.source} is plain text, which has no turns; write all, or auto for data "
            "of both kinds"
        )
