"""The rows of one source written to an Arrow file of token ids and labels, a batch at a time.

Why not `Dataset.map` or `Dataset.from_generator`: memory must not grow with the data (40 MiB for a million rows, measured by
benchmarks/data_memory.py), and every row and token has to be counted on the way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.coverage import Notes
from hfstrat.data.formats import Example, RowFormat, check_train_on, hash_text
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.segments import Rendered
from hfstrat.data.stats import LongRows, Statistics, check
from hfstrat.data.values import BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    import pyarrow

BATCH = 1000  # rows tokenized at a time
RECORD_BATCH_TOKENS = 1 << 17
DECODED_ROWS = 32  # rows that are decoded again, to check that they reproduce the input

Encoded = tuple[list[int], list[int]]  # token ids and labels


class Part(NamedTuple):
    """A prepared row: a row of the source, or one of several that it became (`overflow: split`, or one per answer)."""

    input_ids: list[int]
    labels: list[int]
    length: int
    row: int
    text_hash: int


def schema(**more: pyarrow.DataType) -> pyarrow.Schema:
    """Columns of the prepared data. `row` is the index of the source row, `text_hash` that of its normalized text."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    columns = {"input_ids": ids, "labels": ids, "length": pa.int32(), "row": pa.int64(), "text_hash": pa.int64(), **more}
    return pa.schema(columns.items())


def write_tokens(rows: Iterable[Row], row_format: RowFormat, data: Data, renderer: Renderer, target: Path) -> Statistics:
    """Write the prepared rows to an Arrow stream (see `schema`) and return their statistics.

    Raises:
        UserError: rows that do not fit their format, or too much lost (`stats.check`).
    """
    import pyarrow as pa

    check_train_on(data, row_format)
    stats = Statistics(row_format.source, row_format.kind, renderer.template, row_format.resolve(data.train_on))
    stats.warnings += row_format.remarks
    stats.tools_as_text = not renderer.supports_tools
    renderer.notes = Notes()
    long_rows = LongRows()
    numbered = enumerate(rows)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema()) as stream:
        writer = Writer(stream, schema())
        while batch := list(itertools.islice(numbered, BATCH)):
            writer.add(_tokenize_batch(batch, row_format, data, renderer, stats, long_rows))
        writer.flush()
    stats.sha256 = writer.digest.hexdigest()
    take_notes(stats, renderer)
    check(stats, long_rows, data)
    return stats


def take_notes(stats: Statistics, renderer: Renderer) -> None:
    """Add what the renderer noted to the statistics."""
    notes = renderer.notes
    stats.turns_blank, stats.turns_skipped, stats.turns_unopened = notes.blank, notes.skipped, notes.unopened
    stats.unopened_by, stats.left_out, stats.rewritten = notes.unopened_by, dict(notes.left_out), dict(notes.rewritten)
    stats.left_out_examples = [notes.shown[kind] for kind in notes.left_out]
    stats.rows_with_tools -= notes.without_definitions
    stats.template_options = renderer.options_read if notes.unopened else []
    if stats.format != "text":
        stats.end_remark = renderer.end_remark


class Writer:
    """Writes large record batches (RECORD_BATCH_TOKENS), since opening the file reads the header of each.

    Args:
        columns: the schema that `stream` was opened with, whose columns are the fields of the parts.
    """

    def __init__(self, stream: Any, columns: pyarrow.Schema) -> None:
        self.stream, self.columns, self.digest = stream, columns, hashlib.sha256()
        self.batches: list[Any] = []
        self.tokens = 0

    def add(self, parts: Sequence[Any]) -> None:
        import pyarrow as pa

        if not parts:
            return
        batch = pa.record_batch([list(column) for column in zip(*parts, strict=True)], schema=self.columns)
        for name in ("input_ids", "labels"):
            self.digest.update(batch.column(name).flatten().to_numpy().data)
        self.batches.append(batch)
        self.tokens += sum(part.length for part in parts)
        if self.tokens >= RECORD_BATCH_TOKENS:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        for batch in pa.Table.from_batches(self.batches, self.columns).combine_chunks().to_batches():
            self.stream.write_batch(batch)
        self.batches, self.tokens = [], 0


class RenderedRow(NamedTuple):
    """A row of the source as an example and as texts, with its number (in `Part.row`) and its name for messages."""

    number: int
    row: Row
    example: Example
    texts: list[Rendered]
    where: str


def _tokenize_batch(
    batch: list[tuple[int, Row]],
    row_format: RowFormat,
    data: Data,
    renderer: Renderer,
    stats: Statistics,
    long_rows: LongRows,
) -> list[Part]:
    rendered = [_render(index, row, row_format, renderer, row_format.where(index)) for index, row in batch]
    return list(itertools.chain.from_iterable(tokenize_rows(rendered, row_format, data, renderer, stats, long_rows)))


def tokenize_rows(
    rows: list[RenderedRow],
    row_format: RowFormat,
    data: Data,
    renderer: Renderer,
    stats: Statistics,
    long_rows: LongRows | None,
) -> list[list[Part]]:
    """The parts of each row, which are added to the statistics.

    Args:
        long_rows: takes the lengths of rows beyond `max_length`; None where these are not collected.
    """
    texts = [each for row in rows for each in row.texts]
    flat = renderer.encode(texts)
    if not stats.rows_kept:  # the first batch
        stats.misread = first_difference(renderer, texts, flat)
    encoded, parts = iter(flat), list[list[Part]]()
    for index, row, example, rendered, where in rows:
        stats.note(row_format.unread(row), example.changes)
        stats.rows_read += 1
        stats.rows_with_tools += bool(example.tools)
        stats.rows_unrolled += len(rendered) > 1
        stats.unrolled_into += len(rendered) if len(rendered) > 1 else 0
        mine = list(itertools.islice(encoded, len(rendered)))
        kept = _supervised_parts(example, mine, data, stats, long_rows, where)
        stats.rows_kept += bool(kept)
        stats.rows_dropped += not kept
        stats.supervised += sum(label != IGNORED for _, labels in kept for label in labels)
        stats.tokens += sum(len(ids) for ids, _ in kept)
        parts.append([Part(ids, labels, len(ids), index, hash_text(example.content)) for ids, labels in kept])
    return parts


def first_difference(renderer: Renderer, rows: list[Rendered], encoded: list[Encoded]) -> str:
    """The first difference between the text of the first rows and what their ids decode to; empty if there is none."""
    for row, (ids, _) in zip(rows[:DECODED_ROWS], encoded, strict=False):
        if found := renderer.decoding_difference(row, ids):
            return f"{json.dumps(found[0], ensure_ascii=False)} decodes to {json.dumps(found[1], ensure_ascii=False)}"
    return ""


def _supervised_parts(
    example: Example, encoded: list[Encoded], data: Data, stats: Statistics, long_rows: LongRows | None, where: str
) -> list[Encoded]:
    """The parts of one source row that are trained on; what is lost is added to the statistics."""
    live = [pair for pair in encoded if example.has_target and is_supervised(pair)]
    stats.tokens_lost += sum(len(ids) for ids, _ in encoded) - sum(len(ids) for ids, _ in live)
    stats.rows_blank += not live
    parts = [part for ids, labels in live for part in _fit(ids, labels, data, stats, long_rows, where)]
    kept = [part for part in parts if is_supervised(part)]
    stats.tokens_lost += sum(len(part) for part, _ in parts) - sum(len(part) for part, _ in kept)
    stats.rows_unreached += bool(parts) and not kept
    if parts and any(len(ids) > data.max_length for ids, _ in live):
        stats.rows_split += data.overflow == "split"
        stats.rows_cut += data.overflow != "split"
    return kept


def is_supervised(encoded: Encoded) -> bool:
    return any(label != IGNORED for label in encoded[1])


def _render(index: int, row: Row, row_format: RowFormat, renderer: Renderer, where: str) -> RenderedRow:
    try:
        return render_row(index, row, row_format, renderer, where)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def render_row(index: int, row: Row, row_format: RowFormat, renderer: Renderer, where: str) -> RenderedRow:
    """The row as texts. Raises BadRow if it does not fit its format."""
    example = row_format.example(row)
    return RenderedRow(index, row, example, renderer.render(example), where)


def _fit(
    ids: list[int], labels: list[int], data: Data, stats: Statistics, long_rows: LongRows | None, where: str
) -> list[Encoded]:
    """The row within `max_length`, as one part, several or none; what is lost is added to the statistics."""
    limit = data.max_length
    if len(ids) <= limit:
        return [(ids, labels)]
    if data.overflow == "error":
        raise UserError(f"{where}: {len(ids)} tokens, more than data.max_length = {limit} (data.overflow: error)")
    if data.overflow == "split":
        return split(ids, labels, limit)
    keep = limit if data.overflow == "truncate" else 0
    lost = sum(label != IGNORED for label in labels[keep:])
    stats.tokens_lost += len(ids) - keep
    stats.supervised_lost += lost
    if long_rows is not None:
        long_rows.add(len(ids), lost)
    return [(ids[:keep], labels[:keep])] if keep else []


def split(ids: list[int], labels: list[int], limit: int) -> list[Encoded]:
    """Parts of at most `limit` tokens. Each begins with the last token of the part before, as context without loss, so that
    every supervised token is predicted exactly once."""
    starts = range(0, max(1, len(ids) - 1), limit - 1)
    return [(ids[start : start + limit], [IGNORED, *labels[start + 1 : start + limit]]) for start in starts]
