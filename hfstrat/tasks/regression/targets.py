"""How texts, or pairs of texts, with one or several numbers are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hfstrat.data.formats import BadRow, rename, require_text
from hfstrat.data.labeled import PAIRS, TEXTS, LabeledText
from hfstrat.errors import UserError

FORMAT = "regression"
TARGET = "target"
TARGETS = (TARGET, "targets", "label", "labels", "score", "scores", "rating", "value", "y")
CLASSES = "Classes are for task: text-classification"
INCOMPLETE = "Remove rows whose targets are not all known"
COLUMNS = sorted({*TARGETS, *TEXTS, *(name for pair in PAIRS for name in pair)})


class MeasuredText(LabeledText):
    """An example: its text, the second one of a pair, and its targets as numbers."""

    @property
    def stratum(self) -> str:
        """Held-out examples are drawn from all alike: numbers are no classes."""
        return ""


@dataclass
class TargetFormat:
    """How the rows of one source are read.

    `names` are our names by theirs, `columns` our names of the text and the second text ("" for none), `targets` their names
    of the columns with numbers; `size` is how many numbers the list of a single column has, 0 where it has a number.
    """

    source: str
    names: dict[str, str]
    columns: tuple[str, str]
    targets: list[str]
    size: int
    values: ClassVar[tuple[str, str]] = ("targets", "double")  # of the prepared column
    many: ClassVar[bool] = False

    @classmethod
    def detect(cls, head: list[dict[str, Any]], source: str, wanted: str, mapping: dict[str, str]) -> TargetFormat:
        """Detected from the first rows; columns that `mapping` calls `target` are the targets, one or several.

        Raises:
            UserError: columns that do not exist, or that are no text with numbers.
        """
        if wanted not in ("auto", FORMAT):
            raise UserError(f"data.format: {wanted} is for another task; for regression expected {FORMAT} or auto")
        given = list(dict.fromkeys(name for row in head for name in row))
        targets = [theirs for theirs, ours in mapping.items() if ours == TARGET and theirs in given]
        names = rename(given, mapping if len(targets) < 2 else {k: v for k, v in mapping.items() if v != TARGET}, source)
        ours = set(names.values())
        if not targets:
            targets = [next((theirs for name in TARGETS for theirs, our in names.items() if our == name), "")]
        pair = next((pair for pair in PAIRS if set(pair) <= ours), None)
        text = next((name for name in TEXTS if name in ours), None)
        if not targets[0] or not (pair or text):
            raise UserError(
                f"{source}: task regression needs text + score, or a pair such as sentence1 + sentence2 + score; there are "
                f"{', '.join(given) or 'no columns'}. Map them, such as `columns: {{review: text, stars: target}}`"
            )
        first = next((row[targets[0]] for row in head if row.get(targets[0]) is not None), None)
        size = len(first) if isinstance(first, list | tuple) and len(targets) == 1 else 0
        return cls(source, names, pair or (str(text), ""), targets, size)

    @property
    def kind(self) -> str:
        """The columns as text."""
        return " + ".join([*filter(None, self.columns), *self.targets])

    @property
    def target_names(self) -> list[str]:
        """A name for each number."""
        return [f"{self.targets[0]}_{index}" for index in range(self.size)] if self.size else self.targets

    def example(self, row: Mapping[str, Any]) -> MeasuredText:
        """Raises BadRow where the row does not fit."""
        named = {ours: row.get(theirs) for theirs, ours in self.names.items()}
        first, second = self.columns
        targets: Any = self._numbers(row)
        return MeasuredText(require_text(named[first], first), require_text(named[second], second) if second else None, targets)

    def _numbers(self, row: Mapping[str, Any]) -> list[float]:
        if not self.size:
            return [number(row.get(column), column) for column in self.targets]
        column, values = self.targets[0], row.get(self.targets[0])
        if not isinstance(values, list | tuple) or len(values) != self.size:
            given = f"a list of {len(values)}" if isinstance(values, list | tuple) else repr(values)
            raise BadRow(f"'{column}' is {given}; expected a list of {self.size} numbers, as in the first row")
        return [number(value, f"{column}[{index}]") for index, value in enumerate(values)]

    def where(self, index: int) -> str:
        return f"{self.source}: row {index + 1}"


def number(value: Any, column: str) -> float:
    """A target as a float; text that is a number, as CSV files have it, is read.

    Raises:
        BadRow: a missing, infinite or textual value.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"'{column}' is {'missing' if value is None else 'empty'}; expected a number. {INCOMPLETE}")
    if isinstance(value, bool):
        raise BadRow(f"'{column}' is {str(value).lower()}; expected a number. {CLASSES}")
    if isinstance(value, list | tuple):
        raise BadRow(f"'{column}' is a list; expected a number as in the first rows (lists of several targets in all rows)")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"'{column}' is {value!r}; expected a number. {_hint(value)}") from None
    except OverflowError:  # an integer of JSON has any size
        found = math.inf
    if not math.isfinite(found):
        raise BadRow(f"'{column}' is {found}; expected a finite number. {INCOMPLETE}")
    return found


def _hint(value: Any) -> str:
    """What to write instead of a text that is no number."""
    parts = [part.strip() for part in str(value).strip("[]() ").split(",")]
    if not all(part.lstrip("+-").replace(".", "", 1).isdigit() for part in parts):
        return CLASSES
    return "Write decimals with a point, and several targets as a list of numbers or as columns mapped to target"
