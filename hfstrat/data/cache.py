"""Prepared data on disk, by a fingerprint of everything that they depend on: a changed input is never given old rows."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfstrat import __version__
from hfstrat.data.account import Account
from hfstrat.errors import UserError

CHUNK = 1 << 20


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


def digest_of(*files: Path) -> str:
    """SHA-256 over the bytes of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
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
    """A name for data made of these inputs by this version."""
    text = json.dumps({"version": __version__, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fetch(name: str, build: Callable[[Path], Account]) -> tuple[Path, Account]:
    """The Arrow file of this name and its account, built if it is not there or not whole.

    Each file is written under a name of its own and renamed, so that another process that builds the same never sees half
    of one; both make the same bytes, so it does not matter whose come last.
    """
    rows, note = folder() / f"{name}.arrow", folder() / f"{name}.json"
    if (account := _read(rows, note)) is not None:
        return rows, account
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder()) as scratch:
        made = Path(scratch) / "rows"
        account = build(made)
        content = {"sha256": digest_of(made), "account": asdict(account)}
        (Path(scratch) / "note").write_text(json.dumps(content), encoding="utf-8")
        made.replace(rows)
        (Path(scratch) / "note").replace(note)
    return rows, account


def _read(rows: Path, note: Path) -> Account | None:
    """The account of a whole entry, or None."""
    try:
        stored = json.loads(note.read_text(encoding="utf-8"))
        return Account.of(stored["account"]) if stored["sha256"] == digest_of(rows) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
