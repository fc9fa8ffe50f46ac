"""Build a labelled data set from the Python standard library: the first sentence of a docstring in, its package out.

Rows are ``{"text": <sentence>, "label": <top-level module or package>}`` for the packages with the most documented
functions. Nothing is downloaded. Equal sentences stand there once, and the split is a function of the sentence.

    python scripts/demo_labels.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from demo_data import SKIP, first_sentence

CLASSES = 12
EVAL_SHARE = 8  # one in so many rows


def sentences(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIP & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                sentence = first_sentence(ast.get_docstring(node) or "")
                if sentence:
                    yield sentence, parts[0].removesuffix(".py")


def build(library: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    rows = dict(sentences(library))
    kept = {label for label, _ in Counter(rows.values()).most_common(CLASSES)}
    training: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    for text, label in rows.items():
        if label in kept:
            held_out = hashlib.sha256(text.encode()).digest()[0] % EVAL_SHARE == 0
            (evaluation if held_out else training).append({"text": text, "label": label})
    return training, evaluation


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/demo_labels.py OUTPUT_DIR")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    training, evaluation = build(Path(sysconfig.get_paths()["stdlib"]))
    for name, rows in (("train", training), ("eval", evaluation)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{folder}: {len(training)} training rows, {len(evaluation)} evaluation rows from the standard library")


if __name__ == "__main__":
    main()
