"""One big JSON list, an item at a time: memory is that of the largest item, not of the file.

Python's own decoder reads each item, so the values are those of `json.load`, and no dependency is needed: a streaming
parser (ijson) would make numbers and errors of its own. Where the text that was read so far ends inside an item, the decoder
says so, more is read, at least as much again, and the item is decoded anew: each character is looked at a few times at most.


Rows out of local files, one after another: memory does not grow with the file.

Rows are read by Python and not through a table, so every value is what stands in the file: 007 stays 007, a text that
looks like a date stays text, and a tool's arguments do not get the names of other tools' arguments.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hfstrat.errors import UserError

CHUNK = 1 << 19  # characters


LONGEST_WORD = 16  # -Infinity, an escape, an exponent: what a cut may make a mistake of that is none


_SPACE = re.compile(r"[ \t\n\r]*")


class Broken(ValueError):
    """What is wrong, with the line and column (from 1) that `json.load` would name."""

    def __init__(self, msg: str, lineno: int, colno: int) -> None:
        super().__init__(msg)
        self.msg, self.lineno, self.colno = msg, lineno, colno


def items(file: IO[str], chunk: int = CHUNK) -> Iterator[Any]:
    """The items of the list that a text file holds.

    Raises:
        Broken: it is no list, or no valid JSON; the items before that place have been given by then.
    """
    window = _Window(file, chunk)
    if window.next() != "[":
        raise window.broken("Expecting value")
    window.at += 1
    if window.next() != "]":
        yield window.value()
        while (sign := window.next()) == ",":
            window.at += 1
            window.next()
            yield window.value()
        if sign != "]":
            raise window.broken("Expecting ',' delimiter")
    window.at += 1
    if window.next():
        raise window.broken("Extra data")


class _Window:
    """The part of a text that has been read and is still needed, and where it begins."""

    def __init__(self, file: IO[str], chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0  # of the first character; columns from 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> None:
        """Forget what lies behind, and read on: at least as much as is kept."""
        self.line, self.column = self.place(self.at)
        self.column -= 1
        rest = self.text[self.at :]
        new = self.file.read(max(self.chunk, len(rest)))
        self.text, self.at, self.ended = rest + new, 0, not new

    def next(self) -> str:
        """The next character that is no white space, not yet passed; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end + LONGEST_WORD < len(self.text) or self.ended:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - LONGEST_WORD or error.msg.startswith("Unterminated string")
                if self.ended or not cut:
                    raise self.broken(error.msg, error.pos) from None
            self.more()

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - self.text.rfind("\n", 0, at) + (0 if lines else self.column)

    def broken(self, msg: str, at: int | None = None) -> Broken:
        return Broken(msg, *self.place(self.at if at is None else at))


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


def read_whole(path: Path) -> Row:
    """A text file as one row. Raises UserError: it is of another kind, or no UTF-8."""
    if kind_of(path) != "text":
        raise UserError(f"data.documents: {path}: files are documents only where they are .txt; remove documents")
    try:
        with _open(path) as file:
            return {"text": file.read()}
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
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
        for number, row in enumerate(items(file), 1):
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: expected an object with named columns, given {json.dumps(row)[:60]}")
            yield row
    except Broken as error:
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
