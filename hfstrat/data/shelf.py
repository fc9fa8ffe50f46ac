"""What stands in the cache folder: its entries, how large they may become together, and how they are removed.

An entry is a payload (an Arrow file) and a note (JSON) beside it: `{kind}-{fingerprint}.arrow` and `.json`. The note's time
of change is when the entry was last used. A process that uses an entry holds a shared lock on its payload until it ends;
one that removes it takes the lock for itself first, so nothing is removed that anyone still reads.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hfstrat.errors import UserError

LIMIT = "50GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNFINISHED = 3600.0  # seconds after which a folder that nobody builds in any more is swept away
_held: dict[Path, IO[bytes]] = {}  # payloads that this process uses


@dataclass(frozen=True, eq=False)
class Entry:
    """One thing in the cache. `value` is whatever its builder had to say beside the payload (any JSON)."""

    path: Path  # of the payload
    kind: str
    description: str
    value: Any
    size: int  # bytes, with the note
    made: float  # seconds since 1970
    used: float

    @property
    def name(self) -> str:
        return self.path.stem


def folder() -> Path:
    """`$HFSTRAT_CACHE`, else `$HF_HOME/hfstrat`, else `~/.cache/hfstrat`. Raises UserError if it cannot be made."""
    named, home = os.environ.get("HFSTRAT_CACHE"), os.environ.get("HF_HOME")
    path = Path(named or (f"{home}/hfstrat" if home else "~/.cache/hfstrat")).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: prepared data cannot be kept here ({error.strerror}); set HFSTRAT_CACHE to a folder"
        ) from None
    return path


def limit() -> float:
    """Bytes that all entries together may take: `$HFSTRAT_CACHE_MAX`, such as 50GB, or `none`."""
    text = os.environ.get("HFSTRAT_CACHE_MAX") or LIMIT
    if text.lower() == "none":
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.upper())
    if not match:
        raise UserError(f"HFSTRAT_CACHE_MAX: {text}: expected a size such as 50GB or 800MB, or none")
    return float(match[1]) * UNITS[match[2]]


def readable(size: float) -> str:
    """A number of bytes in words."""
    unit = next((unit for unit in "TGMK" if size >= UNITS[unit]), "")
    return f"{size / UNITS[unit]:.1f} {unit}B" if unit else f"{size:.0f} B"


def note_of(payload: Path) -> Path:
    return payload.with_suffix(".json")


def entries() -> list[Entry]:
    """All of them, the one used longest ago first."""
    names = {path.stem for path in folder().iterdir() if path.suffix in (".arrow", ".json") and path.name[0] != "."}
    found = (entry_at(folder() / f"{name}.arrow") for name in names)
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.used, entry.name))


def entry_at(payload: Path) -> Entry | None:
    """An entry as it says of itself, also where half of it is missing; None if another process has just removed it."""
    stats = []
    for file in (note_of(payload), payload):
        with suppress(OSError):
            stats.append(file.stat())
    if not stats:
        return None
    note = read_note(payload)
    kind, description = str(note.get("kind", "broken")), str(note.get("description", "not whole, never used"))
    size, used = sum(stat.st_size for stat in stats), stats[0].st_mtime
    return Entry(payload, kind, description, note.get("value"), size, float(note.get("made", used)), used)


def read_note(payload: Path) -> dict[str, Any]:
    """What stands in the note, nothing if it cannot be read."""
    try:
        note = json.loads(note_of(payload).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def hold(payload: Path) -> bool:
    """Keep an entry from being removed while this process lives; False if it is not there."""
    try:
        file = payload.open("rb")
    except OSError:
        return False
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    if not _same(file, payload):  # it was removed, or made anew, while we waited
        file.close()
        return False
    if earlier := _held.pop(payload, None):
        earlier.close()
    _held[payload] = file
    with suppress(OSError):  # a cache that we may only read
        os.utime(note_of(payload))
    return True


def in_use() -> list[str]:
    """The names of the entries that this process holds."""
    return sorted(payload.stem for payload in _held)


def let_go(payload: Path) -> None:
    """This process uses it no more."""
    if file := _held.pop(payload, None):
        file.close()


def _same(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def remove(entry: Entry) -> bool:
    """Remove an entry; False if a process still uses it (or the file system knows no locks, and nobody can tell)."""
    with suppress(FileNotFoundError), entry.path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        note_of(entry.path).unlink(missing_ok=True)
        entry.path.unlink(missing_ok=True)
        return True
    note_of(entry.path).unlink(missing_ok=True)  # a note without its payload
    return True


def shrink(beside: int = 0) -> None:
    """Remove what was used longest ago until all entries, and `beside` more bytes, are within the limit; say what goes."""
    allowed, there = limit(), entries()
    total = sum(entry.size for entry in there) + beside
    for entry in there:
        if total <= allowed:
            return
        if remove(entry):
            total -= entry.size
            _say(f"removed {entry.name} ({readable(entry.size)}, {entry.description}): more than {readable(allowed)} together")
    if total > allowed:
        _say(f"{readable(total)} are in use at once, more than {readable(allowed)}; nothing else is left to remove")


def _say(what: str) -> None:
    print(f"cache: {what} (HFSTRAT_CACHE_MAX)", file=sys.stderr, flush=True)


def check_room(needed: int, description: str) -> None:
    """Raises UserError where the disk has less room than `needed` bytes."""
    free = shutil.disk_usage(folder()).free
    if needed > free:
        raise UserError(
            f"{folder()}: {description} will take about {readable(needed)}, and {readable(free)} are free here; remove what "
            "you need no more (hfstrat cache ls, hfstrat cache rm), or set HFSTRAT_CACHE to a folder on another disk"
        )


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time inside, for each name; the others wait."""
    path = folder() / f".{name}.lock"
    if not os.access(folder(), os.W_OK):
        raise UserError(f"{folder()}: nothing can be kept here, since we may not write to it; set HFSTRAT_CACHE to a folder")
    while True:
        with path.open("w") as lock:
            with suppress(OSError):  # a file system without locks: each builds for itself, and the last one's stays
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _same(lock, path):  # it was the lock of one who has finished
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def sweep(name: str = "") -> None:
    """Remove what killed processes left half built: of `name` (whose lock we have), or all that is old."""
    for path in folder().glob(f".{name or '*'}-building-*"):
        if name or time.time() - path.stat().st_mtime > UNFINISHED:
            shutil.rmtree(path, ignore_errors=True)
