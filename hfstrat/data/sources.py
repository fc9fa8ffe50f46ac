"""Where rows come from: local files and the Hub. The checks here need neither torch nor `datasets`."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
GLANCE = 200  # rows that are read before anything is imported
LONGEST_FIELD = 2**31 - 1  # of a csv; Python's own limit is 128 KiB


def kind_of(path: Path) -> str | None:
    """Which loader of `datasets` reads this file, by its suffix (a .gz is looked through)."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return KINDS.get(suffixes[-1].lower()) if suffixes else None


def local_file(source: str, key: str) -> Path | None:
    """The local file that `source` means, or None for a Hub id.

    Raises:
        UserError: a missing or empty file, a folder, or a suffix that is not read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{key}: {source}: files of this kind are not read; expected one of {', '.join(KINDS)}")
        if path.stat().st_size == 0:
            raise UserError(f"{key}: {source}: the file is empty")
        return path
    if path.is_dir():
        raise UserError(f"{key}: {source}: this is a folder; name a file in it")
    looks_local = source.startswith(("/", ".", "~")) or kind_of(path) is not None or source.count("/") > 1
    if not looks_local:
        return None
    folder = path.parent if path.parent.is_dir() else None
    near = get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1) if folder else []
    hint = f"did you mean {folder / near[0]}?" if folder and near else f"looked in {path.parent.resolve()}"
    raise UserError(f"{key}: {source}: no such file; {hint}")


def _open(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")  # type: ignore[return-value]
    return path.open(encoding="utf-8-sig")


def glance(path: Path, limit: int | None = GLANCE) -> Iterator[dict[str, Any]]:
    """The first rows of a json, csv or text file, read plainly.

    Raises:
        UserError: what cannot be read, with the file and the row.
    """
    kind = kind_of(path)
    try:
        with _open(path) as file:
            rows: Iterator[dict[str, Any]]
            if kind == "csv":
                rows = _csv_rows(file, path)
            elif kind == "text":
                rows = ({"text": line.rstrip("\n")} for line in file)
            else:
                rows = _json_rows(file, path)
            yield from itertools.islice(rows, limit)
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is no UTF-8 text; save the file as UTF-8") from None
    except (csv.Error, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: this file cannot be read: {error}") from None


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","


def _csv_rows(file: io.TextIOBase, path: Path) -> Iterator[dict[str, Any]]:
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


def _json_rows(file: io.TextIOBase, path: Path) -> Iterator[dict[str, Any]]:
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    if first == "[":
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: this is no valid JSON: {error.msg} (column {error.colno})") from None
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: expected an object with named columns, given {json.dumps(row)[:60]}")
            yield row
        return
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


def first_rows(path: Path) -> list[dict[str, Any]] | None:
    """Some rows with all of their columns, without `datasets`; None where only `datasets` can tell (parquet).

    Raises:
        UserError: the file holds no row, or one of the first rows cannot be read.
    """
    if kind_of(path) == "parquet":
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise UserError(f"{path}: this is no Parquet file")
        return None
    rows = list(glance(path))
    blank = kind_of(path) == "text" and not any(row["text"].strip() for row in glance(path, limit=None))
    if not rows or blank:
        raise UserError(f"{path}: the file holds no row; expected at least one")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def load(source: str, key: str, config: str | None, split: str) -> Dataset:
    """All rows of a local file or of a Hub data set.

    Raises:
        UserError: what cannot be read or reached, with file and row where there is one.
    """
    import datasets

    datasets.disable_progress_bars()
    path = local_file(source, key)
    if path is None:
        return _load_from_hub(source, key, config, split)
    kind = str(kind_of(path))
    try:
        options = _csv_options(path) if kind == "csv" else {}
        rows = datasets.load_dataset(kind, data_files=str(path.resolve()), split="train", **options)
        return _plainly(path) if kind == "json" and "timestamp" in str(rows.features) else rows
    except Exception as error:
        for _ in glance(path, limit=None) if kind != "parquet" else ():
            pass  # finds and names the row that cannot be read
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{key}: {source}: the rows do not fit one table: {cause}") from error


def _plainly(path: Path) -> Dataset:
    """Rows as Python reads them: pyarrow makes a date of a text that looks like one."""
    from datasets import Dataset

    rows = list(glance(path, limit=None))
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def _csv_options(path: Path) -> dict[str, Any]:
    """Every field is text as it stands there: pandas would make 7.0 of 007, and nothing of NA."""
    from datasets import Features, Value

    columns = next(glance(path, limit=1), {})
    return {
        "delimiter": _delimiter(path),
        "na_filter": False,
        "features": Features({name: Value("string") for name in columns}),
    }


def _load_from_hub(source: str, key: str, config: str | None, split: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(source, config, split=split)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}: {source} is neither a local file nor a data set that the Hub gives us ({first}); "
            "check the name, data.config, data.split and your login"
        ) from error
