"""Values of rows: text, lists that are written as text, missing values, and characters that UTF-8 does not have."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Row = dict[str, Any]
ROWS_VERSION = 1  # of how rows become examples: increase it where that changes, so that cached rows are not reused
REPLACED = "have half of a surrogate pair (such as \\ud83d), read as U+FFFD"
SHOWN = 60  # characters of a value in a message


class BadRow(ValueError):
    """A row that does not fit its format. The message states what the row holds."""


def is_missing(value: Any) -> bool:
    """Whether a value is null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def by_our_names(row: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """The values of a row by our names; None for missing ones, and for all of `names` that the row lacks.

    Args:
        names: our name by that of the data; a column that first occurs in a later row keeps its name.

    Raises:
        BadRow: a later row has a column of a name to which another one is mapped.
    """
    found: Row = dict.fromkeys(names.values())
    for theirs, value in row.items():
        ours = names.get(theirs, theirs)
        if is_missing(value):
            continue
        if theirs not in names and ours in found:
            other = next(name for name, our in names.items() if our == ours)
            raise BadRow(f"it has a column '{theirs}', but data.columns maps '{other}' to this name")
        found[ours] = value
    return found


def require_text(value: Any, column: str) -> str:
    """The value, which must be a string. Raises BadRow otherwise."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        raise BadRow(f"'{column}' is null, expected text")
    raise BadRow(f"'{column}' is {type(value).__name__}, expected text: {shown(value)}")


def optional_text(value: Any, column: str) -> str:
    """The value of an optional column, "" for none. Raises BadRow where it is anything but text, null or NaN."""
    return "" if is_missing(value) else require_text(value, column)


def text_or_json(value: Any, column: str) -> str:
    """Text as it is, "" for none; a number, boolean, list or object as JSON.

    Raises:
        BadRow: a value that JSON does not have, such as a date of a Parquet file.
    """
    if isinstance(value, str) or is_missing(value):
        return value or ""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise BadRow(f"'{column}' is {type(value).__name__}, expected text or JSON: {shown(value)}") from None


def looks_like_list(value: Any) -> bool:
    """Whether a text is between brackets, as a list in a CSV file is."""
    return isinstance(value, str) and value.strip()[:1] == "[" and value.strip()[-1:] == "]"


def parse_list(value: Any, column: str) -> list[Any]:
    """A list, also one that is written as text, in JSON or as Python prints it; [] for null, NaN and empty text.

    Raises:
        BadRow: anything else.
    """
    if is_missing(value) or value == "":
        return []
    found = value
    if looks_like_list(value):
        try:
            found = parse_json(value)
        except ValueError:
            found = _python_literal(value)
    if not isinstance(found, list | tuple):
        instead = '; write it as JSON, such as ["a", "b"]' if looks_like_list(value) else ""
        raise BadRow(f"'{column}' is not a list: {shown(value)}{instead}")
    return list(found)


def _python_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


class DuplicateKey(ValueError):
    """A JSON object that has a key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`). Raises DuplicateKey."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise DuplicateKey(f"the key '{twice}' occurs twice in one object; remove one of them")
    return found


def parse_json(text: str) -> Any:
    """Any JSON. Raises ValueError: invalid, a duplicate key, nested too deeply, or a number of too many digits."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, DuplicateKey):
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(reason_of(error)) from None


def reason_of(error: ValueError | RecursionError) -> str:
    """Why Python does not read valid JSON."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, DuplicateKey) else "a number has more digits than can be read"


def shown(value: Any) -> str:
    """A value in a message, abbreviated."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def is_valid(text: str) -> bool:
    """Whether UTF-8 has all characters of a text: JSON may have one half of a surrogate pair without the other."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def valid(value: Any) -> Any:
    """The value itself if all its text is valid, else a copy in which U+FFFD replaces what UTF-8 does not have."""
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, RecursionError):
            json.dumps(value, ensure_ascii=False).encode()  # ten times as fast as looking at each text
            return value
    return _replaced(value)


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value if is_valid(value) else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        pairs = [(_replaced(key), _replaced(inner)) for key, inner in value.items()]
        same = all(key is a and inner is b for (key, inner), (a, b) in zip(value.items(), pairs, strict=True))
        return value if same else dict(pairs)
    if isinstance(value, list | tuple):
        items = [_replaced(inner) for inner in value]
        return value if all(a is b for a, b in zip(value, items, strict=True)) else items
    return value
