"""Shared by the demo data sets: the modules of the standard library as syntax trees, and writing rows."""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SKIP = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "turtledemo"}


def library() -> Path:
    """The folder of the standard library that runs this script."""
    return Path(sysconfig.get_paths()["stdlib"])


def modules(root: Path) -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    """The path components below `root` and the syntax tree of each readable module, tests excluded."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIP & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield parts, tree


def output_folder(script: str) -> Path:
    """The single argument as a folder, which is created if necessary."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python scripts/{script} OUTPUT_DIR")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_dataset(script: str, build: Callable[[Path], tuple[list[Any], list[Any]]]) -> None:
    """Write the training and evaluation rows that `build` makes from the standard library into the folder given to a script."""
    folder = output_folder(script)
    training, evaluation = build(library())
    write(folder, "train", training)
    write(folder, "eval", evaluation)
    print(f"{folder}: {len(training)} training rows, {len(evaluation)} evaluation rows from the standard library")
