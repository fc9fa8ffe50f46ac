"""Checkpoints that are complete or do not count: a marker is written last, and rotation never deletes the last good one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError

MARKER = "hfstrat_complete.json"
MAY_CHANGE = (
    "evaluation",
    "hub",
    "output_dir",
    "training.per_device_",
    "training.report_to",
    "training.activation_checkpointing",
    "training.resume",
    "training.logging_steps",
    "training.save_total_limit",
    "strategy.baseline",
)


def step_of(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[-1])


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders by step, whether complete or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rsplit("-", 1)[-1].isdigit()]
    return sorted(found, key=step_of)


def is_complete(folder: Path) -> bool:
    """Whether every file that was there when the marker was written is there in its size."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    try:
        sizes = json.loads(marker.read_text())["sizes"]
    except (ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def mark_complete(folder: Path, state: dict[str, Any]) -> None:
    """Write the marker, as the last file of a checkpoint and in one move."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARKER]
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps({"sizes": sizes, **state}, indent=1))
    partial.replace(folder / MARKER)


def rotate(output_dir: Path, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` complete checkpoints and the best; incomplete older ones go too."""
    complete = [p for p in all_checkpoints(output_dir) if is_complete(p)]
    kept = {p.resolve() for p in complete[-keep:]}
    if best:
        kept.add(Path(best).resolve())
    newest = step_of(complete[-1]) if complete else -1
    for folder in all_checkpoints(output_dir):
        if folder.resolve() not in kept and step_of(folder) < newest:
            (folder / MARKER).unlink(missing_ok=True)  # a deletion cut short leaves an incomplete one, not a broken one
            shutil.rmtree(folder, ignore_errors=True)


def find_resume(output_dir: Path, resume: str, recipe: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and remarks about those that were passed over.

    Raises:
        UserError: a named checkpoint that is missing or incomplete, or one made by another recipe.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir() or not is_complete(folder):
            state = "holds no complete checkpoint" if folder.is_dir() else "no such folder"
            raise UserError(f"training.resume: {resume}: {state}; expected auto, never or a checkpoint-N folder")
        _same_recipe(folder, recipe)
        return folder, []
    remarks: list[str] = []
    for folder in reversed(all_checkpoints(output_dir)):
        if is_complete(folder):
            _same_recipe(folder, recipe)
            return folder, remarks
        remarks.append(f"{folder} is incomplete and passed over")
    return None, remarks


def _same_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    before = _flat(json.loads((folder / MARKER).read_text())["recipe"])
    now = _flat(recipe)
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{folder} was made by another recipe: {'; '.join(changed)}. "
            "Undo that to go on from it, or start afresh with --overwrite or another output_dir"
        )


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / MARKER).read_text())
    return state


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
