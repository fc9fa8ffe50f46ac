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
from hfstrat.data.tokenize import BATCH, Encoded, Writer, first_difference, is_supervised, schema, take_notes
from hfstrat.data.values import BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

VERSION = 2  # of the token rows written here: increase it where they change
CUT_ALIKE = "two answers that are cut to the same tokens"
SEVERAL = "an answer of several turns, of which the chat template renders the earlier ones differently"
NEAR = 64  # earlier answers among which one to another prompt is looked for
SPLIT = "split"  # the column with the length of the first sequence
DESIRABLE = "desirable"  # the column with the label of an answer


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
    import pyarrow as pa

    stats = Statistics(reading.source, reading.kind, renderer.template, reading.resolve(data.train_on))
    stats.warnings += reading.remarks
    stats.tools_as_text = not renderer.supports_tools
    renderer.notes = Notes()
    columns = schema(split=pa.int32(), desirable=pa.int8())
    worker = _Rows(reading, data, renderer, stats)
    numbered = enumerate(rows)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
        writer = Writer(stream, columns)
        while batch := list(itertools.islice(numbered, BATCH)):
            writer.add(worker.parts(batch, unpaired))
        writer.flush()
    stats.sha256 = writer.digest.hexdigest()
    take_notes(stats, renderer)
    check(stats, worker.long_rows, data, can_split=False)
    return stats


class _Rows:
    """Turns rows into token rows, and counts what becomes of them."""

    def __init__(self, reading: PreferenceFormat, data: Data, renderer: Renderer, stats: Statistics) -> None:
        self.reading, self.data, self.renderer, self.stats = reading, data, renderer, stats
        self.long_rows = LongRows()
        self.last: list[tuple[list[Any], list[Any]]] = []  # prompt and answer at the end of the batch before

    def parts(self, batch: list[tuple[int, Row]], unpaired: bool) -> list[PairPart]:
        """The token rows of some rows."""
        stats = self.stats
        stats.rows_read += len(batch)
        usable: list[tuple[int, Preference]] = []
        for index, row in batch:
            found = self._read(row, self.reading.where(index))
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
        wanted = [(index, found, found.examples(), -1) for index, found in rows]
        return self._encoded(wanted, False)

    def _unpaired(self, rows: list[tuple[int, Preference]]) -> list[PairPart]:
        """One token row for each answer, with the nearest earlier answer to another prompt (of the first, the last)."""
        single = [
            (index, found, answer, number == 0 if found.desirable is None else found.desirable)
            for index, found in rows
            for number, answer in enumerate(found.answers)
        ]
        known = [(found.messages, answer) for _, found, answer, _ in single]
        wanted = []
        for place, (index, found, answer, desirable) in enumerate(single):
            before = itertools.chain(reversed(known[:place]), self.last, reversed(known[place:]))
            others = (other for prompt, other in itertools.islice(before, NEAR) if prompt != found.messages)
            other = next(others, known[place - 1][1])  # the same prompt everywhere: any answer to it
            wanted.append((index, found, [found.with_answer(answer), found.with_answer(other)], int(desirable)))
        self.last = known[-1:] or self.last
        return self._encoded(wanted, True)

    def _encoded(self, wanted: list[tuple[int, Preference, list[Example], int]], unpaired: bool) -> list[PairPart]:
        rendered = []
        for index, _, examples, _ in wanted:
            rendered.append([self._render(example, self.reading.where(index)) for example in examples])
        texts = [row for pair in rendered for one in pair for row in one]
        flat = self.renderer.encode(texts)
        if self.stats.rows_read <= BATCH:  # the first batch
            self.stats.misread = first_difference(self.renderer, texts, flat)
        encoded, parts, counted = iter(flat), list[PairPart](), set[int]()
        for (index, found, _, desirable), pair in zip(wanted, rendered, strict=True):
            sequences = [list(itertools.islice(encoded, len(one))) for one in pair]
            made = self._sequences(sequences, self.reading.where(index), unpaired)
            if made is None:
                continue
            if index not in counted:  # a pair that is read as two answers is one row
                self.stats.rows_kept += 1
                counted.add(index)
            (ids, labels), (other_ids, other_labels) = made
            all_ids, all_labels = ids + other_ids, labels + other_labels
            text = hash_text(found.content)
            parts.append(PairPart(all_ids, all_labels, len(all_ids), index, text, len(ids), desirable))
        return parts

    def _sequences(self, given: list[list[Encoded]], where: str, unpaired: bool) -> list[Encoded] | None:
        """The two sequences of a row within `max_length`; None if it is left out."""
        if any(len(each) != 1 for each in given):
            self._leave_out(SEVERAL)
            return None
        whole = [each[0] for each in given][: 1 if unpaired else 2]
        fitted = [self._fit(*one, where) for one in whole]
        self.stats.rows_cut += self.data.overflow == "truncate" and any(len(ids) > self.data.max_length for ids, _ in whole)
        kept = [one for one in fitted if one is not None]
        if len(kept) < len(fitted):  # overflow: drop
            self.stats.rows_dropped += 1
            return None
        if not all(map(is_supervised, kept)):
            self.stats.rows_unreached += 1
            self.stats.rows_dropped += 1
            return None
        if unpaired:  # the prompt is shorter than max_length, so something of the other answer remains
            ids, labels = given[1][0]
            return [*kept, (ids[: self.data.max_length], labels[: self.data.max_length])]
        if kept[0][0] == kept[1][0] and whole[0][0] != whole[1][0]:
            self._leave_out(CUT_ALIKE)
            return None
        return kept

    def _fit(self, ids: list[int], labels: list[int], where: str) -> Encoded | None:
        """A sequence within `max_length`; None where it is dropped. What is lost is counted."""
        limit = self.data.max_length
        if len(ids) <= limit:
            return ids, labels
        if self.data.overflow == "error":
            raise UserError(f"{where}: {len(ids)} tokens, more than data.max_length = {limit} (data.overflow: error)")
        keep = limit if self.data.overflow == "truncate" else 0
        lost = sum(label != IGNORED for label in labels[keep:])
        self.stats.tokens_lost += len(ids) - keep
        self.stats.supervised_lost += lost
        self.long_rows.add(len(ids), lost)
        return (ids[:keep], labels[:keep]) if keep else None

    def _leave_out(self, reason: str) -> None:
        self.stats.unusable[reason] = self.stats.unusable.get(reason, 0) + 1
        self.stats.rows_dropped += 1

    def _read(self, row: Row, where: str) -> Preference:
        try:
            return self.reading.example(row)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None

    def _render(self, example: Example, where: str) -> list[Any]:
        try:
            return self.renderer.render(example)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None


def two(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two sequences of a token row, as rows of their own."""
    cut = int(row[SPLIT])
    first, second = ({name: row[name][part] for name in ("input_ids", "labels")} for part in (slice(cut), slice(cut, None)))
    return first, second


def longest_sequence(rows: Any) -> int:
    """Tokens of the longest sequence in a data set of token rows."""
    from hfstrat.data.splits import column

    rows = getattr(rows, "rows", rows)  # with a column of the reference
    first = column(rows, SPLIT).astype(np.int64)
    return int(np.maximum(first, column(rows, "length") - first).max())
