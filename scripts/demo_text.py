"""Build a text data set from the Python standard library: its language reference (`pydoc_data.topics`) and its docstrings.

Each topic and each docstring becomes a row ``{"text": ...}`` of train.jsonl or eval.jsonl; topics.txt has all topics
as one text. Nothing is downloaded. The split depends on a hash of the
text, so that equal texts are on one side.

    python scripts/demo_text.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from stdlib_source import library, modules, output_folder, write

MIN_LENGTH = 40  # characters
EVAL_SHARE = 0.05


def topics() -> Iterator[str]:
    from pydoc_data.topics import topics as found

    yield from (found[name] for name in sorted(found))


def docstrings(root: Path) -> Iterator[str]:
    for _, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def build(root: Path) -> tuple[list[str], list[str]]:
    """Training and evaluation texts: each text once, ordered by its hash."""
    found = {" ".join(text.casefold().split()): text.strip() for text in (*topics(), *docstrings(root))}
    hashes = {hashlib.sha256(key.encode()).digest(): text for key, text in found.items() if len(text) >= MIN_LENGTH}
    ordered = [hashes[key] for key in sorted(hashes)]
    cut = round(EVAL_SHARE * len(ordered))
    return ordered[cut:], ordered[:cut]


def main() -> None:
    folder = output_folder("demo_text.py")
    training, evaluation = build(library())
    for name, texts in (("train", training), ("eval", evaluation)):
        write(folder, name, ({"text": text} for text in texts))
    (folder / "topics.txt").write_text("\n\n".join(text.strip() for text in topics()) + "\n", encoding="utf-8")
    size = sum(len(text.encode()) for text in training)
    print(
        f"{folder}: {len(training)} training rows ({size:,} bytes), {len(evaluation)} evaluation rows from the standard library"
    )


if __name__ == "__main__":
    main()
