"""Rows of a mapped Arrow file, some of them, in some order: numbers for each row in memory (16 bytes), and no tokens.

Rows of one source into an Arrow file of token ids, a batch at a time: memory does not grow with the data."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data.formats import Example, Reading, check_train_on
from hfstrat.data.messages import BadRow
from hfstrat.data.readers import Row
from hfstrat.data.render import IGNORED, Rendered, Renderer
from hfstrat.data.stats import Account, Overlong, check
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset


def read_numbers(file: Path, kinds: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """Columns of numbers of an Arrow stream, `[count]` each, as the NumPy types in `kinds`.

    The file is mapped for this alone, and pages that were looked at are given back on the way: else the columns of short
    rows, which lie between their tokens, would bring all tokens into memory with them.
    """
    import pyarrow as pa

    found = {name: np.empty(count, kind) for name, kind in kinds.items()}
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = 0
    for batch in pa.ipc.open_stream(pa.py_buffer(mapped)):
        for name, values in found.items():
            values[start : start + len(batch)] = batch.column(name).to_numpy()
        start += len(batch)
        mapped.madvise(mmap.MADV_DONTNEED)
    return found


@dataclass(frozen=True)
class Selection:
    """Some of the rows of a table.

    Args:
        table: the mapped rows of all sources, `[n]`.
        row: the number of each one's row over all sources, `[n]`; never smaller than the one before, since pieces of a row
            (`overflow: split`) follow one another.
        length: tokens, `[n]`.
        text_hash: the same for rows of the same text, `[n]`.
        places: which of them, in which order, `[rows]`; None for all.
    """

    table: Dataset
    row: np.ndarray
    length: np.ndarray
    text_hash: np.ndarray
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row if self.places is None else self.places)

    def of(self, column: np.ndarray) -> np.ndarray:
        """The part of a column of the table that belongs to these rows, `[rows]`."""
        return column if self.places is None else column[self.places]

    def select(self, places: np.ndarray) -> Selection:
        """Some of these."""
        return replace(self, places=places if self.places is None else self.places[places])

    def lengths(self) -> np.ndarray:
        """Tokens of each, `[rows]`."""
        return self.of(self.length)

    def digest(self) -> str:
        """SHA-256 over which rows these are, in which order and of which lengths."""
        found = hashlib.sha256()
        for column in (self.row, self.length):
            found.update(np.ascontiguousarray(self.of(column)).data)
        return found.hexdigest()

    def dataset(self) -> Dataset:
        """As a data set without the column `text_hash`.

        `Dataset.select` would do, but makes a Python list of the places first, of 40 bytes each.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        rows = self.table.remove_columns("text_hash")
        if self.places is None:
            return rows
        name = hashlib.sha256(self.places.data).hexdigest()[:32]
        indices = InMemoryTable(pa.table({"indices": pa.array(self.places.view(np.uint64))}))
        return Dataset(rows.data, info=rows.info, split=rows.split, indices_table=indices, fingerprint=name)


BATCH = 1000  # rows


WRITTEN = 1 << 17  # tokens


HASH_BYTES = 8


READ_BACK = 32  # rows that are decoded again, to see whether they say what was given


Encoded = tuple[list[int], list[int]]  # token ids and labels


class Piece(NamedTuple):
    """A row of the prepared data: a row of the source, or one of several that it became (`overflow: split`, or one for each
    answer, see `places`)."""

    input_ids: list[int]
    labels: list[int]
    length: int
    row: int
    text_hash: int


def schema() -> pyarrow.Schema:
    """Columns of the prepared data. `row` is the row of the source, `text_hash` that of its normalised text."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {"input_ids": ids, "labels": ids, "length": pa.int32(), "row": pa.int64(), "text_hash": pa.int64()}.items()
    )


def tokenise(rows: Iterable[Row], reading: Reading, data: Data, renderer: Renderer, target: Path) -> Account:
    """Write the prepared rows into an Arrow stream; see `schema`.

    Raises:
        UserError: rows that do not fit their format, or too much lost (`account.check`).
    """
    import pyarrow as pa

    check_train_on(data, reading)
    account = Account(reading.source, reading.kind, renderer.template, reading.resolve(data.train_on))
    account.tools_as_text = not renderer.knows_tools
    overlong = Overlong()
    numbered = enumerate(rows)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema()) as stream:
        writer = _Writer(stream)
        while batch := list(itertools.islice(numbered, BATCH)):
            writer.add(_batch(batch, reading, data, renderer, account, overlong))
        writer.flush()
    account.sha256 = writer.digest.hexdigest()
    check(account, overlong, data)
    return account


class _Writer:
    """Pieces into batches of about WRITTEN tokens: opening the file looks at the beginning of each, so let them be large."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.digest = stream, hashlib.sha256()
        self.batches: list[Any] = []
        self.tokens = 0

    def add(self, pieces: list[Piece]) -> None:
        import pyarrow as pa

        if not pieces:
            return
        batch = pa.record_batch([list(column) for column in zip(*pieces, strict=True)], schema=schema())
        for name in ("input_ids", "labels"):
            self.digest.update(batch.column(name).flatten().to_numpy().data)
        self.batches.append(batch)
        self.tokens += sum(piece.length for piece in pieces)
        if self.tokens >= WRITTEN:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        for batch in pa.Table.from_batches(self.batches, schema()).combine_chunks().to_batches():
            self.stream.write_batch(batch)
        self.batches, self.tokens = [], 0


def _batch(
    batch: list[tuple[int, Row]], reading: Reading, data: Data, renderer: Renderer, account: Account, overlong: Overlong
) -> list[Piece]:
    account.rows_read += len(batch)
    pairs = [_render(row, reading, renderer, reading.where(index)) for index, row in batch]
    pieces: list[Piece] = []
    texts = [each for _, rendered in pairs for each in rendered]
    flat = renderer.encode(texts)
    if account.rows_read == len(batch):  # the first batch
        account.misread = _misread(renderer, texts, flat)
    encoded = iter(flat)
    for (index, _), (example, rendered) in zip(batch, pairs, strict=True):
        account.rows_with_tools += bool(example.tools)
        account.rows_unrolled += len(rendered) > 1
        account.unrolled_into += len(rendered) if len(rendered) > 1 else 0
        kept = _kept(example, list(itertools.islice(encoded, len(rendered))), data, account, overlong, reading.where(index))
        account.rows_kept += bool(kept)
        account.rows_dropped += not kept
        pieces += [Piece(part, label, len(part), index, hash_of(example.words)) for part, label in kept]
    account.supervised += sum(label != IGNORED for piece in pieces for label in piece.labels)
    account.tokens += sum(piece.length for piece in pieces)
    return pieces


def _misread(renderer: Renderer, rows: list[Rendered], encoded: list[Encoded]) -> str:
    """The first difference between what the first rows say and how their ids are read; empty where there is none."""
    for row, (ids, _) in zip(rows[:READ_BACK], encoded, strict=False):
        if found := renderer.misread(row, ids):
            return f"{json.dumps(found[0], ensure_ascii=False)} is read as {json.dumps(found[1], ensure_ascii=False)}"
    return ""


def _kept(
    example: Example, encoded: list[Encoded], data: Data, account: Account, overlong: Overlong, where: str
) -> list[Encoded]:
    """What of one row of the source is trained on, with what it loses written into the account."""
    live = [pair for pair in encoded if example.says_something and _learns(pair)]
    account.tokens_lost += sum(len(ids) for ids, _ in encoded) - sum(len(ids) for ids, _ in live)
    account.rows_blank += not live
    parts = [part for ids, labels in live for part in _fit(ids, labels, data, account, overlong, where)]
    kept = [part for part in parts if _learns(part)]
    account.tokens_lost += sum(len(part) for part, _ in parts) - sum(len(part) for part, _ in kept)
    account.rows_unreached += bool(parts) and not kept
    if parts and any(len(ids) > data.max_length for ids, _ in live):
        account.rows_split += data.overflow == "split"
        account.rows_cut += data.overflow != "split"
    return kept


def _learns(encoded: Encoded) -> bool:
    return any(label != IGNORED for label in encoded[1])


def _render(row: Row, reading: Reading, renderer: Renderer, where: str) -> tuple[Example, list[Rendered]]:
    try:
        example = reading.example(row)
        return example, renderer.render(example)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def _fit(ids: list[int], labels: list[int], data: Data, account: Account, overlong: Overlong, where: str) -> list[Encoded]:
    """The row within `max_length`, in one piece, several or none, with what it loses written into the account."""
    limit = data.max_length
    if len(ids) <= limit:
        return [(ids, labels)]
    if data.overflow == "error":
        raise UserError(f"{where}: {len(ids)} tokens, more than data.max_length = {limit} (overflow: error)")
    if data.overflow == "split":
        return split(ids, labels, limit)
    keep = limit if data.overflow == "truncate" else 0
    lost = sum(label != IGNORED for label in labels[keep:])
    account.tokens_lost += len(ids) - keep
    account.supervised_lost += lost
    overlong.add(len(ids), lost)
    return [(ids[:keep], labels[:keep])] if keep else []


def split(ids: list[int], labels: list[int], limit: int) -> list[Encoded]:
    """Pieces of at most `limit` tokens. Each begins with the last token of the one before, as context without loss, so that
    every supervised token is predicted exactly once."""
    starts = range(0, max(1, len(ids) - 1), limit - 1)
    return [(ids[start : start + limit], [IGNORED, *labels[start + 1 : start + limit]]) for start in starts]


def hash_of(text: str) -> int:
    """A number for a text without regard to case and white space: rows with the same one are the same row."""
    normal = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "little", signed=True)
