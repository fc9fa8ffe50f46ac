"""Where rows come from: local files and the Hub. The checks here need neither torch nor `datasets`."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
GLANCE = 200  # rows that are read before anything is imported


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
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    return opened  # type: ignore[return-value]


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
                rows = csv.DictReader(file, delimiter="\t" if ".tsv" in path.suffixes else ",")
            elif kind == "text":
                rows = ({"text": line.rstrip("\n")} for line in file)
            else:
                rows = _json_rows(file, path)
            yield from itertools.islice(rows, limit)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8 text; save the file as UTF-8") from None
    except (csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: this file cannot be read: {error}") from None


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
                f"{path}:{number}: this row is no valid JSON: {error.msg} (column {error.colno}): {line.strip()[:60]}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object with named columns, given {line.strip()[:60]}")
        yield row


def columns_of(path: Path) -> list[str] | None:
    """The column names, without `datasets`; None where only `datasets` can tell (parquet).

    Raises:
        UserError: the file holds no row, or one of the first rows cannot be read.
    """
    if kind_of(path) == "parquet":
        return None
    names: dict[str, None] = {}
    count = 0
    for row in glance(path):
        count += 1
        names.update(dict.fromkeys(str(name) for name in row))
    if not count:
        raise UserError(f"{path}: the file holds no row")
    return list(names)


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
    options: dict[str, Any] = {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
    try:
        return datasets.load_dataset(kind, data_files=str(path.resolve()), split="train", **options)
    except Exception as error:
        for _ in glance(path, limit=None) if kind != "parquet" else ():
            pass  # finds and names the row that cannot be read
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{key}: {source}: the rows do not fit one table: {cause}") from error


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
