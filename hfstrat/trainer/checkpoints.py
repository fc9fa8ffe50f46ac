"""Complete checkpoints: a marker is written last, incomplete checkpoints are ignored, rotation keeps the last complete one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe import stored
from hfstrat.recipe.stored import upgraded

MARKER = "hfstrat_complete.json"
RESUME = "training.resume_from_checkpoint"
MAX_HASHED = 16 * 2**20  # bytes up to which a file is hashed: it is read again before use


def step_of(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[-1])


def all_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders by step, complete or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rsplit("-", 1)[-1].isdigit()]
    return sorted(found, key=step_of)


def complete(output_dir: Path) -> list[Path]:
    """The complete checkpoint folders by step, judged by the sizes of their files."""
    return [folder for folder in all_checkpoints(output_dir) if fault(folder, read=False) is None]


def fault(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is complete. Hashes of small files are compared if `read`."""
    if not (folder / MARKER).is_file():
        return f"it has no {MARKER}, so saving was interrupted"
    try:
        state = json.loads((folder / MARKER).read_text())  # unchanged, since the digest is computed from it
        sizes, hashes = dict(state["sizes"]), dict(state.get("sha256", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARKER} cannot be read"
    if state.get("digest", _digest(state)) != _digest(state):
        return f"its {MARKER} was changed"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
        if read and name in hashes and _sha256(file) != hashes[name]:
            return f"{name} was changed: its SHA-256 differs"
    return None


def mark_complete(folder: Path, state: dict[str, Any]) -> None:
    """Write the marker as the last file of a checkpoint, atomically, after all other files are on the disk (fsync)."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARKER]
    for file in files:
        _flush(file)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    hashes = {name: _sha256(folder / name) for name, size in sizes.items() if size <= MAX_HASHED}
    marker = json.loads(json.dumps({"sizes": sizes, "sha256": hashes, **state}))
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps(marker | {"digest": _digest(marker)}, indent=1))
    _flush(partial)
    partial.replace(folder / MARKER)
    _flush(folder)


def _flush(path: Path) -> None:
    """Flush to disk: after a power failure no marker may exist without the files that it describes."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(marker: dict[str, Any]) -> str:
    """The digest of a marker without its field `digest`."""
    text = json.dumps({key: value for key, value in marker.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def rotate(output_dir: Path, keep: int, best: str | None) -> None:
    """Delete all checkpoints but the best, the newest `keep` complete ones and incomplete ones newer than these."""
    completed = complete(output_dir)
    kept = {p.resolve() for p in completed[-keep:]}
    if best:
        kept.add(Path(best).resolve())
    newest = step_of(completed[-1]) if completed else -1
    for folder in all_checkpoints(output_dir):
        if folder.resolve() not in kept and step_of(folder) < newest:
            remove(folder)


def remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # an interrupted deletion leaves an incomplete checkpoint, not a broken one
    shutil.rmtree(folder, ignore_errors=True)


def find_resume(output_dir: Path, resume: str, recipe: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and remarks on those that were skipped and on changes of the recipe.

    Raises:
        UserError: a named checkpoint that is missing, incomplete or of another recipe.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        return _named(output_dir, resume, recipe)
    remarks: list[str] = []
    for folder in reversed(all_checkpoints(output_dir)):
        if (wrong := fault(folder)) is None:
            return folder, remarks + _changes(folder, recipe)
        remarks.append(f"{folder} is incomplete and skipped: {wrong}")
    return None, remarks


def _named(output_dir: Path, resume: str, recipe: dict[str, Any]) -> tuple[Path, list[str]]:
    """A checkpoint by its path, or a later one of this run, if the run was started from that path and interrupted."""
    named, expected = Path(resume).expanduser(), "expected auto, never or a checkpoint-N folder"
    if not named.is_dir():
        raise UserError(f"{RESUME}: {resume}: no such folder; {expected}")
    if wrong := fault(named):
        raise UserError(f"{RESUME}: {resume} holds no complete checkpoint: {wrong}; {expected}")
    later = [p for p in complete(output_dir) if step_of(p) > step_of(named) and p.resolve() != named.resolve()]
    key = RESUME.rpartition(".")[2]
    ours = [p for p in later if state_of(p).get("recipe", {}).get("training", {}).get(key) == resume and fault(p) is None]
    if ours:
        return ours[-1], [f"{ours[-1]} already continued from {resume}", *_changes(ours[-1], recipe)]
    if later:
        raise UserError(
            f"{RESUME}: {resume}: {output_dir} has later checkpoints of another run, up to {later[-1].name}; set another "
            f"output_dir, remove them, or set {RESUME}: auto to resume from the last one"
        )
    return named, _changes(named, recipe)


def _changes(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """The changes of the recipe since a checkpoint, in words. Raises UserError for changes that a resumed run must not have."""
    allowed, refused = stored.compare(state_of(folder)["recipe"], recipe)
    if refused:
        raise UserError(
            f"{folder} belongs to another recipe: {'; '.join(refused)}. "
            "Undo these changes to resume from it, or start again with --overwrite or another output_dir"
        )
    return [f"changed since {folder.name}: {change}" for change in allowed]


def extends_run(output_dir: Path, resume: str, recipe: dict[str, Any]) -> bool:
    """Whether the recipe now trains a finished run for longer."""
    if resume != "auto":
        return False
    newest = next((folder for folder in reversed(all_checkpoints(output_dir)) if fault(folder) is None), None)
    return newest is not None and stored.is_longer(state_of(newest)["recipe"], recipe)


def state_of(folder: Path) -> dict[str, Any]:
    """The content of a marker: the recipe, with today's names of keys, and the choices of the run."""
    state: dict[str, Any] = json.loads((folder / MARKER).read_text())
    return {**state, "recipe": upgraded(state["recipe"])} if "recipe" in state else state
