"""Large things made once and kept, by a fingerprint of everything that they depend on: a changed input never gets old ones.

    entry = cache.fetch("rows", cache.fingerprint(inputs), "rows.jsonl, max_length 1024", build)
    rows = Dataset.from_file(str(entry.path))

`shelf` has what stands there; this is how it gets there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat import __version__, errors
from hfstrat.data import shelf
from hfstrat.data.shelf import Entry, folder

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
        with shelf.alone(payload.stem):
            if (entry := _whole(payload)) is None:  # nobody made it while we waited
                shelf.sweep(payload.stem)
                shelf.shrink(needed)
                shelf.check_room(needed, description)
                _build(payload, {"kind": kind, "description": description}, build)
                entry = _whole(payload)
        shelf.shrink()
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
            shelf.note_of(payload).unlink(missing_ok=True)  # of a broken entry
            made.replace(payload)
            beside.replace(shelf.note_of(payload))
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
    if shelf.hold(payload):
        note = shelf.read_note(payload)
        if {"kind", "value", "made"} <= set(note) and note.get("sha256") == digest_sampled(payload):
            return shelf.entry_at(payload)
        shelf.let_go(payload)
    return None
