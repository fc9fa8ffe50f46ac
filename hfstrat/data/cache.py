"""The cache: large results computed once and stored under a fingerprint of everything that they depend on.

    entry = cache.fetch("rows", cache.fingerprint(inputs), "rows.jsonl, max_length 1024", build)
    rows = Dataset.from_file(str(entry.path))

An entry is a payload (an Arrow file) and a note (JSON) next to it: `{kind}-{fingerprint}.arrow` and `.json`. The modification
time of the note is when the entry was last used. A process that uses an entry holds a shared lock on its payload until it
ends; a process that removes one takes an exclusive lock first, so that nothing is removed while it is read.

Why not the fingerprint cache of `datasets`: it hashes the function and its arguments instead of the bytes that were read, has
no limit on its size and no locks, and stores only data sets; here are also features, hidden states and teacher outputs.
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
from hfstrat.recipe.format import file_size

LIMIT = "50GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNFINISHED = 3600.0  # seconds after which the folder of an unfinished build is removed
CHUNK = 1 << 20
SAMPLES = 256  # chunks of a payload that are hashed to verify that it is complete
_held: dict[Path, IO[bytes]] = {}  # payloads that this process uses


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of the cache. `value` is what its builder returned, any JSON."""

    path: Path  # of the payload
    kind: str
    description: str
    value: Any
    size: int  # bytes, including the note
    created: float  # seconds since 1970
    used: float

    @property
    def name(self) -> str:
        return self.path.stem


def folder() -> Path:
    """`$HFSTRAT_CACHE`, else `$HF_HOME/hfstrat`, else `~/.cache/hfstrat`. Raises UserError if it cannot be created."""
    named, home = os.environ.get("HFSTRAT_CACHE"), os.environ.get("HF_HOME")
    path = Path(named or (f"{home}/hfstrat" if home else "~/.cache/hfstrat")).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create the cache folder ({error.strerror}); set HFSTRAT_CACHE to a folder") from None
    return path


def size_limit() -> float:
    """The size in bytes that all entries together may have: `$HFSTRAT_CACHE_MAX`, such as 50GB, or `none`."""
    text = os.environ.get("HFSTRAT_CACHE_MAX") or LIMIT
    if text.lower() == "none":
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.upper())
    if not match:
        raise UserError(f"HFSTRAT_CACHE_MAX: {text}: expected a size such as 50GB or 800MB, or none")
    return float(match[1]) * UNITS[match[2]]


def note_path(payload: Path) -> Path:
    return payload.with_suffix(".json")


def entries() -> list[Entry]:
    """All entries, least recently used first."""
    names = {path.stem for path in folder().iterdir() if path.suffix in (".arrow", ".json") and path.name[0] != "."}
    found = (entry_at(folder() / f"{name}.arrow") for name in names)
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.used, entry.name))


def entry_at(payload: Path) -> Entry | None:
    """The entry as its note describes it, also if half of it is missing; None if another process has just removed it."""
    stats = []
    for file in (note_path(payload), payload):
        with suppress(OSError):
            stats.append(file.stat())
    if not stats:
        return None
    note = read_note(payload)
    kind, description = str(note.get("kind", "broken")), str(note.get("description", "incomplete, never used"))
    size, used = sum(stat.st_size for stat in stats), stats[0].st_mtime
    return Entry(payload, kind, description, note.get("value"), size, float(note.get("created", used)), used)


def read_note(payload: Path) -> dict[str, Any]:
    """The content of the note; empty if it cannot be read."""
    try:
        note = json.loads(note_path(payload).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def acquire(payload: Path) -> bool:
    """Protect an entry from removal while this process runs; False if it does not exist."""
    try:
        file = payload.open("rb")
    except OSError:
        return False
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    if not _is_same(file, payload):  # it was removed, or built again, while this process waited
        file.close()
        return False
    if earlier := _held.pop(payload, None):
        earlier.close()
    _held[payload] = file
    with suppress(OSError):  # a read-only cache
        os.utime(note_path(payload))
    return True


def names_in_use() -> list[str]:
    """The names of the entries that this process uses."""
    return sorted(payload.stem for payload in _held)


def release(payload: Path) -> None:
    """Allow the removal of an entry that this process no longer uses."""
    if file := _held.pop(payload, None):
        file.close()


def _is_same(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def remove(entry: Entry) -> bool:
    """Remove an entry; False if a process still uses it, or if that is unknown (a file system without locks)."""
    with suppress(FileNotFoundError), entry.path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        note_path(entry.path).unlink(missing_ok=True)
        entry.path.unlink(missing_ok=True)
        return True
    note_path(entry.path).unlink(missing_ok=True)  # a note without its payload
    return True


def evict(needed: int = 0) -> None:
    """Remove the least recently used entries until all of them and `needed` more bytes are within the limit; print each."""
    allowed, present = size_limit(), entries()
    total = sum(entry.size for entry in present) + needed
    for entry in present:
        if total <= allowed:
            return
        if remove(entry):
            total -= entry.size
            _print(f"removed {entry.name} ({file_size(entry.size)}, {entry.description}): limit {file_size(allowed)} exceeded")
    if total > allowed:
        _print(f"{file_size(total)} are in use, more than the limit of {file_size(allowed)}; nothing else can be removed")


def _print(message: str) -> None:
    print(f"cache: {message} (HFSTRAT_CACHE_MAX)", file=sys.stderr, flush=True)


def check_free_space(needed: int, description: str) -> None:
    """Raises UserError if the disk has less free space than `needed` bytes."""
    free = shutil.disk_usage(folder()).free
    if needed > free:
        raise UserError(
            f"{folder()}: {description}: about {file_size(needed)} are needed, but only {file_size(free)} are free; remove "
            "entries that are no longer needed (hfstrat cache ls, hfstrat cache rm), or set HFSTRAT_CACHE to a folder on "
            "another disk"
        )


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Run the body in one process at a time for each name; the others wait."""
    path = folder() / f".{name}.lock"
    if not os.access(folder(), os.W_OK):
        raise UserError(f"{folder()}: the cache folder is not writable; set HFSTRAT_CACHE to another folder")
    while True:
        with path.open("w") as lock:
            with suppress(OSError):  # a file system without locks: every process builds, and the last entry remains
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_same(lock, path):  # the lock of a process that has finished
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def remove_unfinished(name: str = "") -> None:
    """Remove unfinished builds of killed processes: those of `name` (whose lock is held), or all old ones."""
    for path in folder().glob(f".{name or '*'}-building-*"):
        if name or time.time() - path.stat().st_mtime > UNFINISHED:
            shutil.rmtree(path, ignore_errors=True)


def digest_of(*files: Path) -> str:
    """SHA-256 over the bytes of the files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def digest_sampled(file: Path, samples: int = SAMPLES, chunk: int = CHUNK) -> str:
    """SHA-256 over the size and all bytes of a file of up to 256 MiB; of a larger one over 256 evenly spread chunks of 1 MiB,
    the first and the last included.

    Args:
        samples: other than 256 chunks.
        chunk: other than 1 MiB.

    It is computed at every start, and hashing 50 GB would take minutes. It has to find a file that was truncated, joined from
    two, or overwritten: a payload is on the disk (fsync) before it gets its name, gets it in one step, and is never written
    to again, so hfstrat itself leaves no hole between two chunks. Single bits that fail on the disk are found in small files
    only.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    count = min(samples, -(-size // chunk))
    with file.open("rb") as stream:
        for number in range(count):
            if size > samples * chunk:
                stream.seek(number * (size - chunk) // (count - 1))
            digest.update(stream.read(chunk))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the files of the saved tokenizer, without the padding and truncation settings that its last call left."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_padding()  # each call sets both again
        backend.no_truncation()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        names = "\n".join(str(file.relative_to(scratch)) for file in files)
        return hashlib.sha256(f"{names}\n{digest_of(*files)}".encode()).hexdigest()


def fingerprint(inputs: dict[str, Any]) -> str:
    """A name for what this version builds from these inputs."""
    text = json.dumps({"version": __version__, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fetch(kind: str, name: str, description: str, build: Callable[[Path], Any], needed: int = 0) -> Entry:
    """The entry of this kind and name, built if it is missing or incomplete. It is protected while this process runs.

    Args:
        kind: what it is, one word: `rows`, `features`, ...
        name: the `fingerprint` of everything it depends on.
        description: what it was built from, as `hfstrat cache ls` shows it; not part of the name.
        build: writes the payload (an Arrow file) to the given path and returns any JSON, which is stored with it as
            `Entry.value`. One process builds while the others wait, so `build` must not communicate with them (no collective
            operations).
        needed: size of the payload in bytes, roughly; 0 if unknown.

    Raises:
        UserError: there is less free space on the disk than `needed`.
        RunError: the disk is full (exit code 6). No partial entry is left.
    """
    payload = folder() / f"{kind}-{name}.arrow"
    if (entry := _find_complete(payload)) is None:
        with exclusive(payload.stem):
            if (entry := _find_complete(payload)) is None:  # no other process built it in the meantime
                remove_unfinished(payload.stem)
                evict(needed)
                check_free_space(needed, description)
                _build(payload, {"kind": kind, "description": description}, build)
                entry = _find_complete(payload)
        evict()
    if entry is None:
        raise errors.RunError(f"{payload}: the file just written is missing or changed; check the disk")
    return entry


def find(kind: str, name: str) -> Entry | None:
    """The entry if it exists and is complete; it is protected while this process runs."""
    return _find_complete(folder() / f"{kind}-{name}.arrow")


def _build(payload: Path, note: dict[str, Any], build: Callable[[Path], Any]) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=f".{payload.stem}-building-", dir=folder()) as scratch:
            payload_file, note_file = Path(scratch) / "payload", Path(scratch) / "note"
            value = build(payload_file)
            with payload_file.open("rb") as file:
                os.fsync(file.fileno())
            note |= {"created": time.time(), "sha256": digest_sampled(payload_file), "value": value}
            note_file.write_text(json.dumps(note), encoding="utf-8")
            note_path(payload).unlink(missing_ok=True)  # of a broken entry
            payload_file.replace(payload)
            note_file.replace(note_path(payload))
    except Exception as error:
        if errors.named(error).code != errors.DISK_FULL:
            raise
        raise errors.RunError(
            f"the disk is full: {folder()} has no room for {note['description']}; no partial entry is left. Remove entries "
            "that are no longer needed (hfstrat cache ls, hfstrat cache rm), or set HFSTRAT_CACHE to a folder on another disk",
            errors.DISK_FULL,
        ) from error


def _find_complete(payload: Path) -> Entry | None:
    """The entry, protected from now on, if it exists and is complete."""
    if acquire(payload):
        note = read_note(payload)
        if {"kind", "value", "created"} <= set(note) and note.get("sha256") == digest_sampled(payload):
            return entry_at(payload)
        release(payload)
    return None
