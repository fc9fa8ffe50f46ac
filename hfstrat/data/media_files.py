"""Images and recordings of files, archives and tables: how their bytes are found."""

from __future__ import annotations

import functools
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.errors import UserError, first_line

MAX_BYTES = 2**30  # of one file


class Unreadable(Exception):
    """A file that cannot be used; the message says why."""


class MediaRef(NamedTuple):
    """Where a file is: on disk, a member of a zip archive, or bytes of a table. `path` is absolute where it is local."""

    path: str
    member: str = ""
    data: bytes | None = None

    @property
    def name(self) -> str:
        """The file, named for messages."""
        return f"{self.path}/{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """Its bytes. Raises Unreadable."""
        if self.data is not None:
            return self.data
        try:
            if self.member:
                return read_member(self.path, self.member)
            check_bytes(os.path.getsize(self.path))
            return Path(self.path).read_bytes()
        except FileNotFoundError:
            raise Unreadable("no such file") from None
        except IsADirectoryError:
            raise Unreadable("it is a folder") from None
        except (OSError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise Unreadable(f"it cannot be read: {first_line(error)}") from None

    def open(self) -> Any:
        """The decoded file. Raises Unreadable."""
        raise NotImplementedError


class Kind(NamedTuple):
    """What distinguishes images from recordings where rows are found and read."""

    noun: str
    plural: str
    column: str  # of a folder's rows
    names: tuple[str, ...]  # of the column with the file, the first that is present
    others: tuple[str, ...]  # names that are proposed for it
    suffixes: tuple[str, ...]
    feature: str  # of `datasets`
    ref: type[MediaRef]

    @property
    def an(self) -> str:
        """The noun with its article."""
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    def fits(self, name: str) -> bool:
        """Whether a file is of this kind, by its suffix."""
        return os.path.splitext(name)[1].lower() in self.suffixes


def check_bytes(size: int) -> None:
    """Raises Unreadable for a file that is too large."""
    if size > MAX_BYTES:
        raise Unreadable(f"it has {size:,} bytes, more than {MAX_BYTES:,}")


def open_archive(path: str) -> zipfile.ZipFile:
    """A zip archive, opened once in each process. Raises UserError if it is none."""
    return _opened(path, os.getpid())


@functools.lru_cache(maxsize=8)
def _opened(path: str, process: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not a readable zip archive: {first_line(error)}") from None


def read_member(path: str, member: str) -> bytes:
    """The bytes of a member of an archive. Raises Unreadable where they are too many."""
    archive = open_archive(path)
    check_bytes(archive.getinfo(member).file_size)
    return archive.read(member)
