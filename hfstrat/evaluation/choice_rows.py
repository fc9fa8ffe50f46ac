"""Multiple-choice rows of local files: questions with choices, contexts with one continuation, or texts that go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.errors import UserError

QUESTIONS, GOLD = ("query", "question", "prompt", "context", "ctx"), ("gold", "label", "answer", "answerKey", "target")
SHAPES = "{query, choices, gold}, {context_options, continuation, gold} or {context, continuation}"


class Question(NamedTuple):
    """A row.

    Args:
        pairs: context and continuation of each choice; the continuation brings its own white space.
        texts: the choices, whose length the likelihood is divided by; empty where there is nothing to choose.
        gold: the right one.
    """

    pairs: list[tuple[str, str]]
    texts: list[str]
    gold: int


def read(file: Path) -> Iterator[Question]:
    """The rows of a file.

    Raises:
        UserError: a row of no known shape, or without its right answer.
    """
    from hfstrat.data import readers

    for number, row in enumerate(readers.read(file), 1):
        try:
            yield question(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{file}: row {number}: {error}; expected {SHAPES}") from None


def question(row: Mapping[str, Any]) -> Question:
    """One row; ValueError where it fits no shape.

    Before each choice stands a space, as in lm-evaluation-harness; before a single continuation where it has none.
    """
    if "context_options" in row:
        contexts, rest = [str(each) for each in row["context_options"]], str(row["continuation"])
        return Question([(each, f" {rest}") for each in contexts], contexts, gold_of(row, contexts))
    if "choices" in row:
        name = next((name for name in QUESTIONS if isinstance(row.get(name), str)), None)
        if name is None:
            raise ValueError(f"no question; it has {', '.join(row)}")
        given = row["choices"]
        texts = [str(each) for each in (given["text"] if isinstance(given, Mapping) else given)]
        if len(texts) < 2 or not all(texts):
            raise ValueError("at least two choices, none of them empty, are needed")
        return Question([(row[name], f" {text}") for text in texts], texts, gold_of(row, texts))
    if "context" in row and "continuation" in row:
        return Question([(str(row["context"]), spaced(str(row["context"]), str(row["continuation"])))], [], 0)
    raise ValueError(f"it has {', '.join(row)}")


def spaced(context: str, continuation: str) -> str:
    """The continuation with the space before it."""
    joined = not context or context[-1].isspace() or continuation[:1].isspace()
    return continuation if joined else f" {continuation}"


def gold_of(row: Mapping[str, Any], texts: list[str]) -> int:
    """The right choice: its number from 0, its letter or label, or its text."""
    name = next((name for name in GOLD if name in row), None)
    if name is None:
        raise ValueError(f"no right answer (gold); it has {', '.join(row)}")
    given = row[name]
    labels = row["choices"].get("label") if isinstance(row.get("choices"), Mapping) else None
    if isinstance(given, str) and labels and given in labels:
        return list(labels).index(given)
    if isinstance(given, str) and given in texts:
        return texts.index(given)
    if isinstance(given, str) and len(given) == 1 and given.isalpha():
        given = ord(given.upper()) - ord("A")
    if isinstance(given, str) and given.strip().isdecimal():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(texts):
        raise ValueError(f"{name} = {given!r} is none of the {len(texts)} choices, which are counted from 0")
    return given
