"""Rows of a classification: a text or a pair of texts, with a label or several."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from hfstrat.data.formats import BadRow, rename, require_text
from hfstrat.errors import UserError

FORMAT = "text-classification"
LABELS = ("label", "labels")
PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXTS = ("text", "sentence")
OUR_COLUMNS = sorted({*LABELS, *TEXTS, *(name for pair in PAIRS for name in pair)})
ALIASES = {  # other names of a text and its label, for the proposed mapping
    "text": ("content", "review", "comment", "document", "body", "message", "tweet", "utterance", "query", "question", "title"),
    "label": ("class", "category", "intent", "sentiment", "target", "topic", "tag", "y", "label_text", "coarse_label"),
}


class LabeledText(NamedTuple):
    """A row: its text, the second text of a pair, and the names of its labels (one, or any number with `many`)."""

    text: str
    pair: str | None
    labels: list[str]

    @property
    def stratum(self) -> str:
        """The labels, in whose proportions examples are held out."""
        return str(self.labels)

    @property
    def has_target(self) -> bool:
        """Whether there is a text to train on."""
        return bool(self.content.strip())

    @property
    def content(self) -> str:
        """Both texts, without the labels; equal for duplicates."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"


@dataclass
class LabelFormat:
    """How the rows of one source are read.

    `columns` are our names of the text, the second text ("" for none) and the label; `class_names` are the names of a Hub
    data set's label ids; `many`: a row has a list of labels.
    """

    source: str
    names: dict[str, str]
    columns: tuple[str, str, str]
    many: bool
    class_names: list[str] | None = None
    values: ClassVar[tuple[str, str]] = ("names", "string")  # name and type of the prepared column

    @classmethod
    def detect(
        cls, head: list[dict[str, Any]], source: str, wanted: str, mapping: dict[str, str], names: list[str] | None = None
    ) -> LabelFormat:
        """The format of a source, detected from its first rows.

        Raises:
            UserError: a mapped column is missing, or the columns are not a text with its label.
        """
        if wanted not in ("auto", FORMAT):
            raise UserError(f"data.format: {wanted} is for task: causal-lm; expected {FORMAT} or auto")
        renamed = rename(dict.fromkeys(name for row in head for name in row), mapping, source)
        columns = choose(list(renamed.values()), source)
        theirs = next(column for column, ours in renamed.items() if ours == columns[2])
        return cls(source, renamed, columns, any(isinstance(row.get(theirs), list | tuple) for row in head), names)

    @property
    def kind(self) -> str:
        """The columns as text."""
        return " + ".join(filter(None, self.columns)) + (" (any number of labels per row)" if self.many else "")

    def example(self, row: Mapping[str, Any]) -> LabeledText:
        """Raises BadRow where the row does not fit."""
        named = {ours: row.get(theirs) for theirs, ours in self.names.items()}
        first, second, label = self.columns
        labels = self._labels(named[label], label)
        return LabeledText(require_text(named[first], first), require_text(named[second], second) if second else None, labels)

    def _labels(self, value: Any, column: str) -> list[str]:
        if not self.many:
            return [label_of(value, column, self.class_names)]
        if not isinstance(value, list | tuple):
            raise BadRow(f"'{column}' is {value!r}, but other rows have a list; expected a list, or [] for no label")
        found = [label_of(each, column, self.class_names) for each in value]
        if len(set(found)) < len(found):
            raise BadRow(
                f"'{column}' contains duplicate labels; expected the labels that apply, "
                "such as [1, 4] (vectors of 0 and 1 are not supported)"
            )
        return found

    def where(self, index: int) -> str:
        return f"{self.source}: row {index + 1}"


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
        raise BadRow(f"'{column}' is a list, but other rows have one label; expected a list in all of them, or in none")
    if not isinstance(value, str | int) or not str(value).strip():
        given = "empty" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise BadRow(f"'{column}' is {given}; expected a label, a text or a whole number")
    return str(value).strip()


def choose(given: list[str], source: str) -> tuple[str, str, str]:
    """Our names of the text, the second text ("" for none) and the label.

    Raises:
        UserError: the columns do not fit; the message lists them and shows how to map them.
    """
    label = next((name for name in LABELS if name in given), None)
    pair = next((pair for pair in PAIRS if set(pair) <= set(given)), None)
    text = next((name for name in TEXTS if name in given), None)
    if label and (pair or text):
        return (*pair, label) if pair else (str(text), "", label)
    shape = f"text + label, or a pair such as premise + hypothesis + label; the data have {', '.join(given) or 'no columns'}"
    raise UserError(
        f"{source}: task text-classification needs {shape}. Map them under data, for example `columns: {{{_proposal(given)}}}`"
    )


def _proposal(given: list[str]) -> str:
    """A mapping of these columns as far as their names suggest one, else an example."""
    pairs = {ours: next((n for n in given if n.lower() in names), None) for ours, names in ALIASES.items() if ours not in given}
    if all(pairs.values()):
        return ", ".join(f"{theirs}: {ours}" for ours, theirs in pairs.items())
    return "review: text, sentiment: label"


def sort_labels(names: Iterable[str], known: list[str] | None = None) -> list[str]:
    """Labels in the order of the data set, else in natural order: numbers by value, "b2" before "b10"."""
    if known is not None:
        return sorted(names, key=known.index)
    return sorted(names, key=_natural)


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
