"""`hfstrat skill`: what a coding assistant has to know, from the files in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

FOLDER = Path(__file__).parents[1] / "assistants"


def add_to(app: typer.Typer) -> None:
    app.command()(skill)


def skill(
    llms: Annotated[bool, Option("--llms", help="Print llms.txt, an index of the documentation, instead")] = False,
) -> None:
    """Print instructions for coding assistants (SKILL.md)."""
    print((FOLDER / ("llms.txt" if llms else "SKILL.md")).read_text(encoding="utf-8"), end="")
