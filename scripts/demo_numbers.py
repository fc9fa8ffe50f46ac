"""Build a regression data set from the Python standard library: a function's code in, how many paths lead through it out.

Rows are ``{"text": <signature and body>, "score": <cyclomatic complexity>}`` (McCabe 1976: branches, loops, handlers and
conditions, plus one) for the short functions of the standard library. Nothing is downloaded. Each body occurs once, and the
split is a function of the body.

    python scripts/demo_numbers.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_data import MAX_CODE_CHARS
from stdlib_source import modules, write_dataset

EVAL_FRACTION = 16  # one of this many rows
EACH = 400  # rows of the same complexity, at most: most functions have a single path
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.Assert)


def complexity(function: ast.AST) -> int:
    nodes = list(ast.walk(function))
    conditions = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + sum(isinstance(node, BRANCHES) for node in nodes) + conditions


def functions(root: Path) -> Iterator[tuple[str, int]]:
    for _, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(code := ast.unparse(node)) <= MAX_CODE_CHARS:
                yield code, complexity(node)


def build(root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = {code.split("(", 1)[1]: (code, score) for code, score in functions(root)}
    training: list[dict[str, Any]] = []
    evaluation: list[dict[str, Any]] = []
    counts: dict[int, int] = {}
    for body, (code, score) in sorted(rows.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        counts[score] = counts.get(score, 0) + 1
        if counts[score] <= EACH:
            held_out = hashlib.sha256(body.encode()).digest()[-1] % EVAL_FRACTION == 0
            (evaluation if held_out else training).append({"text": code, "score": score})
    return training, evaluation


if __name__ == "__main__":
    write_dataset("demo_numbers.py", build)
