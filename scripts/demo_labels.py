"""Build a labeled data set from the Python standard library: the first sentence of a docstring in, its package out.

Rows are ``{"text": <sentence>, "label": <top-level module or package>}`` for the packages with the most documented
functions. Nothing is downloaded. Each sentence occurs once, and the split is a function of the sentence.

    python scripts/demo_labels.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from demo_data import first_sentence
from stdlib_source import modules, write_dataset

CLASSES = 12
EVAL_FRACTION = 8  # one of this many rows


def sentences(root: Path) -> Iterator[tuple[str, str]]:
    for parts, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                sentence = first_sentence(ast.get_docstring(node) or "")
                if sentence:
                    yield sentence, parts[0].removesuffix(".py")


def build(root: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    rows = dict(sentences(root))
    kept = {label for label, _ in Counter(rows.values()).most_common(CLASSES)}
    training: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    for text, label in rows.items():
        if label in kept:
            held_out = hashlib.sha256(text.encode()).digest()[0] % EVAL_FRACTION == 0
            (evaluation if held_out else training).append({"text": text, "label": label})
    return training, evaluation


if __name__ == "__main__":
    write_dataset("demo_labels.py", build)
