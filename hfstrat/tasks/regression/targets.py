"""How texts, or pairs of texts, with one or several numbers are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hfstrat.data.columns import Reading, columns_of, propose, rename
from hfstrat.data.labeled import PAIRS, TEXTS, LabeledText, choose_texts, repaired, wanted_texts
from hfstrat.data.values import BadRow, is_missing, require_text, shown
from hfstrat.errors import UserError

FORMAT = "regression"
TARGET = "target"
TARGETS = (TARGET, "targets", "label", "labels", "score", "scores", "rating", "value", "y")
CLASSES = "Classes are for task: text-classification"
INCOMPLETE = "Remove rows whose targets are not all known"
OTHER_TARGETS = ("stars", "grade", "similarity", "price", "points", "number", "quality", "strength")  # for a proposed mapping
COLUMNS = sorted({*TARGETS, *TEXTS, *(name for pair in PAIRS for name in pair)})


class MeasuredText(LabeledText):
    """An example: its text, the second one of a pair, and its targets as numbers."""

    @property
    def stratum(self) -> str:
        """Held-out examples are drawn from all alike: numbers are no classes."""
        return ""


@dataclass
class TargetFormat(Reading):
    """How the rows of one source are read.

    `columns` are our names of the text and the second text ("" for none), `targets` the data's names of the columns with
    numbers; `size` is how many numbers the list of a single column has, 0 where it has a number.
    """

    columns: tuple[str, str] = ("", "")
    targets: list[str] = field(default_factory=list)
    size: int = 0
    values_of: ClassVar[tuple[str, str]] = ("targets", "double")  # of the prepared column
    many: ClassVar[bool] = False

    @classmethod
    def detect(
        cls,
        head: list[dict[str, Any]],
        source: str,
        wanted: str,
        mapping: dict[str, str],
        features: Mapping[str, list[str]] | None = None,
    ) -> TargetFormat:
        """Detected from the first rows; columns that `mapping` calls `target` are the targets, one or several.

        Raises:
            UserError: columns that do not exist, or that are no text with numbers.
        """
        if wanted not in ("auto", FORMAT):
            raise UserError(f"data.format: {wanted} is for another task; for regression expected {FORMAT} or auto")
        given = columns_of(head)
        targets = [theirs for theirs, ours in mapping.items() if ours == TARGET and theirs in given]
        names = rename(given, mapping if len(targets) < 2 else {k: v for k, v in mapping.items() if v != TARGET}, source)
        ours = set(names.values())
        if not targets:
            targets = [next((theirs for name in TARGETS for theirs, our in names.items() if our == name), "")]
        texts = choose_texts(ours)
        if not targets[0] or texts is None:
            aliases = wanted_texts(given) if texts is None else {}
            aliases |= {} if targets[0] else {TARGET: (*TARGETS, *OTHER_TARGETS)}
            raise UserError(
                f"{source}: task regression needs text + score, or a pair such as sentence1 + sentence2 + score; there are "
                f"{', '.join(given) or 'no columns'}. {propose(given, aliases)}"
            )
        first = next((row[targets[0]] for row in head if not is_missing(row.get(targets[0]))), None)
        size = len(first) if isinstance(first, list | tuple) and len(targets) == 1 else 0
        reads = frozenset([*filter(None, texts), *(names[target] for target in targets)])
        return cls(source, names, texts, targets, size, reads=reads)

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
        named = self.values(row)
        first, second = self.columns
        targets: Any = self._numbers(row)
        pair = require_text(named[second], second) if second else None
        return repaired(MeasuredText(require_text(named[first], first), pair, targets))

    def _numbers(self, row: Mapping[str, Any]) -> list[float]:
        if not self.size:
            return [number(row.get(column), column) for column in self.targets]
        column, values = self.targets[0], row.get(self.targets[0])
        if not isinstance(values, list | tuple) or len(values) != self.size:
            given = f"a list of {len(values)}" if isinstance(values, list | tuple) else shown(values)
            raise BadRow(f"'{column}' is {given}; expected a list of {self.size} numbers, as in the first row")
        return [number(value, f"{column}[{index}]") for index, value in enumerate(values)]


def number(value: Any, column: str) -> float:
    """A target as a float; text that is a number, as CSV files have it, is read.

    Raises:
        BadRow: a missing, infinite or textual value.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"'{column}' is {'missing' if is_missing(value) else 'empty'}; expected a number. {INCOMPLETE}")
    if isinstance(value, bool):
        raise BadRow(f"'{column}' is {str(value).lower()}; expected a number. {CLASSES}")
    if isinstance(value, list | tuple):
        raise BadRow(f"'{column}' is a list; expected a number as in the first rows (lists of several targets in all rows)")
    try:
        if isinstance(value, str) and "_" in value:  # Python reads 1_000
            raise ValueError
        found = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"'{column}' is {shown(value)}; expected a number. {_hint(value)}") from None
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
