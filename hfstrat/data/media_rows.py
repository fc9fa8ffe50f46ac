"""Rows of one image or recording with labels: where they come from, how they are read, and written to an Arrow file.

A row keeps where its file is, not what is in it: a million rows take as much memory as their paths. Bytes of a table (Parquet,
Arrow, a Hub data set) are copied into the prepared file, which is memory-mapped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from hfstrat.data import media_layout, readers
from hfstrat.data.columns import propose
from hfstrat.data.labeled import ALIASES, LABELS, LabelFormat
from hfstrat.data.labels import STRIPPED, label_of
from hfstrat.data.media_files import Kind, MediaRef, Unreadable
from hfstrat.data.media_layout import Layout
from hfstrat.data.sources import DataSource, detect_format, load_from_hub, local_files, splits_of
from hfstrat.data.stats import MAX_UNSUPERVISED, Statistics
from hfstrat.data.values import BadRow, Row, is_missing, shown
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    import pyarrow

BATCH = 256
BAD_SHOWN = 5  # unreadable files that are named


class LabeledMedia(NamedTuple):
    """A row: where its file is, and the names of its labels. `changes` are what reading has changed, in words."""

    file: MediaRef
    labels: list[str]
    changes: tuple[str, ...] = ()

    @property
    def prompt(self) -> MediaRef:
        return self.file

    @property
    def answer(self) -> str:
        return ", ".join(self.labels)


@dataclass
class MediaFormat(LabelFormat):
    """How the rows of one source are read: `columns` are our names of the file and the label."""

    media: ClassVar[Kind]

    @classmethod
    def choose_columns(cls, given: list[str], source: str) -> tuple[str, str, str]:
        file = next((name for name in cls.media.names if name in given), None)
        label = next((name for name in LABELS if name in given), None)
        if file and label:
            return file, "", label
        wanted: dict[str, tuple[str, ...]] = {} if file else {cls.media.column: cls.media.others}
        wanted |= {} if label else {"label": ALIASES["label"]}
        raise UserError(
            f"{source}: task {cls.format} needs {cls.media.an} and a label; the data have {', '.join(given) or 'no columns'}. "
            f"{propose(given, wanted)}"
        )

    def example(self, row: Mapping[str, Any]) -> Any:
        """Raises BadRow where the row does not fit."""
        named = self.values(row)
        file, _, label = self.columns
        given = self._given(named[label], label)
        labels = [label_of(value, label, self.class_names) for value in given]
        if len(set(labels)) < len(labels):
            raise BadRow(f"'{label}' contains duplicate labels: {shown(given)}; expected the labels that apply, such as [1, 4]")
        changes = (STRIPPED,) if any(isinstance(each, str) and each != each.strip() for each in given) else ()
        return LabeledMedia(file_of(named[file], file, self.media), labels, changes)


def file_of(value: Any, column: str, kind: Kind) -> MediaRef:
    """The file of a cell: as the source has resolved it, or bytes with a path, as `datasets` stores them.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, MediaRef):
        return value
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        data, path = value.get("bytes"), str(value.get("path") or "")
        if isinstance(data, bytes):
            return kind.ref(path or "(bytes)", data=data)
        if path:
            return kind.ref(path)
    if isinstance(value, bytes):
        return kind.ref("(bytes)", data=value)
    if is_missing(value):
        raise BadRow(f"'{column}' is null, expected the path or the bytes of {kind.an}")
    raise BadRow(f"'{column}' is {type(value).__name__}, expected the path or the bytes of {kind.an}: {shown(value)}")


@dataclass
class MediaSource(DataSource):
    """One source of files: a folder or archive (`layout`), files by a glob, tables with paths or bytes, or a Hub data set."""

    layout: Layout | None = None
    paths: tuple[Path, ...] = ()  # files that a glob matches

    kind: ClassVar[Kind]

    @classmethod
    def open(cls, source: Source, data: Data, key: str) -> MediaSource:
        split, folder_splits = splits_of(source, data, key)
        if layout := media_layout.find(source.path, key, folder_splits, cls.kind):
            return cls(source, data, None, None, layout=layout)
        if paths := cls._matched(source.path, key):
            return cls(source, data, None, None, paths=paths)
        files = local_files(source.path, key, folder_splits)
        if files is not None:
            if texts := [file for file in files if readers.file_kind(file) == "text"]:
                raise UserError(
                    f"{key}: {texts[0]}: a text file has no labels; expected a table with the columns {cls.kind.column} and "
                    "label"
                )
            return cls(source, data, files, None)
        config, revision = data.of(source, "config"), data.of(source, "revision")
        return cls(source, data, None, cls._undecoded(load_from_hub(source.path, key, config, split, revision)))

    @classmethod
    def _matched(cls, source: str, key: str) -> tuple[Path, ...]:
        import glob

        kind = cls.kind
        if not glob.has_magic(source):
            if Path(source).expanduser().is_file() and kind.fits(source):
                raise UserError(
                    f"{key}: {source} is a single {kind.noun}; expected a folder for each class, a table, or a zip archive"
                )
            return ()
        found = sorted(Path(name).absolute() for name in glob.glob(str(Path(source).expanduser()), recursive=True))
        return tuple(path for path in found if path.is_file() and kind.fits(path.name))

    @classmethod
    def _undecoded(cls, rows: Any) -> Any:
        """A Hub data set whose files are bytes with a path."""
        import datasets

        feature = getattr(datasets, cls.kind.feature)
        for name, given in rows.features.items():
            if isinstance(given, feature):
                rows = rows.cast_column(name, feature(decode=False))
        return rows

    def read(self) -> tuple[Iterator[Row], Any]:
        return detect_format(self.rows(), self.source.path, *self.wanted, self.detect, self.class_names)

    def rows(self) -> Iterator[Row]:
        if self.layout is not None:
            return self.layout.rows()
        if self.paths:
            column, ref = self.kind.column, self.kind.ref
            return ({column: ref(str(path)), "label": path.parent.name} for path in self.paths)
        if self.hub is not None:
            return (readers.drop_nulls(row) for row in self.hub)
        return itertools.chain.from_iterable(map(self._rows_of, self.files or []))

    def _rows_of(self, file: Path) -> Iterator[Row]:
        """The rows of a table. Paths of files are relative to its folder."""
        mapping, folder = self.wanted[1], file.absolute().parent
        for row in readers.read(file):
            for name, value in row.items():
                if mapping.get(name, name) in self.kind.names and isinstance(value, str) and value.strip():
                    row = {**row, name: self.kind.ref(str(folder / value.strip()))}
            yield row

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        return {} if self.layout is not None or self.paths else super().class_names

    def digest(self) -> str:
        """A hash of what the rows are read from; of files by name, size and time, not by their bytes."""
        if self.layout is not None:
            stated: list[Any] = self.layout.identity()
        elif self.paths:
            stated = [stat_of(str(path)) for path in self.paths]
        elif self.files is not None:
            refs = (value for row in self.rows() for value in row.values() if isinstance(value, MediaRef))
            stated = [super().digest(), *(stat_of(ref.path) for ref in refs)]
        else:
            return super().digest()
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()

    def estimate_bytes(self) -> int:
        if self.layout is not None or self.paths:
            return 200 * len(self.layout.names if self.layout is not None else self.paths)
        return super().estimate_bytes()

    def remarks(self) -> list[str]:
        return self.layout.remarks() if self.layout is not None else []


def stat_of(path: str) -> list[Any]:
    """A file as far as it is known without reading it: path, bytes and time of change; the path alone where there is none."""
    try:
        stat = Path(path).stat()
    except OSError:
        return [path]
    return [path, stat.st_size, stat.st_mtime_ns]


def check_source(source: Source, data: Data, key: str, reader: Any, opens: type[MediaSource]) -> None:
    """Refuse a local source without files, or whose first rows cannot be read, before torch. Raises UserError."""
    opened = opens.open(source, data, key)
    opened.detect = reader
    rows, reading = opened.read()
    for index, row in enumerate(itertools.islice(rows, readers.HEAD_ROWS)):
        example_of(row, reading, index)


def example_of(row: Row, reading: Any, index: int) -> Any:
    """A row as an example. Raises UserError, which names the row."""
    try:
        return reading.example(row)
    except BadRow as error:
        raise UserError(f"{reading.where(index)}: {error}") from None


class Measured(NamedTuple):
    """What is stored of a decoded file: its `length` in the units of batches, the values of `Measure.fields`, what decoding has
    changed, and a word for files that are named in a warning."""

    length: int
    values: tuple[Any, ...]
    changes: tuple[str, ...] = ()
    odd: str = ""


class Measure(ABC):
    """Decodes every file once, when the data are prepared. `fields` are names and Arrow types of the columns it fills."""

    kind: Kind
    fields: tuple[tuple[str, str], ...]

    @abstractmethod
    def __call__(self, data: bytes) -> Measured:
        """Raises Unreadable."""


def schema(measure: Measure) -> pyarrow.Schema:
    """Columns of the prepared rows. The column of the kind has bytes for files of tables, else they are at `path` (in an
    archive `member`).

    `content` are the first 64 bits of the SHA-256 of a file's bytes, as is `text_hash`, by which rows are held out together.
    """
    import pyarrow as pa

    names = pa.list_(pa.string())
    fields: list[Any] = [
        ("path", pa.string()),
        ("member", pa.string()),
        (measure.kind.column, pa.large_binary()),
        ("names", names),
    ]
    fields += [(name, getattr(pa, kind)()) for name, kind in measure.fields]
    return pa.schema([*fields, ("length", pa.int32()), ("row", pa.int64()), ("content", pa.int64()), ("text_hash", pa.int64())])


More = Callable[..., tuple[list[str], tuple[Any, ...]]]
"""From an example and the values of its measure to its labels and the values of further columns."""


def write(
    rows: Iterable[Row],
    reading: Any,
    measure: Measure,
    target: Path,
    further: pyarrow.Schema | None = None,
    more: More | None = None,
) -> Statistics:
    """Write the prepared rows to an Arrow stream (see `schema`) and return their statistics. Every file is decoded once.

    Args:
        further: columns of the task, whose values `more` gives.

    Raises:
        UserError: rows that do not fit their format, or too many files that cannot be read.
    """
    import pyarrow as pa

    stats = Statistics(reading.source, reading.kind, many_labels=reading.many, warnings=list(reading.remarks))
    digest, writer, numbered = hashlib.sha256(), _Writer(reading, measure, stats, more), enumerate(rows)
    own = schema(measure)
    columns, end = pa.schema([*own, *(further or ())]), len(own)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
        while batch := list(itertools.islice(numbered, BATCH)):
            made = [found for index, row in batch if (found := writer.made(index, row)) is not None]
            digest.update(repr([(*row[3 : end - 4], *row[end - 1 :]) for row in made]).encode("utf-8", "surrogatepass"))
            arrays = [list(column) for column in zip(*made, strict=True)] if made else [[]] * len(columns)
            stream.write_batch(pa.record_batch(arrays, schema=columns))
    stats.sha256 = digest.hexdigest()
    writer.check()
    return stats


class _Writer:
    """Makes prepared rows, and keeps the names of files that cannot be read or are odd."""

    def __init__(self, reading: Any, measure: Measure, stats: Statistics, more: More | None = None) -> None:
        self.reading, self.measure, self.stats, self.more = reading, measure, stats, more
        self.bad: list[str] = []
        self.odd: dict[str, list[str]] = {}

    def made(self, index: int, row: Row) -> tuple[Any, ...] | None:
        stats, reading, kind = self.stats, self.reading, self.measure.kind
        stats.rows_read += 1
        example = example_of(row, reading, index)
        try:
            data = example.file.read()
            found = self.measure(data)
        except Unreadable as error:
            reason = f"{kind.an} that cannot be read"
            stats.unusable[reason] = stats.unusable.get(reason, 0) + 1
            stats.rows_dropped += 1
            self.bad.append(f"{self._where(example.file, index)}: {error}")
            return None
        stats.note(reading.unread(row), (*example.changes, *found.changes))
        stats.rows_kept += 1
        if found.odd:
            self.odd.setdefault(found.odd, []).append(self._where(example.file, index))
        content = int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)
        file = example.file
        labels, further = (example.labels, ()) if self.more is None else self.more(example, *found.values)
        own = (*found.values, found.length, index, content, content)
        return file.path, file.member, file.data, labels, *own, *further

    def _where(self, file: MediaRef, index: int) -> str:
        return file.name if file.data is None else f"{self.reading.where(index)} ({file.path})"

    def check(self) -> None:
        """Name the files that cannot be read. Raises UserError where they are too many."""
        kind, stats = self.measure.kind, self.stats
        stats.warnings += [
            f"warning: {plural(len(files), kind.noun)} {word}: {_named(files)}" for word, files in self.odd.items()
        ]
        check_unreadable(stats, self.bad, kind)


def check_unreadable(stats: Statistics, bad: list[str], kind: Kind) -> None:
    """Name the files that cannot be read. Raises UserError where they are too many."""
    if not bad:
        return
    if len(bad) > MAX_UNSUPERVISED * stats.rows_read:
        raise UserError(
            f"{stats.source}: {len(bad):,} of {plural(stats.rows_read, kind.noun)} ({len(bad) / stats.rows_read:.0%}) "
            f"cannot be read, at most {MAX_UNSUPERVISED:.0%} may be left out: {_named(bad)}. Repair or remove them"
        )
    stats.warnings.append(f"warning: left out: {plural(len(bad), kind.noun)} that cannot be read: {_named(bad)}")


def _named(files: list[str]) -> str:
    return "; ".join(files[:BAD_SHOWN]) + (f"; and {len(files) - BAD_SHOWN} more" if len(files) > BAD_SHOWN else "")


def refs_of(targets: Iterable[str], kind: Kind) -> list[MediaRef]:
    """The files of a kind in files and folders, sorted, for predictions. Raises UserError where there are none."""
    found = list[MediaRef]()
    for target in targets:
        path = Path(target).expanduser()
        if not path.exists():
            raise UserError(f"--{kind.column}: {target}: no such file or folder")
        below = sorted(p for p in path.rglob("*") if p.is_file() and kind.fits(p.name)) if path.is_dir() else [path]
        if not below:
            raise UserError(f"--{kind.column}: {target}: this folder contains no {kind.plural} ({', '.join(kind.suffixes)})")
        found += [kind.ref(str(one)) for one in below]
    return found
