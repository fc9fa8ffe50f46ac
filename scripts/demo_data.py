"""Build the quickstart data set from the Python standard library: code in, one-sentence description out.

Every documented function of the standard library that runs this script becomes a row
``{"prompt": <signature and body>, "completion": <first sentence of its docstring>}``.
Nothing is downloaded. The split is seeded and keeps a function, its copies and its namesakes
with the same sentence on one side.

    python scripts/demo_data.py OUTPUT_DIR
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from stdlib_source import modules, write_dataset

MAX_CODE_CHARS = 640  # short rows, so that the demo improves within three minutes on two cores
SENTENCE_CHARS = (20, 160)
EVAL_ROWS = 200
PROMPT = "Describe this Python function in one sentence.\n\n```python\n{code}\n```"


def first_sentence(docstring: str) -> str | None:
    """The first sentence of the first paragraph, on one line, or None if it does not read like one."""
    paragraph = re.sub(r"\s+", " ", docstring.strip().split("\n\n")[0]).strip()
    match = re.match(r"(.+?[.!?])(?=\s|$)", paragraph)
    sentence = match.group(1) if match else paragraph + "."
    low, high = SENTENCE_CHARS
    looks_like_prose = sentence[:1].isalpha() and sentence.isascii() and "->" not in sentence and "(" not in sentence[:12]
    return sentence if low <= len(sentence) <= high and looks_like_prose else None


def without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The function's code without its docstring and decorators, or None if nothing is left to describe."""
    body = function.body[1:]
    if not body:
        return None
    clone = ast.parse(ast.unparse(function)).body[0]
    assert isinstance(clone, ast.FunctionDef | ast.AsyncFunctionDef)
    clone.body, clone.decorator_list = clone.body[1:], []
    return ast.unparse(clone)


def pairs(root: Path) -> Iterator[tuple[str, str]]:
    for _, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                sentence, code = first_sentence(doc), without_docstring(node)
                if sentence and code and len(code) <= MAX_CODE_CHARS:
                    yield code, sentence


def group_key(code: str, sentence: str) -> bytes:
    """Rows with the same key stay on one side of the split: the same name with the same description."""
    name = code.split("(")[0].split()[-1]
    return hashlib.sha256(f"{name.strip('_').lower()}|{sentence.lower()}".encode()).digest()


def build(root: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    rows: dict[str, tuple[bytes, dict[str, str]]] = {}
    bodies: dict[str, bytes] = {}
    for code, sentence in pairs(root):
        key = group_key(code, sentence)
        # the same body under another name is the same function: it joins the first one's group
        body = re.sub(r"\s+", "", code.split("(", 1)[1])
        key = bodies.setdefault(body, key)
        rows.setdefault(code, (key, {"prompt": PROMPT.format(code=code), "completion": sentence}))
    ordered = sorted(rows.values(), key=lambda item: (hashlib.sha256(item[0]).digest(), item[1]["prompt"]))
    cut = ordered[EVAL_ROWS][0]  # whole groups only, so that no function is on both sides
    evaluation = [row for key, row in ordered[:EVAL_ROWS] if key != cut]
    training = [row for key, row in ordered[len(evaluation) :]]
    return training, evaluation


if __name__ == "__main__":
    write_dataset("demo_data.py", build)
