"""The run's folder: claimed by one run at a time, written to only once a run can start."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import IO

import yaml

from hfstrat import preflight
from hfstrat.config import Recipe
from hfstrat.errors import UserError

RESULT = "final"


def claim(recipe: Recipe, overwrite: bool) -> IO[str]:
    """Make the folder, lock it against a second run and leave the recipe in it. The lock ends with the process.

    Raises:
        UserError: the folder is in use.
    """
    preflight.check_output(recipe, overwrite)
    folder = Path(recipe.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"output_dir: {folder} is in use by a run that is going on; name another folder") from None
    if overwrite:
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return lock


def publish(partial: Path) -> Path:
    """Give a verified result its name, in place of an earlier one."""
    final = partial.with_name(RESULT)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    return final
