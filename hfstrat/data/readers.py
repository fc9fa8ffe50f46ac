"""Rows of local files, one at a time: memory does not grow with the file.

Why not `datasets.load_dataset`: it builds a typed Arrow table first, which changes values. Here 007 stays 007, a text that
looks like a date stays text, and the arguments of one tool call do not gain the argument names of another. No import of
`datasets` or pandas is needed before training starts, either.

Why not `ijson` for JSON arrays (tried: 3.6 with its C backend, 0.4 s for 48 MB against 0.5 s here and 0.6 s for `json.load`):
its errors name no line and column; NaN and Infinity are refused; numbers are `Decimal`, or with `use_float` integers beyond
64 bits and 1e400 are refused; and a lone surrogate (`"\\ud800"`) becomes "?". Python's decoder reads each item of the array
instead, so that values and errors are exactly those of `json.load`.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from hfstrat.data.values import Row, parse_json, reason_of, unique_keys
from hfstrat.errors import UserError, first_line
from hfstrat.recipe.format import plural

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
HEAD_ROWS = 200  # first rows, read before torch is imported
MAX_CSV_FIELD = 2**31 - 1  # Python's default limit is 128 KiB
BATCH_ROWS = 1000  # rows of a table converted at a time
BUFFER_BYTES = 1 << 20  # of a Parquet column, read ahead
CHUNK = 1 << 19  # characters of a JSON array read at a time
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
MAX_CUT_TOKEN = 16  # characters of -Infinity, an escape, an exponent: cut at the end of a chunk, it may look like an error
_SPACE = re.compile(r"[ \t\n\r]*")


class RawRow(NamedTuple):
    """A row as it is in a file: what it holds is parsed when it is needed, and may turn out to be no row.

    `number` is that of the line of JSON lines and text, else that of the row, from 1.
    """

    number: int
    content: str | Row | UserError


def file_kind(path: Path) -> str | None:
    """How a file is read, from its suffix (before .gz); None for an unsupported one."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return KINDS.get(suffixes[-1]) if suffixes else None


def read(path: Path, limit: int | None = None) -> Iterator[Row]:
    """The rows of a file, or the first `limit` of them. Blank lines of a text file are skipped.

    Raises:
        UserError: the file or a row cannot be read; the message names the file and the line.
    """
    yield from (parse_row(raw, path) for raw in itertools.islice(read_raw(path), limit))


def read_raw(path: Path) -> Iterator[RawRow]:
    """The rows of a file, of which single bad ones do not end the reading. Lines of JSON are not parsed, so that skipping
    rows is as fast as reading lines.

    Raises:
        UserError: the file cannot be read from here on.
    """
    kind = file_kind(path)
    if kind in ("parquet", "arrow"):
        yield from itertools.starmap(RawRow, enumerate(_table_rows(path, kind), 1))
        return
    with _open(path) as file:
        if kind == "csv":
            yield from itertools.starmap(RawRow, enumerate(_csv_rows(file, path), 1))
        elif kind == "text":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield RawRow(number, {"text": line.rstrip("\n")})
        elif _begins_array(file):
            yield from itertools.starmap(RawRow, enumerate(_json_array(file, path), 1))
        else:
            yield from (RawRow(number, line) for number, line in enumerate(file, 1) if line.strip())


def parse_row(raw: RawRow, path: Path) -> Row:
    """The row. Raises UserError, which names the file and the line or row, if it is none."""
    if isinstance(raw.content, UserError):
        raise raw.content
    return _parse_json_line(raw.content, raw.number, path) if isinstance(raw.content, str) else raw.content


def where(raw: RawRow, path: Path) -> str:
    """A row, named for messages: by its line, or by its number where a row may have several lines."""
    by_line = isinstance(raw.content, str) or file_kind(path) == "text"
    return f"{path}:{raw.number}" if by_line else f"{path}: row {raw.number}"


def first_lines(path: Path, limit: int) -> list[str]:
    """The first lines of a text file, blank ones included. Raises UserError if it is not UTF-8."""
    with _open(path) as file:
        return [line.rstrip("\n") for line in itertools.islice(file, limit)]


def read_document(path: Path) -> Row:
    """A text file as a single row. Raises UserError if it is of another kind or not UTF-8."""
    if file_kind(path) != "text":
        raise UserError(f"data.documents: {path}: `documents: files` needs .txt files; remove data.documents")
    with _open(path) as file:
        return {"text": file.read()}


def read_head(path: Path, skips: bool = False) -> list[Row]:
    """The first `HEAD_ROWS` rows, each with all of their columns.

    Args:
        skips: whether rows that cannot be read are left out.

    Raises:
        UserError: the file has no rows, or one of the first rows cannot be read.
    """
    rows = list[Row]()
    for raw in itertools.islice(read_raw(path), HEAD_ROWS):
        try:
            rows.append(parse_row(raw, path))
        except UserError:
            if not skips:
                raise
    if not rows:
        raise UserError(f"{path}: it has no rows; expected at least one")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    """The text of a file, plain or gzip. Raises UserError where the file, or what is read from it, is invalid."""
    try:
        zipped = path.suffix.lower() == ".gz"
        with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except (csv.Error, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot read this file: {error}") from None


def _csv_rows(file: IO[str], path: Path) -> Iterator[Row | UserError]:
    """Rows of exactly as many fields as the first line has names; an error for any other."""
    csv.field_size_limit(MAX_CSV_FIELD)
    is_tsv = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    # strict: otherwise a quote that nothing closes would take all rows after it into one field
    reader = csv.reader(file, delimiter="\t" if is_tsv else _separator(file), strict=True)
    begin = 1  # line of the row that is read
    try:
        names = _named_columns(next((row for row in reader if row), []), path)
        begin = reader.line_num + 1
        for row in reader:
            begin = reader.line_num + 1
            values, more = row[: len(names)], "".join(row[len(names) :])
            if more or (len(values) < len(names) and "".join(row).strip()):
                yield UserError(
                    f"{path}:{reader.line_num}: this row has {plural(len(row), 'field')}, but the first line names "
                    f"{plural(len(names), 'column')}; put a text that contains the separator or a line break in double quotes"
                )
            elif len(values) == len(names):
                yield dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}:{begin}: the row that begins here cannot be read: {error}; put a text that contains quotes in double "
            "quotes, and write each quote in it twice"
        ) from None


def _named_columns(names: list[str], path: Path) -> list[str]:
    """The names without empty ones at the end, which spreadsheets write for empty columns."""
    while names and not names[-1].strip():
        names = names[:-1]
    _check_names(names, path)
    return names


def _check_names(names: list[str], path: Path) -> None:
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        what = f"two columns are named '{twice}'" if twice else "two columns have no name"
        raise UserError(f"{path}: {what}; rename or remove one of them")


def _separator(file: IO[str]) -> str:
    """The separator of a CSV file: a comma, unless the line of column names has none and has another usual one."""
    names = file.readline(MAX_CSV_FIELD)
    file.seek(0)
    return "," if "," in names else max(",;\t|", key=names.count)


def _begins_array(file: IO[str]) -> bool:
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    return first == "["


def _json_array(file: IO[str], path: Path) -> Iterator[Row | UserError]:
    count = 0
    try:
        for row in array_items(file):
            count += 1
            if isinstance(row, dict):
                yield row
            else:
                given = json.dumps(row)[:60]
                yield UserError(f"{path}: row {count}: expected an object with named columns, given {given}")
    except InvalidJson as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: row {count + 1}: this row cannot be read: {reason_of(error)}") from None


def _parse_json_line(line: str, number: int, path: Path) -> Row:
    try:
        row = parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number}: this row is not valid JSON: {error.msg} (column {error.colno}): {line.strip()[:60]}; "
            "expected one row per line, or one array of rows"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}:{number}: this row cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected an object with named columns, given {line.strip()[:60]}")
    return row


class InvalidJson(ValueError):
    """What is wrong, with the line and column (from 1) that `json.load` would report."""

    def __init__(self, msg: str, lineno: int, colno: int) -> None:
        super().__init__(msg)
        self.msg, self.lineno, self.colno = msg, lineno, colno


def array_items(file: IO[str], chunk: int = CHUNK) -> Iterator[Any]:
    """The items of the JSON array in a text file, one at a time: memory is that of the largest item.

    Raises:
        InvalidJson: not an array, or invalid JSON; all items before the error have been yielded.
    """
    window = _Window(file, chunk)
    if window.peek() != "[":
        raise window.error("Expecting value")
    window.position += 1
    if window.peek() != "]":
        yield window.decode_item()
        while (sign := window.peek()) == ",":
            window.position += 1
            window.peek()
            yield window.decode_item()
        if sign != "]":
            raise window.error("Expecting ',' delimiter")
    window.position += 1
    if window.peek():
        raise window.error("Extra data")


class _Window:
    """The part of a text that has been read and is still needed, and where it begins.

    If the text read so far ends within an item, at least as much again is read and the item is decoded again: each
    character is decoded a few times at most.
    """

    def __init__(self, file: IO[str], chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.text, self.position, self.is_complete = "", 0, False
        self.line, self.column = 1, 0  # of the first character; columns from 0
        self.decode = DECODER.raw_decode

    def extend(self) -> None:
        """Drop the text before the position and read at least as much as is kept."""
        self.line, self.column = self.location(self.position)
        self.column -= 1
        rest = self.text[self.position :]
        new = self.file.read(max(self.chunk, len(rest)))
        self.text, self.position, self.is_complete = rest + new, 0, not new

    def peek(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]  # it always matches
            if self.position < len(self.text) or self.is_complete:
                return self.text[self.position : self.position + 1]
            self.extend()

    def decode_item(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.text, self.position)
                if end + MAX_CUT_TOKEN < len(self.text) or self.is_complete:  # else a number may continue
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - MAX_CUT_TOKEN or error.msg.startswith("Unterminated string")
                if self.is_complete or not is_cut:
                    raise self.error(error.msg, error.pos) from None
            self.extend()

    def location(self, position: int) -> tuple[int, int]:
        """Line and column of a position, from 1."""
        lines = self.text.count("\n", 0, position)
        return self.line + lines, position - self.text.rfind("\n", 0, position) + (0 if lines else self.column)

    def error(self, msg: str, position: int | None = None) -> InvalidJson:
        return InvalidJson(msg, *self.location(self.position if position is None else position))


def _table_rows(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa

    try:
        for batch in _parquet_batches(path) if kind == "parquet" else _arrow_batches(path):
            _check_names(batch.schema.names, path)
            for start in range(0, batch.num_rows, BATCH_ROWS):  # a file may consist of one batch
                for row in batch.slice(start, BATCH_ROWS).to_pylist():
                    yield drop_nulls(row)
    except UnicodeDecodeError:
        raise UserError(f"{path}: a text in this file is not UTF-8; write the file again with valid text") from None
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    name = "Parquet" if file_kind(path) == "parquet" else "Arrow"
    return UserError(f"{path}: not a readable {name} file: {first_line(error)}")


def table_schema(path: Path) -> Any:
    """The schema of a Parquet or Arrow file. Raises UserError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file_kind(path) == "parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return _open_arrow(source).schema
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # without a buffer and a memory map a complete row group, which may be the complete file, is read at once
    with pq.ParquetFile(path, memory_map=True, buffer_size=BUFFER_BYTES) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of either Arrow format: a stream, as `datasets` writes it, or a file with a footer."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        opened = _open_arrow(source)
        if isinstance(opened, pa.RecordBatchStreamReader):
            yield from opened
        else:
            yield from (opened.get_batch(index) for index in range(opened.num_record_batches))


def _open_arrow(source: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source)


def drop_nulls(row: Row) -> Row:
    """The row without the nulls that a table inserts where one message or argument lacks a field that another one has."""
    return {name: _without_nulls(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
