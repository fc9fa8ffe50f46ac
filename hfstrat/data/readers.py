"""Rows out of local files, one after another: memory does not grow with the file.

Rows are read by Python and not through a table, so every value is what stands in the file: 007 stays 007, a text that
looks like a date stays text, and a tool's arguments do not get the names of other tools' arguments.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hfstrat.data import json_array
from hfstrat.errors import UserError

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
GLANCE = 200  # rows that are read before anything is imported
LONGEST_FIELD = 2**31 - 1  # of a csv; Python's own limit is 128 KiB
BATCH = 1000  # rows of a table at a time
BUFFER = 1 << 20  # bytes of a column that are read ahead
Row = dict[str, Any]


def kind_of(path: Path) -> str | None:
    """How this file is read, by its suffix (a .gz is looked through)."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return KINDS.get(suffixes[-1].lower()) if suffixes else None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def read(path: Path, limit: int | None = None) -> Iterator[Row]:
    """The rows of a file, or the first `limit` of them. Blank lines of a text file are no rows.

    Raises:
        UserError: what cannot be read, with the file and the row.
    """
    kind = kind_of(path)
    if kind in ("parquet", "arrow"):
        yield from itertools.islice(_table_rows(path, kind), limit)
        return
    try:
        with _open(path) as file:
            rows: Iterator[Row]
            if kind == "csv":
                rows = _csv_rows(file, path)
            elif kind == "text":
                rows = ({"text": line.rstrip("\n")} for line in file if line.strip())
            else:
                rows = _json_rows(file, path)
            yield from itertools.islice(rows, limit)
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
    except (csv.Error, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: this file cannot be read: {error}") from None


def first_rows(path: Path) -> list[Row]:
    """Some rows, each with all of their columns.

    Raises:
        UserError: the file holds no row, or one of the first rows cannot be read.
    """
    rows = list(read(path, GLANCE))
    if not rows:
        raise UserError(f"{path}: the file holds no row; expected at least one")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","


def _csv_rows(file: IO[str], path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(file, delimiter=_delimiter(path))
    for row in reader:
        if None in row:
            named = len(reader.fieldnames or ())
            raise UserError(
                f"{path}:{reader.line_num}: this row has {named + len(row[None])} fields, but the first line names {named} "
                "columns; a text that holds the separator belongs in double quotes"
            )
        yield row


def _json_rows(file: IO[str], path: Path) -> Iterator[Row]:
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    yield from _json_array(file, path) if first == "[" else _json_lines(file, path)


def _json_array(file: IO[str], path: Path) -> Iterator[Row]:
    try:
        for number, row in enumerate(json_array.items(file), 1):
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: expected an object with named columns, given {json.dumps(row)[:60]}")
            yield row
    except json_array.Broken as error:
        raise UserError(f"{path}:{error.lineno}: this is no valid JSON: {error.msg} (column {error.colno})") from None


def _json_lines(file: IO[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: this row is no valid JSON: {error.msg} (column {error.colno}): {line.strip()[:60]}; "
                "expected one row a line, or one array of rows"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object with named columns, given {line.strip()[:60]}")
        yield row


def _table_rows(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa

    try:
        for batch in _parquet(path) if kind == "parquet" else _arrow(path):
            for start in range(0, batch.num_rows, BATCH):  # a file may be one batch
                for row in batch.slice(start, BATCH).to_pylist():
                    yield without_fill(row)
    except (pa.ArrowException, OSError) as error:
        name = "Parquet" if kind == "parquet" else "Arrow"
        raise UserError(f"{path}: this is no {name} file that can be read: {str(error).splitlines()[0]}") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # with a buffer, and a map of the file, since else a whole row group, which may be the whole file, is read at once
    with pq.ParquetFile(path, memory_map=True, buffer_size=BUFFER) as file:
        yield from file.iter_batches(batch_size=BATCH)


def _arrow(path: Path) -> Iterator[Any]:
    """Both forms of an Arrow file: a stream, as `datasets` writes it, and a file with an index at its end."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            file = pa.ipc.open_file(source)
            for index in range(file.num_record_batches):
                yield file.get_batch(index)


def without_fill(row: Row) -> Row:
    """The row without the nulls that a table puts where one message or argument lacks what another one has."""
    return {name: _unfilled(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _unfilled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unfilled(inner) for name, inner in value.items() if inner is not None}
    return [_unfilled(inner) for inner in value] if isinstance(value, list) else value
