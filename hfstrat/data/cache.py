"""What stands in the cache folder: its entries, how large they may become together, and how they are removed.

An entry is a payload (an Arrow file) and a note (JSON) beside it: `{kind}-{fingerprint}.arrow` and `.json`. The note's time
of change is when the entry was last used. A process that uses an entry holds a shared lock on its payload until it ends;
one that removes it takes the lock for itself first, so nothing is removed that anyone still reads.


Large things made once and kept, by a fingerprint of everything that they depend on: a changed input never gets old ones.

    entry = cache.fetch("rows", cache.fingerprint(inputs), "rows.jsonl, max_length 1024", build)
    rows = Dataset.from_file(str(entry.path))

`shelf` has what stands there; this is how it gets there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hfstrat import __version__, errors
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


__all__ = ["Entry", "digest_of", "fetch", "find", "fingerprint", "folder", "tokenizer_digest"]


CHUNK = 1 << 20


SAMPLES = 256  # chunks of a payload that are read to see whether it is whole


def digest_of(*files: Path) -> str:
    """SHA-256 over the bytes of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def digest_sampled(file: Path) -> str:
    """SHA-256 over the size and all bytes of a file of up to 256 MiB; of a larger one over 256 chunks of 1 MiB, evenly
    spread, with the first and the last.

    It is read at every start, and hashing 50 GB would take minutes. What it has to find is a file that was cut off, put
    together from two, or overwritten: a payload is on the disk (fsync) before it gets its name, gets it in one step, and is
    never written to again, so nothing of ours leaves a hole between two chunks. The failing of a disk, bit by bit, is found
    in small files only.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    count = min(SAMPLES, -(-size // CHUNK))
    with file.open("rb") as stream:
        for number in range(count):
            if size > SAMPLES * CHUNK:
                stream.seek(number * (size - CHUNK) // (count - 1))
            digest.update(stream.read(CHUNK))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Over the tokenizer's files as it would be saved, without the padding and cutting that its last call left behind."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_padding()  # each call sets both anew
        backend.no_truncation()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        names = "\n".join(str(file.relative_to(scratch)) for file in files)
        return hashlib.sha256(f"{names}\n{digest_of(*files)}".encode()).hexdigest()


def fingerprint(inputs: dict[str, Any]) -> str:
    """A name for what is made of these inputs by this version."""
    text = json.dumps({"version": __version__, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fetch(kind: str, name: str, description: str, build: Callable[[Path], Any], needed: int = 0) -> Entry:
    """The entry of this kind and name, built if it is not there or not whole. It is kept while this process lives.

    Args:
        kind: what it is, one word: `rows`, `features`, ...
        name: the `fingerprint` of everything it depends on.
        description: for people, what it was made of; it is shown by `hfstrat cache ls` and is no part of the name.
        build: writes the payload (an Arrow file) to the path it is given and returns what shall be kept beside it, any
            JSON, which comes back as `Entry.value`. One process builds at a time and the others wait for it, so `build`
            must not talk to them (no collective operations).
        needed: bytes that the payload will take, roughly; 0 where nobody knows.

    Raises:
        UserError: there is less room on the disk than `needed`.
        RunError: the disk is full (exit code 6). Nothing half written is left.
    """
    payload = folder() / f"{kind}-{name}.arrow"
    if (entry := _whole(payload)) is None:
        with alone(payload.stem):
            if (entry := _whole(payload)) is None:  # nobody made it while we waited
                sweep(payload.stem)
                shrink(needed)
                check_room(needed, description)
                _build(payload, {"kind": kind, "description": description}, build)
                entry = _whole(payload)
        shrink()
    if entry is None:
        raise errors.RunError(f"{payload}: what was just written here is gone, or is not what was written; is the disk sound?")
    return entry


def find(kind: str, name: str) -> Entry | None:
    """The entry if it is there and whole; it is kept while this process lives."""
    return _whole(folder() / f"{kind}-{name}.arrow")


def _build(payload: Path, note: dict[str, Any], build: Callable[[Path], Any]) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=f".{payload.stem}-building-", dir=folder()) as scratch:
            made, beside = Path(scratch) / "payload", Path(scratch) / "note"
            value = build(made)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            note |= {"made": time.time(), "sha256": digest_sampled(made), "value": value}
            beside.write_text(json.dumps(note), encoding="utf-8")
            note_of(payload).unlink(missing_ok=True)  # of a broken entry
            made.replace(payload)
            beside.replace(note_of(payload))
    except Exception as error:
        if errors.named(error).code != errors.DISK_FULL:
            raise
        raise errors.RunError(
            f"the disk is full: {folder()} has no room for {note['description']}; nothing half written is left. Remove what "
            "you need no more (hfstrat cache ls, hfstrat cache rm), or set HFSTRAT_CACHE to a folder on another disk",
            errors.DISK_FULL,
        ) from error


def _whole(payload: Path) -> Entry | None:
    """The entry, held from now on, if it is there and whole."""
    if hold(payload):
        note = read_note(payload)
        if {"kind", "value", "made"} <= set(note) and note.get("sha256") == digest_sampled(payload):
            return entry_at(payload)
        let_go(payload)
    return None
