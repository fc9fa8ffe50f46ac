"""Multiple choice by likelihood, on local files: questions with choices, or contexts with one continuation.

The model's answer is the choice with the highest likelihood after the question. `acc` compares the summed log-likelihoods of
the choices' tokens, `acc_norm` divides them by the characters of a choice and `acc_bytes` by its bytes, all as in
lm-evaluation-harness (Gao et al. 2024, 10.5281/zenodo.12608602) and tokenized as there. Files are read in windows, and three
numbers per example are stored: memory does not grow with the file.
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
from hfstrat.evaluation.intervals import Measurement, means
from hfstrat.evaluation.likelihood import Ids, Likelihood
from hfstrat.tasks.base import ratios

QUESTIONS, GOLD = ("query", "question", "prompt", "context", "ctx"), ("gold", "label", "answer", "answerKey", "target")


FORMATS = "{query, choices, gold}, {context_options, continuation, gold} or {context, continuation}"


class Question(NamedTuple):
    """One example.

    Args:
        pairs: context and continuation of each choice; the continuation starts with its own white space.
        texts: the choices, for normalization by their length; empty if there is nothing to choose from.
        gold: the index of the correct choice.
    """

    pairs: list[tuple[str, str]]
    texts: list[str]
    gold: int


def read(file: Path) -> Iterator[Question]:
    """The examples of a file. Raises UserError: a row in an unknown format, or without its correct answer."""
    from hfstrat.data import readers
    from hfstrat.data.values import valid

    for number, row in enumerate(readers.read(file), 1):
        try:
            yield parse_question(valid(row))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{file}: row {number}: {error}; expected {FORMATS}") from None


def parse_question(row: Mapping[str, Any]) -> Question:
    """One row as an example; ValueError if its format is unknown.

    Each choice is preceded by a space, as in lm-evaluation-harness; a single continuation only if it has none.
    """
    if "context_options" in row:
        contexts, rest = [str(each) for each in row["context_options"]], str(row["continuation"])
        return Question([(each, f" {rest}") for each in contexts], contexts, gold_index(row, contexts))
    if "choices" in row:
        name = next((name for name in QUESTIONS if isinstance(row.get(name), str)), None)
        if name is None:
            raise ValueError(f"it has no question, only {', '.join(row)}")
        given = row["choices"]
        texts = [str(each) for each in (given["text"] if isinstance(given, Mapping) else given)]
        if len(texts) < 2 or not all(texts):
            raise ValueError("it needs at least two choices, none of them empty")
        return Question([(row[name], f" {text}") for text in texts], texts, gold_index(row, texts))
    if "context" in row and "continuation" in row:
        return Question([(str(row["context"]), with_space(str(row["context"]), str(row["continuation"])))], [], 0)
    raise ValueError(f"it has {', '.join(row)}")


def with_space(context: str, continuation: str) -> str:
    """The continuation with a space before it, unless one of the two has one or the context is empty."""
    joined = not context or context[-1].isspace() or continuation[:1].isspace()
    return continuation if joined else f" {continuation}"


def gold_index(row: Mapping[str, Any], texts: list[str]) -> int:
    """The index of the correct choice, given as an index from 0, a letter, a label or the text of the choice."""
    name = next((name for name in GOLD if name in row), None)
    if name is None:
        raise ValueError(f"it has no correct answer (gold), only {', '.join(row)}")
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
        raise ValueError(f"{name} = {given!r} is none of the {len(texts)} choices, whose indices start at 0")
    return given


WINDOW = 2048  # examples that are sorted by length together
NAMES = ("acc", "acc_norm", "acc_bytes")


def measure(
    subject: Subject, file: str, runner: Runner, max_rows: int | None = None, shared: bool | None = None
) -> Measurement:
    """Answer the questions of a file and compare the answers with the correct ones.

    Args:
        shared: see `Likelihood`.

    Raises:
        UserError: rows in an unknown format, or of both kinds.
    """
    path = Path(file).expanduser()
    likelihood, encoder = Likelihood(subject, runner, shared), Encoder(subject)
    total = sum(1 for _ in itertools.islice(read(path), max_rows))
    rows, scores, digest = itertools.islice(read(path), max_rows), list[np.ndarray](), hashlib.sha256()
    kinds: set[bool] = set()
    with Progress(runner.screen, path.name, total) as progress:
        while window := list(itertools.islice(rows, WINDOW)):
            kinds |= {bool(each.texts) for each in window}
            if len(kinds) > 1:
                raise UserError(f"{file}: some rows have choices and others have none; split the file into two")
            pairs = encoder.encode([pair for each in window for pair in each.pairs])
            sums = likelihood.score(pairs, path.name, progress, len(window))
            scores.append(score_questions(window, sums))
            digest.update(repr([each.gold for each in window]).encode())
    if not scores:
        raise UserError(f"{file}: the file has no rows; expected {FORMATS}")
    return measurement_of(np.concatenate(scores), kinds == {True}, digest.hexdigest())


def score_questions(window: Sequence[Question], sums: np.ndarray) -> np.ndarray:
    """Three numbers per example (`[rows, 3]`): whether the answer is correct by each of `NAMES`, or the sums if no choices."""
    if not window[0].texts:
        return np.stack([sums[:, 0], sums[:, 1], sums[:, 2] == sums[:, 1]], axis=1)
    scores, start = np.zeros((len(window), len(NAMES)), dtype=np.int8), 0
    for index, one in enumerate(window):
        stop = start + len(one.pairs)
        likelihoods = -sums[start:stop, 0]
        lengths = (np.ones(len(one.texts)), [len(text) for text in one.texts], [len(text.encode()) for text in one.texts])
        scores[index] = [int(np.argmax(likelihoods / np.asarray(size)) == one.gold) for size in lengths]
        start = stop
    return scores


def measurement_of(scores: np.ndarray, has_choices: bool, order: str) -> Measurement:
    """The metrics from the scores of all examples."""
    if has_choices:
        return Measurement(len(scores), means(dict(zip(NAMES, scores.T, strict=True))), NAMES, order=order)
    columns = {"nll": scores[:, 0], "tokens": scores[:, 1], "right": scores[:, 2], "rows": np.ones(len(scores))}
    metrics = {
        "acc": lambda s: s["right"] / s["rows"],  # all of its tokens are the top-1 prediction
        "loss": lambda s: s["nll"] / s["tokens"],
        "perplexity": lambda s: math.exp(min(s["nll"] / s["rows"], 700)),  # per continuation, as in LAMBADA
    }
    return Measurement(len(scores), ratios(columns, metrics), ("acc",), {"tokens": float(scores[:, 1].sum())}, order=order)


class Encoder:
    """Tokenizes contexts and continuations together and removes the tokens of the context, as lm-evaluation-harness does."""

    def __init__(self, subject: Subject) -> None:
        self.tokenizer, self.limit = subject.tokenizer, subject.context
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix = bos if bos is not None else eos

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Token ids of each pair; a context that is too long for the model loses its beginning."""
        moved = [_move_space(*pair) for pair in pairs]
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
            raise UserError("evaluation.choices: a choice adds no token to its question; remove empty choices")
        over = len(front) + len(back) - 1 - (self.limit or 1 << 30)
        if over >= len(front):
            raise UserError(f"evaluation.choices: a choice has {len(back)} tokens, more than the model's context, {self.limit}")
        return front[max(0, over) :], back


def _move_space(context: str, rest: str) -> tuple[str, str]:
    """The pair with the white space at the end of the context moved to the continuation."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + rest
