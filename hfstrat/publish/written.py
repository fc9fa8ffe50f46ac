"""New folders and files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfstrat.errors import UserError


def check_unused(output: Path) -> None:
    """Raises UserError for a file or folder that has content."""
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} is in use; name a new one")


@contextmanager
def complete(output: Path) -> Iterator[Path]:
    """A path to write to in place of `output`, next to it; it is renamed at the end, and removed if anything goes wrong."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        yield place / output.name
        os.replace(place / output.name, output)
    finally:
        shutil.rmtree(place, ignore_errors=True)
