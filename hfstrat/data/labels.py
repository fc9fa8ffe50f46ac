"""Labels of rows: names of classes, lists of them, and what is no label."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from hfstrat.data.values import BadRow, looks_like_list, parse_list, shown
from hfstrat.errors import UserError

BITS = ("0", "1", "0.0", "1.0", "true", "false")  # of a vector that marks the labels which apply
STRIPPED = "have white space around a label, which is removed"


def label_of(value: Any, column: str, names: list[str] | None = None) -> str:
    """The name of one label.

    Raises:
        BadRow: null, an empty text, a fraction, or a number without a class name.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # tables store integers as floats if a value is missing
        if not value.is_integer():
            raise BadRow(
                f"'{column}' is {'empty' if math.isnan(value) else value}; expected a text or a whole number: a class. "
                "For numbers set task: regression"
            )
        value = int(value)
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise BadRow(f"'{column}' is {value}: this row has no label; use a labeled split")
        return names[value]
    if isinstance(value, list | tuple):
        raise BadRow(f"'{column}' has a list, but other rows have one label; expected a list in all of them, or in none")
    if not isinstance(value, str | int) or not str(value).strip():
        given = "empty" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise BadRow(f"'{column}' is {given}; expected a label, a text or a whole number. Remove rows without a label")
    return str(value).strip()


def vector_sentence(column: str, found: list[Any]) -> str:
    """What is wrong with a label that is a vector."""
    return (
        f"'{column}' is a vector of 0 and 1: {shown(found)}; expected the labels that apply, by name or number, such as "
        '[1, 4] or ["sport", "news"] (vectors of 0 and 1 are not supported)'
    )


def are_lists_as_text(given: list[Any]) -> bool:
    """Whether labels are lists written as text, as in a CSV file; names in brackets, such as [PER], are none."""
    if not given or not all(looks_like_list(value) for value in given):
        return False
    return any(re.fullmatch(r"\[[\d\s.]*\]", value.strip()) or re.search(r"[,'\"]", value) for value in given)


def find_vector(given: list[Any]) -> list[Any] | None:
    """The first label, if all labels are vectors of 0 and 1 of the same length, of at least two.

    [0, 1] may be the labels 0 and 1, but lists of labels differ in length; and as labels, [0, 1] and [1, 0] would be the same.
    """
    found: list[list[Any]] = []
    for value in given:
        with suppress(BadRow):
            found.append(parse_list(value, ""))
    filled = [each for each in found if each]
    same = len({len(each) for each in filled}) == 1 and len(filled[0]) > 1
    return filled[0] if same and all(str(bit).lower() in BITS for each in filled for bit in each) else None


def sort_labels(names: Iterable[str], known: list[str] | None = None) -> list[str]:
    """Labels in the order of the data set, else in natural order: numbers by value, "b2" before "b10"."""
    if known is not None:
        return sorted(names, key=known.index)
    return sorted(names, key=_natural)


def check_labels(rows: int, names: list[str], many: bool, source: str) -> None:
    """Refuse labels that no classifier can be trained on.

    Args:
        rows: their number.
        source: what messages begin with.

    Raises:
        UserError: a single label, scores, or a different label for each row.
    """
    if not names or (len(names) == 1 and not many):
        found = f"every row has the label '{names[0]}'" if names else "no row has a label"
        raise UserError(f"{source}: {found}; a classifier needs at least two labels")
    numbers = [as_number(name) for name in names]
    if all(n is not None for n in numbers) and any(n is not None and not n.is_integer() for n in numbers):
        raise UserError(
            f"{source}: the labels are numbers with fractions, such as {names[0]} and {names[-1]}; classes "
            "are expected. For numbers set task: regression"
        )
    if not many and len(names) == rows > 2:
        raise UserError(
            f"{source}: each of {rows:,} rows has a different label, such as '{names[0]}'; expected "
            "classes with several rows each. Is this column an id? Map another one by data.columns"
        )


def similar_labels(names: Iterable[str]) -> list[str]:
    """A line for labels that differ only in case, spaces or invisible characters, and for texts that look like several."""
    alike: dict[Any, list[str]] = {}
    known = list(names)
    for name in known:
        alike.setdefault(_plain(name), []).append(name)
    same = "; ".join(" and ".join(map(repr, each)) for each in alike.values() if len(each) > 1)
    found = [f"warning: these labels differ only in case, spaces, invisible characters or decimals: {same}"] if same else []
    for name in known:
        parts = [part.strip() for part in re.split(r"[|;,]", name)]
        if len(parts) > 1 and {*parts} <= {*known}:
            found.append(f"warning: {name!r} is one label here; for several labels of a row write a list, such as {parts}")
            break
    return found


def _plain(name: str) -> Any:
    number = as_number(name)
    if number is not None:
        return number
    visible = (c for c in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(c) != "Cf" and not c.isspace())
    return "".join(visible)


def _natural(name: str) -> tuple[Any, ...]:
    if (number := as_number(name)) is not None:
        return (0, number, name)
    parts = re.split(r"(\d+)", name.casefold())
    return (1, [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name)


def as_number(name: str) -> float | None:
    """The label as a number, or None."""
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
