"""Token rows of preferences: the two sequences of a row one after the other, cut apart at `split`.

A row holds the prompt with the chosen answer and the prompt with the rejected one; or, of an answer with a label, the prompt
with the answer and the prompt with an answer to another prompt, from which KTO estimates the divergence from the reference.
Both count as one row everywhere: in a batch, in the statistics and in `length`. The answer to another prompt is cut to
`max_length` and not counted: whether a row is used depends on its own answer alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hfstrat.data.coverage import Notes
from hfstrat.data.formats import Example, hash_text
from hfstrat.data.preferences import LabeledFormat, Preference, PreferenceFormat
from hfstrat.data.prepare import RowEncoder
from hfstrat.data.render import IGNORED, RENDER_VERSION, Renderer
from hfstrat.data.sources import DataSource
from hfstrat.data.stats import LongRows, Statistics, check
from hfstrat.data.tokenize import BATCH, Writer, first_difference, is_supervised, schema, take_notes
from hfstrat.data.values import BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

VERSION = 2  # of the token rows written here: increase it where they change
CUT_ALIKE = "two answers that are cut to the same tokens"
SEVERAL = "an answer of several turns, of which the chat template renders the earlier ones differently"
NEAR = 64  # earlier answers among which one to another prompt is looked for
SPLIT = "split"  # the column with the length of the first sequence
SHARED = ("images", "spans", "vision_features")  # columns of images that both sequences of a row have
DESIRABLE = "desirable"  # the column with the label of an answer


class Wanted(NamedTuple):
    """The two sequences of a row to be: the number of the row, what it was read as, and `desirable` as in `PairPart`."""

    number: int
    found: Preference
    examples: list[Example]
    desirable: int


class Encoded(NamedTuple):
    """A sequence as token ids and labels; and the start and end of the tokens of each image, where there are some."""

    ids: list[int]
    labels: list[int]
    spans: list[tuple[int, int]] = []


class PairPart(NamedTuple):
    """A token row. `desirable` is 1 or 0 of an answer with a label, -1 of a pair."""

    input_ids: list[int]
    labels: list[int]
    length: int
    row: int
    text_hash: int
    split: int
    desirable: int


class PreferenceEncoder(RowEncoder):
    """Rows of preferences.

    Args:
        unpaired: whether answers are trained on one by one, with their labels.
    """

    def __init__(self, renderer: Renderer, unpaired: bool) -> None:
        super().__init__(renderer)
        self.unpaired = unpaired

    def reader(self, source: DataSource) -> Any:
        return LabeledFormat.detect if self.unpaired else PreferenceFormat.detect

    def options(self, source: DataSource) -> dict[str, Any]:
        names = ("max_length", "overflow", "documents", "chat_template_kwargs")
        given = {name: getattr(source.data, name) for name in names}
        versions = {"render_version": RENDER_VERSION, "preference_version": VERSION}
        return {"template": self.renderer.template, "unpaired": self.unpaired, **versions, **given}

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write_preferences(*source.read(), source.data, self.renderer, self.unpaired, target)


def write_preferences(
    rows: Iterable[Row], reading: PreferenceFormat, data: Data, renderer: Renderer, unpaired: bool, target: Path
) -> Statistics:
    """Write the token rows to an Arrow stream and return their statistics.

    Raises:
        UserError: rows that do not fit their format, too many that cannot be trained on, or too much lost.
    """
    return PreferenceWriter(reading, data, renderer).write(rows, unpaired, target)


class PreferenceWriter:
    """Turns the rows of one source into token rows, and counts what becomes of them.

    Args:
        reading: how its rows are read.
    """

    batch = BATCH  # rows that are tokenized at a time

    def __init__(self, reading: PreferenceFormat, data: Data, renderer: Renderer) -> None:
        self.reading, self.data, self.renderer = reading, data, renderer
        self.stats = Statistics(reading.source, reading.kind, renderer.template, reading.resolve(data.train_on))
        self.stats.warnings += reading.remarks
        self.long_rows = LongRows()
        self.last: list[tuple[Any, list[Any]]] = []  # prompt and answer at the end of the batch before

    def columns(self) -> dict[str, Any]:
        """The columns of the token rows beside those of texts."""
        import pyarrow as pa

        return {SPLIT: pa.int32(), DESIRABLE: pa.int8()}

    def write(self, rows: Iterable[Row], unpaired: bool, target: Path) -> Statistics:
        """Write the token rows to an Arrow stream; as `write_preferences`."""
        import pyarrow as pa

        stats, columns, numbered = self.stats, schema(**self.columns()), enumerate(rows)
        stats.tools_as_text, self.renderer.notes = not self.renderer.supports_tools, Notes()
        with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
            writer = Writer(stream, columns)
            while batch := list(itertools.islice(numbered, self.batch)):
                parts = self.parts(batch, unpaired)
                writer.digest.update(self.digest_of(parts))
                writer.add(parts)
            writer.flush()
        stats.sha256 = writer.digest.hexdigest()
        take_notes(stats, self.renderer)
        self.check()
        return stats

    def check(self) -> None:
        """Raises UserError where too much is lost."""
        check(self.stats, self.long_rows, self.data, can_split=False)

    def digest_of(self, parts: list[Any]) -> bytes:
        """What identifies token rows beside their tokens."""
        return b""

    def parts(self, batch: list[tuple[int, Row]], unpaired: bool) -> list[PairPart]:
        """The token rows of some rows."""
        stats = self.stats
        stats.rows_read += len(batch)
        usable: list[tuple[int, Preference]] = []
        for index, row in batch:
            found = self.read(index, row)
            stats.note(self.reading.unread(row), found.changes)
            stats.rows_with_tools += bool(found.tools)
            if found.problem:
                self._leave_out(found.problem)
            else:
                usable.append((index, found))
        kept = self._unpaired(usable) if unpaired else self._paired(usable)
        counted = (part.labels[: part.split] if unpaired else part.labels for part in kept)
        stats.supervised += sum(label != IGNORED for labels in counted for label in labels)
        stats.tokens += sum(part.length for part in kept)
        return kept

    def _paired(self, rows: list[tuple[int, Preference]]) -> list[PairPart]:
        return self._encoded([Wanted(index, found, found.examples(), -1) for index, found in rows], False)

    def _unpaired(self, rows: list[tuple[int, Preference]]) -> list[PairPart]:
        """One token row for each answer, with the nearest earlier answer to another prompt (of the first, the last)."""
        single = [
            (index, found, answer, number == 0 if found.desirable is None else found.desirable)
            for index, found in rows
            for number, answer in enumerate(found.answers)
        ]
        known = [(self.prompt_key(index, found), answer) for index, found, answer, _ in single]
        wanted = []
        for place, (index, found, answer, desirable) in enumerate(single):
            before = itertools.chain(reversed(known[:place]), self.last, reversed(known[place:]))
            others = (other for prompt, other in itertools.islice(before, NEAR) if prompt != known[place][0])
            other = next(others, known[place - 1][1])  # the same prompt everywhere: any answer to it
            wanted.append(Wanted(index, found, [found.with_answer(answer), found.with_answer(other)], int(desirable)))
        self.last = known[-1:] or self.last
        return self._encoded(wanted, True)

    def prompt_key(self, index: int, found: Preference) -> Any:
        """What two answers to one prompt have in common."""
        return found.messages

    def _encoded(self, wanted: list[Wanted], unpaired: bool) -> list[Any]:
        parts, counted = list[Any](), set[int]()
        for one, sequences in zip(wanted, self.sequences_of(wanted), strict=True):
            made = self._fitted(sequences, self.reading.where(one.number), unpaired)
            if made is None:
                continue
            if one.number not in counted:  # a pair that is read as two answers is one row
                self.stats.rows_kept += 1
                counted.add(one.number)
            parts.append(self.part(one, *made))
        return parts

    def sequences_of(self, wanted: list[Wanted]) -> list[list[list[Encoded]]]:
        """Of each row, for each of its two examples, the sequences that it becomes. Raises UserError, which names the row."""
        rendered = [[self._render(each, self.reading.where(one.number)) for each in one.examples] for one in wanted]
        texts = [row for pair in rendered for one in pair for row in one]
        flat = self.renderer.encode(texts)
        if self.stats.rows_read <= self.batch:  # the first batch
            self.stats.misread = first_difference(self.renderer, texts, flat)
        encoded = iter(flat)
        return [[[Encoded(*pair) for pair in itertools.islice(encoded, len(one))] for one in pair] for pair in rendered]

    def part(self, one: Wanted, first: Encoded, second: Encoded) -> Any:
        """The token row of two sequences."""
        ids, labels, text = first.ids + second.ids, first.labels + second.labels, hash_text(one.found.content)
        return PairPart(ids, labels, len(ids), one.number, text, len(first.ids), one.desirable)

    def _fitted(self, given: list[list[Encoded]], where: str, unpaired: bool) -> list[Encoded] | None:
        """The two sequences of a row within `max_length`; None if it is left out."""
        if any(len(each) != 1 for each in given):
            self._leave_out(SEVERAL)
            return None
        whole = [each[0] for each in given][: 1 if unpaired else 2]
        fitted = [self.fit(one, where) for one in whole]
        self.stats.rows_cut += self.data.overflow == "truncate" and any(len(one.ids) > self.data.max_length for one in whole)
        kept = [one for one in fitted if one is not None]
        if len(kept) < len(fitted):  # overflow: drop
            self.stats.rows_dropped += 1
            return None
        if not all(is_supervised(one[:2]) for one in kept):
            self.stats.rows_unreached += 1
            self.stats.rows_dropped += 1
            return None
        if unpaired:  # the prompt is shorter than max_length, so something of the other answer remains
            return [*kept, _cut(given[1][0], self.data.max_length)]
        if kept[0].ids == kept[1].ids and whole[0].ids != whole[1].ids:
            self._leave_out(CUT_ALIKE)
            return None
        return kept

    def fit(self, one: Encoded, where: str) -> Encoded | None:
        """A sequence within `max_length`; None where it is dropped. What is lost is counted. Raises UserError."""
        limit, length = self.data.max_length, len(one.ids)
        if length <= limit:
            return one
        if self.data.overflow == "error":
            raise UserError(f"{where}: {length} tokens, more than data.max_length = {limit} (data.overflow: error)")
        keep = limit if self.data.overflow == "truncate" else 0
        lost = sum(label != IGNORED for label in one.labels[keep:])
        self.stats.tokens_lost += length - keep
        self.stats.supervised_lost += lost
        self.long_rows.add(length, lost)
        return _cut(one, keep) if keep else None

    def _leave_out(self, reason: str) -> None:
        self.stats.unusable[reason] = self.stats.unusable.get(reason, 0) + 1
        self.stats.rows_dropped += 1

    def read(self, index: int, row: Row) -> Preference:
        """A row as a preference. Raises UserError, which names the row."""
        try:
            return self.reading.example(row)
        except BadRow as error:
            raise UserError(f"{self.reading.where(index)}: {error}") from None

    def _render(self, example: Example, where: str) -> list[Any]:
        try:
            return self.renderer.render(example)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None


def _cut(one: Encoded, length: int) -> Encoded:
    return one._replace(ids=one.ids[:length], labels=one.labels[:length])


def two(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two sequences of a token row, as rows of their own, each with the images of the row."""
    cut, shared = int(row[SPLIT]), {name: row[name] for name in SHARED if name in row}
    first, second = ({name: row[name][part] for name in ("input_ids", "labels")} for part in (slice(cut), slice(cut, None)))
    return first | shared, second | shared


def longest_sequence(rows: Any) -> int:
    """Tokens of the longest sequence in a data set of token rows."""
    from hfstrat.data.splits import column

    rows = getattr(rows, "rows", rows)  # with a column of the reference
    first = column(rows, SPLIT).astype(np.int64)
    return int(np.maximum(first, column(rows, "length") - first).max())
