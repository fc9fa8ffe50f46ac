"""Rows of one source into an Arrow file of token ids, a batch at a time: memory does not grow with the data."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.account import Account, Overlong, check
from hfstrat.data.formats import Example
from hfstrat.data.readers import Row
from hfstrat.data.reading import Reading, check_train_on
from hfstrat.data.render import IGNORED, Rendered, Renderer
from hfstrat.data.turns import BadRow
from hfstrat.data_section import Data
from hfstrat.errors import UserError

if TYPE_CHECKING:
    import pyarrow

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
