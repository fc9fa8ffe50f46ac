"""`hfstrat migrate`: a config of TRL, axolotl or LLaMA-Factory as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.recipe.migration.convert import Migration
    from hfstrat.recipe.migration.rules import Kind

HEADINGS: dict[Kind, str] = {
    "missing": "no counterpart in a recipe",
    "attention": "to look at",
    "default": "left out, since nothing changes",
}


def add_to(app: typer.Typer) -> None:
    app.command()(migrate)


def migrate(
    file: Annotated[str, Argument(metavar="FILE", help="A config of TRL, axolotl or LLaMA-Factory (YAML or JSON)")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe, such as data.train=rows.jsonl")
    ] = None,
    tool: Annotated[
        str | None,
        Option(
            "--from",
            metavar="TOOL",
            help="trl, axolotl or llama-factory; or one of TRL's trainers, such as trl-dpo; default: by the keys",
        ),
    ] = None,
    num_processes: Annotated[
        int, Option(min=1, metavar="N", help="Number of processes (GPUs) it ran on; the global batch is that of all")
    ] = 1,
    output: Annotated[Path | None, Option("--output", "-o", help="Write the recipe to this file; default: print it")] = None,
) -> None:
    """Convert a config of TRL, axolotl or LLaMA-Factory into a recipe; name the keys without a counterpart."""
    run(file, tool, num_processes, overrides or [], output)


def run(source: str, name: str | None, processes: int, overrides: list[str], output: Path | None) -> None:
    """Write or print the recipe, and print the notes on stderr.

    Raises:
        UserError: the config cannot be converted, or the output file exists.
    """
    if output is not None and output.exists():
        raise UserError(f"--output: {output} exists already; name another file")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: {output.parent}: no such folder; create it, or name another")
    from hfstrat.recipe.migration import convert

    done = convert.migrate(source, name, processes, tuple(overrides))
    if output is None:
        print(done.text, end="", flush=True)
    else:
        output.write_text(done.text, encoding="utf-8")
    print("\n".join(notes(done, source, output)), file=sys.stderr)


def notes(done: Migration, source: str, output: Path | None) -> list[str]:
    """What was converted, and each note under its heading."""
    where = f"{output}" if output is not None else "the recipe"
    counts = {kind: [note for note in done.notes if note.kind == kind] for kind in HEADINGS}
    lines = [f"{source}: read as a config of {done.tool}"]
    for kind, found in counts.items():
        if found:
            lines += ["", f"{HEADINGS[kind]}:"]
            width = min(max(len(note.key) for note in found), 32)
            lines += [f"  {note.key:<{width}}  {note.text}" for note in found]
    check = f"hfstrat check {output}" if output is not None else "hfstrat check RECIPE"
    lines += ["", f"{where} is valid; `{check}` shows what it means with your model and data"]
    return lines
