"""Where the images or recordings of a local folder or zip archive are, by `imagefolder` and `audiofolder` in `datasets`.

A folder for each class, or a `metadata.jsonl` (.csv, .parquet) with the column `file_name`; either of them in folders or
archives for each split (train, validation, test).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hfstrat.data import readers
from hfstrat.data.media_files import Kind, MediaRef, open_archive
from hfstrat.data.sources import SPLITS
from hfstrat.errors import UserError
from hfstrat.recipe.format import plural

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")
SHOWN = 3


@dataclass
class Layout:
    """The files of a kind in a folder or an archive: their names in it, sorted, and the file with their labels, if there is
    one."""

    root: Path
    kind: Kind
    names: list[str]
    metadata: str = ""
    others: list[str] = field(default_factory=list)  # files of no such kind
    empty: list[str] = field(default_factory=list)  # folders without any

    @property
    def is_archive(self) -> bool:
        return self.root.is_file()

    def ref(self, name: str) -> MediaRef:
        """The file with this name."""
        ref = self.kind.ref
        return ref(str(self.root), name) if self.is_archive else ref(str(self.root / name))

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each file: itself and its `label`, or the columns of the metadata. Raises UserError."""
        if self.metadata:
            yield from self._rows_of_metadata()
            return
        for name in self.names:
            yield {self.kind.column: self.ref(name), "label": PurePosixPath(name).parent.name}

    def _rows_of_metadata(self) -> Iterator[dict[str, Any]]:
        folder = PurePosixPath(self.metadata).parent
        for number, row in enumerate(self._read_metadata(), 1):
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{self.root}/{self.metadata}: row {number}: it has no {FILE_NAME}, the path of {self.kind.an} in it"
                )
            rest = {key: value for key, value in row.items() if key != FILE_NAME}
            yield {self.kind.column: self.ref(str(folder / name)), **rest}

    def _read_metadata(self) -> Iterator[dict[str, Any]]:
        if not self.is_archive:
            yield from readers.read(self.root / self.metadata)
            return
        with tempfile.TemporaryDirectory(prefix="hfstrat-metadata-") as folder:
            file = Path(folder) / PurePosixPath(self.metadata).name
            file.write_bytes(open_archive(str(self.root)).read(self.metadata))
            try:
                yield from readers.read(file)
            except UserError as error:
                raise UserError(str(error).replace(str(file), f"{self.root}/{self.metadata}")) from None

    def identity(self) -> list[Any]:
        """What changes whenever a file does: names with sizes and times, of an archive its own."""
        if self.is_archive:
            stat = self.root.stat()
            return [str(self.root), stat.st_size, stat.st_mtime_ns]
        found: list[Any] = [str(self.root)]
        for name in [*self.names, *([self.metadata] if self.metadata else [])]:
            stat = (self.root / name).stat()
            found.append((name, stat.st_size, stat.st_mtime_ns))
        return found

    def _unnamed(self) -> list[str]:
        """Images that the metadata do not name."""
        folder, named = PurePosixPath(self.metadata).parent, set[str]()
        for row in self._read_metadata():
            several = row.get("images")
            for each in (row.get(FILE_NAME), *(several if isinstance(several, list) else ())):
                named |= {str(folder / each)} if isinstance(each, str) else set()
        return [name for name in self.names if name not in named]

    def remarks(self) -> list[str]:
        """What is in the folder and is not read."""
        lines = []
        if self.metadata and (unnamed := self._unnamed()):
            shown = ", ".join(unnamed[:SHOWN]) + (", ..." if len(unnamed) > SHOWN else "")
            lines.append(f"warning: {plural(len(unnamed), 'image')} not read, not named by {self.metadata}: {shown}")
        if self.others:
            shown = ", ".join(self.others[:SHOWN]) + (", ..." if len(self.others) > SHOWN else "")
            lines.append(f"{plural(len(self.others), 'file')} not read, of other kinds than {self.kind.plural}: {shown}")
        if self.empty and not self.metadata:
            lines.append(f"warning: folders without {self.kind.plural}: {', '.join(self.empty[:SHOWN])}")
        return lines


def expected(kind: Kind) -> str:
    """What a folder or an archive should have, in words."""
    suffixes = ", ".join(kind.suffixes[:4])
    return f"a folder for each class with {kind.plural} ({suffixes} ...), or metadata.jsonl with file_name and label"


def find(source: str, key: str, splits: tuple[str, ...], kind: Kind, needs_metadata: str = "") -> Layout | None:
    """The files of a kind that a local folder or archive contains; None where it is neither, or a folder of tables alone.

    Args:
        splits: words for the split to read, of which the first that is present is.
        needs_metadata: where folders of classes are not enough: what metadata should be there for, and what is expected.

    Raises:
        UserError: a folder or an archive without them, or without the split.
    """
    path = Path(source).expanduser()
    layout = None
    if path.is_dir():
        layout = _of_folder(path.absolute(), source, key, splits, kind)
    elif path.is_file() and path.suffix.lower() == ".zip":
        layout = _of_archive(path.absolute(), source, key, splits, kind)
    if layout is not None:
        _check(layout, source, key, needs_metadata)
    return layout


def holds(source: str, kind: Kind) -> bool:
    """Whether a local source is a folder or a zip archive with files of a kind in it or below. Raises UserError: no archive."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.suffix.lower() == ".zip" and any(map(kind.fits, open_archive(str(path.absolute())).namelist()))
    files = (Path(parent) / name for parent, _, names in os.walk(path) for name in names) if path.is_dir() else iter(())
    return any(kind.fits(file.name) or (file.suffix.lower() == ".zip" and holds(str(file), kind)) for file in files)


def _of_folder(folder: Path, source: str, key: str, splits: tuple[str, ...], kind: Kind) -> Layout | None:
    if named := _split_parts(folder, kind):
        chosen = _choose(named, splits, source, key)
        return (_of_archive if chosen.is_file() else _of_folder)(chosen, source, key, splits if chosen.is_file() else (), kind)
    names, others, folders = list[str](), list[str](), list[str]()
    for parent, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not _is_ignored(name))
        inner = Path(parent).relative_to(folder).as_posix()
        if inner != ".":
            folders.append(inner)
        for name in sorted(files):
            if not _is_ignored(name):
                (names if kind.fits(name) else others).append(name if inner == "." else f"{inner}/{name}")
    metadata = next((name for name in METADATA if name in others), "")
    if not names and not metadata:
        if any(readers.file_kind(folder / name) for name in others if "/" not in name):
            return None
        raise UserError(f"{key}: {source}: this folder contains no {kind.plural}; expected {expected(kind)}")
    filled = {part for name in names for part in _parents(name)}
    empty = [name for name in folders if name not in filled]
    return Layout(folder, kind, names, metadata, [name for name in others if name != metadata], empty)


def _of_archive(file: Path, source: str, key: str, splits: tuple[str, ...], kind: Kind) -> Layout:
    members = [name for name in open_archive(str(file)).namelist() if not name.endswith("/")]
    members = sorted(name for name in members if not any(_is_ignored(part) for part in name.split("/")))
    tops = {name.split("/")[0] for name in members if name.count("/") > 1 or (name.split("/")[-1] in METADATA and "/" in name)}
    if tops and all(_split(top) for top in tops):
        present: dict[str, Path] = {_split(top): Path(top) for top in sorted(tops)}
        if splits and len(present) > 1:
            chosen = _choose(present, splits, source, key)
            members = [name for name in members if name.startswith(f"{chosen.as_posix()}/")]
    names, others = [name for name in members if kind.fits(name)], [name for name in members if not kind.fits(name)]
    metadata = next((name for name in others if PurePosixPath(name).name in METADATA), "")
    if not names:
        raise UserError(f"{key}: {source}: this archive contains no {kind.plural}; expected {expected(kind)}")
    return Layout(file, kind, names, metadata, [name for name in others if name != metadata])


def _check(layout: Layout, source: str, key: str, needs_metadata: str) -> None:
    if needs_metadata and not layout.metadata:
        raise UserError(f"{key}: {source}: {len(layout.names):,} {layout.kind.plural} have no metadata.jsonl {needs_metadata}")
    loose = [name for name in layout.names if "/" not in name]
    if loose and not layout.metadata:
        raise UserError(
            f"{key}: {source}: {len(loose):,} {layout.kind.plural}, such as {loose[0]}, are in no folder of a class, so they "
            f"have no label; expected {expected(layout.kind)}"
        )


def _split_parts(folder: Path, kind: Kind) -> dict[str, Path]:
    """The folders and archives that are named by a split. A class may have such a name: its folder has files in it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = _split(path.stem if path.suffix.lower() == ".zip" else path.name)
        if not split or (path.is_file() and path.suffix.lower() != ".zip"):
            continue
        if path.is_dir() and not any((path / name).is_file() for name in METADATA):
            with os.scandir(path) as entries:
                if any(entry.is_file() and kind.fits(entry.name) for entry in entries):
                    continue
        found.setdefault(split, path)
    return found


def _choose(named: dict[str, Path], splits: tuple[str, ...], source: str, key: str) -> Path:
    for split in splits:
        if split in named:
            return named[split]
    wanted = splits[0] if splits else "train"
    raise UserError(
        f"{key}: {source}: its parts are named {', '.join(sorted(named))}, and none is named {wanted}; name one of the folders"
    )


def _split(name: str) -> str:
    return SPLITS.get(name.lower(), "")


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def _parents(name: str) -> Iterator[str]:
    for parent in PurePosixPath(name).parents:
        yield parent.as_posix()
