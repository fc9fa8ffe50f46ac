"""The output folder of a run: used by one run at a time, and written to only once the run can start."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from hfstrat.errors import NAMES, OK, UserError
from hfstrat.recipe import format
from hfstrat.recipe.load import about
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import report
from hfstrat.trainer import checkpoints

RESULT = "final"
LOCK = ".hfstrat.lock"  # also marks the folder of a run
EARLIER = "report.earlier.json"  # the report of the previous session
OURS = (
    *("checkpoint-*", RESULT, f"{RESULT}.partial", "report.json", "report.partial", EARLIER, "recipe.yaml"),
    *("report.html", "report.html.partial", "pictures.json"),
    *("evaluation_rows.npz", "measured_before.json", "generations.jsonl"),
)
SPARE_BYTES = 64 * 2**20  # tokenizer, logs and the like


def claim(recipe: Recipe, overwrite: bool) -> IO[str]:
    """Create and lock the folder until the returned file is closed, and write the recipe to it.

    Raises:
        UserError: the folder is in use.
    """
    check_output(recipe, overwrite)
    folder = Path(recipe.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"output_dir: {folder} is in use by another run; name another folder") from None
    with unlocked_on_error(lock):
        if overwrite:
            clear(folder)
        elif (folder / "report.json").is_file():  # the run continues, so this is no longer its end
            (folder / "report.json").replace(folder / EARLIER)
            (folder / "report.html").unlink(missing_ok=True)
        write_recipe(recipe)
    return lock


def clear(folder: Path) -> None:
    """Remove a run, or half of one, from its folder; other files are kept."""
    for path in (path for pattern in OURS for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_recipe(recipe: Recipe) -> None:
    """Write the recipe of a run into its folder, with every setting."""
    text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    (Path(recipe.output_dir).expanduser() / "recipe.yaml").write_text(text, encoding="utf-8")


@contextmanager
def unlocked_on_error(lock: IO[str] | None) -> Iterator[None]:
    """Unlock the folder if this fails: an exception that is kept would keep the file open, and the folder locked."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.close()
        raise


def discard(folder: Path) -> None:
    """Remove a half-written result."""
    shutil.rmtree(folder / f"{RESULT}.partial", ignore_errors=True)


def publish(partial: Path) -> Path:
    """Rename a verified result to its final name, replacing an earlier one; returns the folder."""
    final = partial.with_name(RESULT)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    return final


def check_output(recipe: Recipe, overwrite: bool) -> None:
    """Refuse an output folder with other content, or with a finished run. Raises UserError: the reason, and what to do."""
    folder = Path(recipe.output_dir).expanduser()
    if folder.is_file():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        if parent.is_file():
            raise UserError(f"output_dir: {folder}: {parent} is a file, so no folder can be created in it; name another folder")
        if not os.access(parent, os.W_OK):
            raise UserError(f"output_dir: {folder}: no permission to write in {parent}")
        return
    if not (folder / LOCK).is_file():
        raise UserError(f"output_dir: {folder} contains files that are not of an hfstrat run; name another folder")
    if overwrite:
        _check_nothing_needed(recipe, folder)
        return
    try:
        is_finished = report.status(folder) == NAMES[OK]
    except UserError as error:
        raise UserError(
            f"output_dir: {error}, so it is unknown whether this run has finished; name another folder, or replace the run "
            "with --overwrite"
        ) from None
    if is_finished and not checkpoints.extends_run(folder, recipe.training.resume_from_checkpoint, recipe.model_dump()):
        raise UserError(
            f"output_dir: {folder} holds a finished run; name another folder, raise training.num_train_epochs or max_steps "
            "to continue it, or run with --overwrite to replace it"
        )
    if recipe.training.resume_from_checkpoint == "never" and checkpoints.all_checkpoints(folder):
        raise UserError(
            f"output_dir: {folder} holds checkpoints of an earlier run; `training.resume_from_checkpoint=auto` resumes from "
            "them, --overwrite replaces them"
        )
    with about("output_dir"):
        checkpoints.find_resume(folder, recipe.training.resume_from_checkpoint, recipe.model_dump())


def _check_nothing_needed(recipe: Recipe, folder: Path) -> None:
    """Refuse to replace a run by one that reads its files."""
    if recipe.training.resume_from_checkpoint not in ("auto", "never"):
        given = recipe.training.resume_from_checkpoint
        raise UserError(f"training.resume_from_checkpoint: {given} would be deleted by --overwrite; give only one of the two")
    needed = [("model.name_or_path", recipe.model.name_or_path), ("model.tokenizer", recipe.model.tokenizer)]
    needed += [*recipe.strategy.adapters.items(), *(("data.train", each.path) for each in recipe.data.train)]
    needed += [("data.eval", each.path) for each in recipe.data.eval or []]
    for key, source in needed:
        if source and Path(source).expanduser().resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{key}: {source} is in output_dir = {folder}, which --overwrite replaces; name another folder")


def check_disk(recipe: Recipe, checkpoint_bytes: int) -> None:
    """Refuse an output folder on a disk without room for one checkpoint. Raises UserError."""
    folder = Path(recipe.output_dir).expanduser().absolute()
    need, parent = checkpoint_bytes + SPARE_BYTES, next(p for p in [folder, *folder.parents] if p.exists())
    if (free := shutil.disk_usage(parent).free) < need:
        raise UserError(
            f"output_dir: {folder}: one checkpoint needs {format.file_size(need)}, and only {format.file_size(free)} are free; "
            "free some space or name a folder on another disk"
        )
