"""Build a text data set from the Python standard library: its language reference (`pydoc_data.topics`) and its docstrings.

Each topic and each docstring becomes a row ``{"text": ...}``. Nothing is downloaded. The split goes by a hash of the text, so
equal texts are on one side.

    python scripts/demo_text.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 40  # characters
EVAL_SHARE = 0.05
SKIP = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "turtledemo"}


def topics() -> Iterator[str]:
    from pydoc_data.topics import topics as found

    yield from (found[name] for name in sorted(found))


def docstrings(library: Path) -> Iterator[str]:
    for path in sorted(library.rglob("*.py")):
        if SKIP & set(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def build(library: Path) -> tuple[list[str], list[str]]:
    """Training and evaluation texts: each text once, ordered by its hash."""
    found = {" ".join(text.casefold().split()): text.strip() for text in (*topics(), *docstrings(library))}
    hashes = {hashlib.sha256(key.encode()).digest(): text for key, text in found.items() if len(text) >= SHORTEST}
    ordered = [hashes[key] for key in sorted(hashes)]
    cut = round(EVAL_SHARE * len(ordered))
    return ordered[cut:], ordered[:cut]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/demo_text.py OUTPUT_DIR")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    training, evaluation = build(Path(sysconfig.get_paths()["stdlib"]))
    for name, texts in (("train", training), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    size = sum(len(text.encode()) for text in training)
    print(
        f"{folder}: {len(training)} training rows ({size:,} bytes), {len(evaluation)} evaluation rows from the standard library"
    )


if __name__ == "__main__":
    main()
