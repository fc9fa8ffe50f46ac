"""Rows of one image with labels: where they come from, how they are read, and written to an Arrow file without their pixels.

A row keeps where its image is, not the image: a million rows take as much memory as their paths. Images in the bytes of a table
(Parquet, Arrow, a Hub data set) are copied into the prepared file, which is memory-mapped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data import image_layout, readers
from hfstrat.data.columns import propose
from hfstrat.data.image_files import SUFFIXES, ImageRef, Unreadable, decode, is_image
from hfstrat.data.image_layout import Layout
from hfstrat.data.labeled import ALIASES, LABELS, LabelFormat
from hfstrat.data.labels import STRIPPED, label_of
from hfstrat.data.sources import DataSource, detect_format, load_from_hub, local_files, splits_of
from hfstrat.data.stats import MAX_UNSUPERVISED, Statistics
from hfstrat.data.values import BadRow, Row, is_missing, shown
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    import pyarrow

FORMAT = "image-classification"
IMAGES = ("image", "img", "file_name")  # names of the column with the image, the first that is present
OUR_COLUMNS = sorted({*IMAGES, *LABELS})
OTHER_NAMES = (
    "img",
    "picture",
    "photo",
    "file_name",
    "filename",
    "file",
    "path",
    "filepath",
    "image_path",
    "image_file",
    "jpg",
)
BATCH = 256
BAD_SHOWN = 5  # unreadable images that are named
UNREADABLE = "an image that cannot be read"


class LabeledImage(NamedTuple):
    """A row: where its image is, and the names of its labels. `changes` are what reading has changed, in words."""

    image: ImageRef
    labels: list[str]
    changes: tuple[str, ...] = ()

    @property
    def prompt(self) -> ImageRef:
        return self.image

    @property
    def answer(self) -> str:
        return ", ".join(self.labels)


@dataclass
class ImageFormat(LabelFormat):
    """How the rows of one source are read: `columns` are our names of the image and the label."""

    format = FORMAT

    @classmethod
    def choose_columns(cls, given: list[str], source: str) -> tuple[str, str, str]:
        image = next((name for name in IMAGES if name in given), None)
        label = next((name for name in LABELS if name in given), None)
        if image and label:
            return image, "", label
        wanted: dict[str, tuple[str, ...]] = {} if image else {"image": OTHER_NAMES}
        wanted |= {} if label else {"label": ALIASES["label"]}
        raise UserError(
            f"{source}: task {FORMAT} needs an image and a label; the data have {', '.join(given) or 'no columns'}. "
            f"{propose(given, wanted)}"
        )

    def example(self, row: Mapping[str, Any]) -> Any:
        """Raises BadRow where the row does not fit."""
        named = self.values(row)
        image, _, label = self.columns
        given = self._given(named[label], label)
        labels = [label_of(value, label, self.class_names) for value in given]
        if len(set(labels)) < len(labels):
            raise BadRow(f"'{label}' contains duplicate labels: {shown(given)}; expected the labels that apply, such as [1, 4]")
        changes = (STRIPPED,) if any(isinstance(each, str) and each != each.strip() for each in given) else ()
        return LabeledImage(image_of(named[image], image), labels, changes)


def image_of(value: Any, column: str) -> ImageRef:
    """The image of a cell: as the source has resolved it, or bytes with a path, as `datasets` stores them.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        data, path = value.get("bytes"), str(value.get("path") or "")
        if isinstance(data, bytes):
            return ImageRef(path or "(bytes)", data=data)
        if path:
            return ImageRef(path)
    if isinstance(value, bytes):
        return ImageRef("(bytes)", data=value)
    if is_missing(value):
        raise BadRow(f"'{column}' is null, expected the path or the bytes of an image")
    raise BadRow(f"'{column}' is {type(value).__name__}, expected the path or the bytes of an image: {shown(value)}")


@dataclass
class ImageSource(DataSource):
    """One source of images: a folder or archive (`layout`), images by a glob, tables with paths or bytes, or a Hub data set."""

    layout: Layout | None = None
    paths: tuple[Path, ...] = ()  # images that a glob matches

    @classmethod
    def open(cls, source: Source, data: Data, key: str) -> ImageSource:
        split, folder_splits = splits_of(source, data, key)
        if layout := image_layout.find(source.path, key, folder_splits):
            return cls(source, data, None, None, layout=layout)
        if paths := _matched_images(source.path, key):
            return cls(source, data, None, None, paths=paths)
        files = local_files(source.path, key, folder_splits)
        if files is not None:
            if texts := [file for file in files if readers.file_kind(file) == "text"]:
                raise UserError(
                    f"{key}: {texts[0]}: a text file has no labels; expected a table with the columns image and label"
                )
            return cls(source, data, files, None)
        config, revision = data.of(source, "config"), data.of(source, "revision")
        return cls(source, data, None, _undecoded(load_from_hub(source.path, key, config, split, revision)))

    def read(self) -> tuple[Iterator[Row], Any]:
        return detect_format(self.rows(), self.source.path, *self.wanted, self.detect, self.class_names)

    def rows(self) -> Iterator[Row]:
        if self.layout is not None:
            return self.layout.rows()
        if self.paths:
            return ({"image": ImageRef(str(path)), "label": path.parent.name} for path in self.paths)
        if self.hub is not None:
            return (readers.drop_nulls(row) for row in self.hub)
        return itertools.chain.from_iterable(map(self._rows_of, self.files or []))

    def _rows_of(self, file: Path) -> Iterator[Row]:
        """The rows of a table. Paths of images are relative to its folder."""
        mapping, folder = self.wanted[1], file.absolute().parent
        for row in readers.read(file):
            for name, value in row.items():
                if mapping.get(name, name) in IMAGES and isinstance(value, str) and value.strip():
                    row = {**row, name: ImageRef(str(folder / value.strip()))}
            yield row

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        return {} if self.layout is not None or self.paths else super().class_names

    def digest(self) -> str:
        """A hash of what the rows are read from; of images by name, size and time, not by their bytes."""
        if self.layout is not None:
            stated: list[Any] = self.layout.identity()
        elif self.paths:
            stated = [stat_of(str(path)) for path in self.paths]
        elif self.files is not None:
            refs = (value for row in self.rows() for value in row.values() if isinstance(value, ImageRef))
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


def _matched_images(source: str, key: str) -> tuple[Path, ...]:
    import glob

    if not glob.has_magic(source):
        if Path(source).expanduser().is_file() and is_image(source):
            raise UserError(f"{key}: {source} is a single image; expected a folder for each class, a table, or a zip archive")
        return ()
    found = sorted(Path(name).absolute() for name in glob.glob(str(Path(source).expanduser()), recursive=True))
    return tuple(path for path in found if path.is_file() and is_image(path.name))


def _undecoded(rows: Any) -> Any:
    """A Hub data set whose images are bytes with a path."""
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def check_source(source: Source, data: Data, key: str, reader: Any) -> None:
    """Refuse a local source without images, or whose first rows cannot be read, before torch. Raises UserError."""
    opened = ImageSource.open(source, data, key)
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


def schema() -> pyarrow.Schema:
    """Columns of the prepared rows. `image` has bytes for images of tables, else they are at `path` (in an archive `member`).

    `content` are the first 64 bits of the SHA-256 of an image's bytes, as is `text_hash`, by which rows are held out together.
    """
    import pyarrow as pa

    fields = [("path", pa.string()), ("member", pa.string()), ("image", pa.large_binary()), ("names", pa.list_(pa.string()))]
    numbers = [("width", pa.int32()), ("height", pa.int32()), ("length", pa.int32()), ("row", pa.int64())]
    return pa.schema([*fields, *numbers, ("content", pa.int64()), ("text_hash", pa.int64())])


More = Callable[[Any, int, int], tuple[list[str], tuple[Any, ...]]]
"""From an example, the width and the height of its image to its labels and the values of further columns."""


def write_images(
    rows: Iterable[Row],
    reading: Any,
    length: int,
    target: Path,
    further: pyarrow.Schema | None = None,
    more: More | None = None,
) -> Statistics:
    """Write the prepared rows to an Arrow stream (see `schema`) and return their statistics. Every image is decoded once.

    Args:
        length: of an image in the units of `length`: patches.
        further: columns of the task, whose values `more` gives.

    Raises:
        UserError: rows that do not fit their format, or too many images that cannot be read.
    """
    import pyarrow as pa

    stats = Statistics(reading.source, reading.kind, many_labels=reading.many, warnings=list(reading.remarks))
    digest, bad, numbered = hashlib.sha256(), list[str](), enumerate(rows)
    columns = pa.schema([*schema(), *(further or ())])
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
        while batch := list(itertools.islice(numbered, BATCH)):
            found = (_made(index, row, reading, length, stats, bad, more) for index, row in batch)
            made = [row for row in found if row is not None]
            digest.update(repr([(*row[3:6], row[8], *row[10:]) for row in made]).encode("utf-8", "surrogatepass"))
            arrays = [list(column) for column in zip(*made, strict=True)] if made else [[]] * len(columns)
            stream.write_batch(pa.record_batch(arrays, schema=columns))
    stats.sha256 = digest.hexdigest()
    check_unreadable(stats, bad)
    return stats


def _made(
    index: int, row: Row, reading: Any, length: int, stats: Statistics, bad: list[str], more: More | None
) -> tuple[Any, ...] | None:
    stats.rows_read += 1
    example = example_of(row, reading, index)
    try:
        data = example.image.read()
        found = decode(data)
    except Unreadable as error:
        stats.unusable[UNREADABLE] = stats.unusable.get(UNREADABLE, 0) + 1
        stats.rows_dropped += 1
        bad.append(f"{_where(example.image, reading, index)}: {error}")
        return None
    stats.note(reading.unread(row), (*example.changes, *found.changes))
    stats.rows_kept += 1
    content = int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)
    image, (width, height) = example.image, found.image.size
    labels, values = (example.labels, ()) if more is None else more(example, width, height)
    return image.path, image.member, image.data, labels, width, height, length, index, content, content, *values


def _where(image: ImageRef, reading: Any, index: int) -> str:
    return image.name if image.data is None else f"{reading.where(index)} ({image.path})"


def check_unreadable(stats: Statistics, bad: list[str]) -> None:
    """Name the images that cannot be read. Raises UserError where they are too many."""
    if not bad:
        return
    named = "; ".join(bad[:BAD_SHOWN]) + (f"; and {len(bad) - BAD_SHOWN} more" if len(bad) > BAD_SHOWN else "")
    if len(bad) > MAX_UNSUPERVISED * stats.rows_read:
        raise UserError(
            f"{stats.source}: {len(bad):,} of {plural(stats.rows_read, 'image')} ({len(bad) / stats.rows_read:.0%}) cannot be "
            f"read, at most {MAX_UNSUPERVISED:.0%} may be left out: {named}. Repair or remove them"
        )
    stats.warnings.append(f"warning: {plural(len(bad), 'image')} cannot be read and are left out: {named}")


def refs_of(targets: Iterable[str]) -> list[ImageRef]:
    """The images of files and folders, sorted, for predictions. Raises UserError where there are none."""
    found = list[ImageRef]()
    for target in targets:
        path = Path(target).expanduser()
        if not path.exists():
            raise UserError(f"--image: {target}: no such file or folder")
        below = sorted(p for p in path.rglob("*") if p.is_file() and is_image(p.name)) if path.is_dir() else [path]
        if not below:
            raise UserError(f"--image: {target}: this folder contains no images ({', '.join(SUFFIXES)})")
        found += [ImageRef(str(one)) for one in below]
    return found
