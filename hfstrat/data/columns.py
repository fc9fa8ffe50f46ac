"""Columns of the data: our names for them, which of them a format reads, and mappings to propose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hfstrat.data.values import by_our_names, is_missing, is_valid, valid
from hfstrat.errors import UserError
from hfstrat.recipe.format import plural

MEDIA = ("image", "images", "audio", "audios", "video", "videos", "pixelvalues")
MEANINGFUL = (  # columns that other formats or tools read: without them a row may mean something else
    *MEDIA,
    *("tools", "functions", "system", "systemprompt", "history", "chattemplatekwargs", "documents", "thinking", "reasoning"),
    *("weight", "weights", "lossmask", "mask", "trainmask", "sampleweight", "rejected", "chosen", "negative"),
    *("label", "labels", "category", "class", "intent", "sentiment", "target", "targets", "rating", "completion"),
    *("instruction", "output", "input", "textpair"),
)
CLASSES = ("class", "category", "intent", "sentiment", "topic", "tag", "label_text", "coarse_label", "genre", "type")
FEW_CLASSES = 20  # different values of a column that may be a class
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
NOTHING_LIKE = "no column looks like"
PLAIN_KEY = re.compile(r"(?!(?i:y|n|yes|no|on|off|true|false|null)$)[A-Za-z_][\w.-]*")  # of YAML, without quotes


@dataclass
class Reading:
    """How the rows of one source are read.

    Args:
        names: our name by that of the data, for the columns of the first rows.
        reads: our names of the columns that the format reads.
        remarks: what may be wrong although the rows can be read, in words.
    """

    source: str
    names: dict[str, str]
    reads: frozenset[str] = field(default_factory=frozenset, kw_only=True)
    remarks: list[str] = field(default_factory=list, kw_only=True)

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row by our names. Raises BadRow where two columns have one name."""
        return by_our_names(row, self.names)

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """The columns of a row that have a value which is not read."""
        columns = [theirs for theirs in row if self.names.get(theirs, theirs) not in self.reads]
        return [valid(theirs) for theirs in columns if not is_missing(row[theirs]) and row[theirs] not in ("", [], {})]

    def where(self, index: int) -> str:
        """A row, named for messages."""
        return f"{self.source}: row {index + 1}"


def columns_of(head: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of all first rows, in order."""
    return list(dict.fromkeys(name for row in head for name in row))


def filled(head: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first rows without missing values: a column that is null everywhere does not say what the rows are."""
    return [{name: value for name, value in row.items() if not is_missing(value)} for row in head]


def rename(columns: Iterable[str], mapping: Mapping[str, str], source: str) -> dict[str, str]:
    """Our name for each column of the data.

    Raises:
        UserError: a mapped column that the data do not have, two columns mapped to one name, or a name that is no text.
    """
    columns = list(columns)
    if broken := next((column for column in columns if not is_valid(column)), None):
        raise UserError(f"{source}: the name of the column {broken!a} has half of a surrogate pair; rename the column")
    for theirs, ours in mapping.items():
        if theirs not in columns:
            near = get_close_matches(theirs, columns, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            if ours in columns and not near:
                hint = f"; the order is {{name in the data: our name}}: did you mean {{{ours}: {theirs}}}?"
            raise UserError(
                f"data.columns: {source} has no column '{theirs}'; its columns are {', '.join(columns) or '(none)'}{hint}"
            )
    names = {column: mapping.get(column, column) for column in columns}
    for ours in mapping.values():
        if len(same := [column for column in columns if names[column] == ours]) > 1:
            raise UserError(
                f"data.columns: {source}: two columns would be named '{ours}': {' and '.join(same)}; "
                "map one of them to another name"
            )
    return names


def propose(given: list[str], wanted: Mapping[str, Iterable[str]]) -> str:
    """How to map these columns: a sentence that names only columns which are there.

    Args:
        given: the columns of the data.
        wanted: other names of each of our columns.
    """
    if hint := _separator_hint(given):
        return hint
    found, left = dict[str, str](), list(given)
    for ours, aliases in wanted.items():
        theirs = ours if ours in left else _find(ours, aliases, left)
        if theirs is not None:
            found[theirs] = ours
            left.remove(theirs)
    missing = [ours for ours in wanted if ours not in found.values()]
    mapped = {theirs: ours for theirs, ours in found.items() if theirs != ours}
    example = "{" + ", ".join(f"{_key(theirs)}: {ours}" for theirs, ours in mapped.items()) + "}"
    if mapped and not missing:
        return f"Set `data.columns: {example}`"
    unknown = f"{NOTHING_LIKE} {' or '.join(missing)}"
    return f"Set `data.columns: {{name in the data: our name}}`; {unknown}" + (
        f", and the others would be `{example}`" if mapped else ""
    )


def _find(ours: str, aliases: Iterable[str], given: list[str]) -> str | None:
    """The column that has our name or one of its aliases, or ends in such a word, whatever its case and separators."""
    plain = {_normal(column): column for column in reversed(given)}
    words = {re.split(r"[\W_]+", column.casefold().strip())[-1]: column for column in reversed(given)}
    names = [_normal(name) for name in (ours, *aliases)]
    return next((found[name] for found in (plain, words) for name in names if name in found), None)


def _normal(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _key(name: str) -> str:
    """A column's name as a key of YAML."""
    return name if PLAIN_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _separator_hint(given: list[str]) -> str:
    if len(given) != 1:
        return ""
    (name,) = given
    sign = next((sign for sign in SEPARATORS if sign in name), None)
    if sign is None:
        return ""
    return (
        f"The only column, {json.dumps(name, ensure_ascii=False)}, looks like several that are separated by "
        f"{SEPARATORS[sign]}; in .tsv files the separator is a tab: save the file with tabs, or name it .csv"
    )


def unread_lines(unread: Mapping[str, int], rows: int) -> list[str]:
    """The columns that are not read, those whose names carry a meaning first and on a line of their own.

    Args:
        unread: the number of rows that have a value, by column.
        rows: all rows.
    """
    meaningful = [name for name in unread if _normal(name) in MEANINGFUL]
    others = [_named(name, unread[name], rows) for name in unread if name not in meaningful]
    lines = []
    if meaningful:
        names = ", ".join(_named(name, unread[name], rows) for name in meaningful)
        media = any(_normal(name) in MEDIA for name in meaningful)
        reason = ": the model sees text only" if media else ""
        lines.append(f"warning: columns that may be part of the task are not read: {names}{reason}")
    if others:
        lines.append(f"columns not read: {', '.join(others)}")
    return lines


def _named(name: str, count: int, rows: int) -> str:
    return (name or "(no name)") + (f" ({plural(count, 'row')})" if count < rows else "")


def class_columns(head: Iterable[Mapping[str, Any]], names: dict[str, str]) -> list[str]:
    """Columns beside a text whose few values look like classes, and how to train a classifier on them."""
    rows = list(head)
    for theirs, ours in names.items():
        values = {str(row[theirs]) for row in rows if isinstance(row.get(theirs), str | int)}
        if ours.casefold().strip() in ("label", "labels", *CLASSES) and 2 <= len(values) <= min(FEW_CLASSES, len(rows) // 2):
            text = next(theirs for theirs, ours in names.items() if ours == "text")
            columns = f"{{{theirs}: label}}" if text == "text" else f"{{{text}: text, {theirs}: label}}"
            return [
                f"the column '{theirs}' has few values, such as {', '.join(sorted(values)[:3])}: to train a classifier set "
                f"`task: text-classification` and `data.columns: {columns}`"
            ]
    return []
