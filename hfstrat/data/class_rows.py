"""Rows of one source into an Arrow file of token ids with the names of their labels, a batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data.account import UNSUPERVISED_ALLOWED, Account
from hfstrat.data.labels import Labelled, LabelReading
from hfstrat.data.readers import Row
from hfstrat.data.texts import Encoded, Texts
from hfstrat.data.tokenise import BATCH, hash_of
from hfstrat.data.turns import BadRow
from hfstrat.data_section import Data
from hfstrat.errors import UserError

if TYPE_CHECKING:
    import pyarrow


def schema() -> pyarrow.Schema:
    """Columns of the prepared rows. `token_type_ids` is empty where it would be zeros; `text_hash` is of the texts alone."""
    import pyarrow as pa

    fields = {"input_ids": pa.list_(pa.int32()), "token_type_ids": pa.list_(pa.int8()), "names": pa.list_(pa.string())}
    return pa.schema([*fields.items(), ("length", pa.int32()), ("row", pa.int64()), ("text_hash", pa.int64())])


def write(rows: Iterable[Row], reading: LabelReading, data: Data, texts: Texts, target: Path) -> Account:
    """Write the prepared rows into an Arrow stream; see `schema`.

    Raises:
        UserError: rows that do not fit their format, too many without a text, or too long ones (`overflow: error`).
    """
    import pyarrow as pa

    account = Account(reading.source, reading.kind, many_labels=reading.many)
    numbered = enumerate(rows)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema()) as stream:
        while batch := list(itertools.islice(numbered, BATCH)):
            made = _batch(batch, reading, data, texts, account)
            columns = zip(*made, strict=True) if made else [[]] * len(schema())
            stream.write_batch(pa.record_batch([list(column) for column in columns], schema=schema()))
    blank = account.rows_blank
    if not account.rows_kept or blank > UNSUPERVISED_ALLOWED * account.rows_read:
        cause = f"{blank:,} have an empty text" if blank else f"none is within data.max_length = {texts.max_length}"
        raise UserError(f"{account.source}: of {account.rows_read:,} rows {cause}; check the columns, or remove these rows")
    return account


def _batch(
    batch: list[tuple[int, Row]], reading: LabelReading, data: Data, texts: Texts, account: Account
) -> list[tuple[Any, ...]]:
    account.rows_read += len(batch)
    examples = [_example(row, reading, reading.where(index)) for index, row in batch]
    made = []
    for (index, _), example, encoded in zip(batch, examples, texts.encode(examples), strict=True):
        if not example.words.strip() or not encoded.input_ids:
            account.rows_blank += 1
        elif _fits(encoded, data, texts, account, reading.where(index)):
            ids, types, _ = encoded
            made.append((ids, types, example.labels, len(ids), index, hash_of(example.words)))
    account.rows_kept += len(made)
    account.rows_dropped += len(batch) - len(made)
    account.tokens += sum(row[3] for row in made)
    return made


def _example(row: Row, reading: LabelReading, where: str) -> Labelled:
    try:
        return reading.example(row)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def _fits(encoded: Encoded, data: Data, texts: Texts, account: Account, where: str) -> bool:
    """Whether the row is kept, with what it loses written into the account."""
    if encoded.length <= texts.max_length:
        return True
    if data.overflow == "error":
        raise UserError(f"{where}: {encoded.length} tokens, more than {texts.max_length} (overflow: error)")
    kept = data.overflow == "truncate"
    account.rows_cut += kept
    account.tokens_lost += encoded.length - (len(encoded.input_ids) if kept else 0)
    return kept
