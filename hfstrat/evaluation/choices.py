"""Multiple-choice rows of local files: questions with choices, contexts with one continuation, or texts that go on.

Multiple choice by likelihood: the choice that the model holds most likely after the question.

`acc` takes the sum of the log-likelihoods of a choice's tokens, `acc_norm` divides it by the choice's characters and
`acc_bytes` by its bytes, all as lm-evaluation-harness has them (Gao et al. 2024, 10.5281/zenodo.12608602), with its tokens.
Rows are read a window at a time and leave three marks behind: memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hfstrat.errors import UserError
from hfstrat.evaluation.forward import Progress, Runner, Subject
from hfstrat.evaluation.intervals import Found, means
from hfstrat.evaluation.likelihood import Ids, Likelihood
from hfstrat.tasks.metrics import ratios

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


WINDOW = 2048  # rows that are sorted by length together


NAMES = ("acc", "acc_norm", "acc_bytes")


def measure(subject: Subject, file: str, runner: Runner, max_rows: int | None = None, shared: bool | None = None) -> Found:
    """Answer the questions of a file.

    Args:
        shared: see `Likelihood`.

    Raises:
        UserError: rows of no known shape, or of both kinds.
    """
    path = Path(file).expanduser()
    likelihood, encoder = Likelihood(subject, runner, shared), Encoder(subject)
    total = sum(1 for _ in itertools.islice(read(path), max_rows))
    rows, marks, digest = itertools.islice(read(path), max_rows), list[np.ndarray](), hashlib.sha256()
    kinds: set[bool] = set()
    with Progress(runner.screen, path.name, total) as progress:
        while window := list(itertools.islice(rows, WINDOW)):
            kinds |= {bool(each.texts) for each in window}
            if len(kinds) > 1:
                raise UserError(f"{file}: some rows have choices and others have none; put them into two files")
            pairs = encoder.encode([pair for each in window for pair in each.pairs])
            sums = likelihood.score(pairs, path.name, progress, len(window))
            marks.append(marks_of(window, sums))
            digest.update(repr([each.gold for each in window]).encode())
    if not marks:
        raise UserError(f"{file}: there is no row; expected {SHAPES}")
    return found_of(np.concatenate(marks), kinds == {True}, digest.hexdigest())


def marks_of(window: Sequence[Question], sums: np.ndarray) -> np.ndarray:
    """What is kept of each question: right by each of `NAMES` (`[rows, 3]`), or without choices the sums themselves."""
    if not window[0].texts:
        return np.stack([sums[:, 0], sums[:, 1], sums[:, 2] == sums[:, 1]], axis=1)
    marks, start = np.zeros((len(window), len(NAMES)), dtype=np.int8), 0
    for index, one in enumerate(window):
        stop = start + len(one.pairs)
        likely = -sums[start:stop, 0]
        by = (np.ones(len(one.texts)), [len(text) for text in one.texts], [len(text.encode()) for text in one.texts])
        marks[index] = [int(np.argmax(likely / np.asarray(size)) == one.gold) for size in by]
        start = stop
    return marks


def found_of(marks: np.ndarray, has_choices: bool, order: str) -> Found:
    """The metrics of the marks of all rows."""
    if has_choices:
        return Found(len(marks), means(dict(zip(NAMES, marks.T, strict=True))), NAMES, order=order)
    columns = {"nll": marks[:, 0], "tokens": marks[:, 1], "right": marks[:, 2], "rows": np.ones(len(marks))}
    metrics = {
        "acc": lambda s: s["right"] / s["rows"],  # every token of it is the most likely one
        "loss": lambda s: s["nll"] / s["tokens"],
        "perplexity": lambda s: math.exp(min(s["nll"] / s["rows"], 700)),  # of a whole continuation, as LAMBADA has it
    }
    return Found(len(marks), ratios(columns, metrics), ("acc",), {"tokens": float(marks[:, 1].sum())}, order=order)


class Encoder:
    """Contexts and continuations as tokens: the whole is cut into tokens, and the context's share taken off (as lm-eval)."""

    def __init__(self, subject: Subject) -> None:
        self.tokenizer, self.limit = subject.tokenizer, subject.context
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix = bos if bos is not None else eos

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Token ids of each; contexts too long for the model lose their beginning."""
        moved = [_moved(*pair) for pair in pairs]
        texts = list(dict.fromkeys([c for c, _ in moved if c] + [c + rest for c, rest in moved if c]))
        known = dict(zip(texts, self._ids(texts), strict=True))
        found = []
        for context, rest in moved:
            if context:
                front = known[context]
                back = known[context + rest][len(front) :]
            else:
                (back,) = self._ids([rest], add_special_tokens=False)
                front, back = ([self.prefix], back) if back[:1] != [self.prefix] else (back[:1], back[1:])
            found.append(self._cut(front, back))
        return found

    def _ids(self, texts: list[str], **options: bool) -> list[Ids]:
        return list(self.tokenizer(texts, verbose=False, **options)["input_ids"]) if texts else []

    def _cut(self, front: Ids, back: Ids) -> tuple[Ids, Ids]:
        if not back:
            raise UserError("evaluation.choices: a choice has no token of its own behind its question; remove empty choices")
        over = len(front) + len(back) - 1 - (self.limit or 1 << 30)
        if over >= len(front):
            raise UserError(f"evaluation.choices: a choice has {len(back)} tokens, and this model's context is {self.limit}")
        return front[max(0, over) :], back


def _moved(context: str, rest: str) -> tuple[str, str]:
    """White space at the end of the context belongs to what follows."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + rest
