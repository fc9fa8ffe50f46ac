"""The different rows of a data set: rows with a weight stand in it more than once.

Which rows train and which evaluate: held-out rows, weights, and rows that stand somewhere twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from hfstrat.data.tokenize import Selection


class Distinct(NamedTuple):
    """The place of each different row's first appearance, and which of them each row is, `[len(rows)]`."""

    first: np.ndarray
    which: np.ndarray


def distinct(rows: Any) -> Distinct:
    """Of a Dataset, whose repeated rows are repeated indices; in anything else every row is its own."""
    indices = getattr(rows, "_indices", None)
    numbers = np.arange(len(rows)) if indices is None else indices.column(0).to_numpy()
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    return Distinct(first, which)


MAX_HELD_OUT = 1000


EXAMPLES = 3


BLOCK = 1 << 16  # numbers that are looked up at a time


BEFORE, AFTER = 24, 12  # tokens of an example, around where its answer begins


def column(rows: Dataset, name: str) -> np.ndarray:
    """A column of numbers, `[rows]`.

    Straight from the mapped file: `rows[name]` of selected rows would cost some 700 bytes of memory for each of them.
    """
    chunks = [chunk.to_numpy() for chunk in rows.data.column(name).chunks]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values if rows._indices is None else values[rows._indices.column(0).to_numpy()]


def hold_out(rows: Selection, size: float, limit: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to evaluate on, `[n]` each; equal rows, and pieces of one row, stay on one side.

    Raises:
        UserError: too few different rows.
    """
    return divide(rows, choose_held_out(rows.of(rows.text_hash), size, limit, seed))


def divide(rows: Selection, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows that are not among these texts (their hashes, in order), and of those that are."""
    held = is_in(rows.of(rows.text_hash), held_out)
    return np.flatnonzero(~held), np.flatnonzero(held)


def choose_held_out(hashes: np.ndarray, size: float, limit: int | None, seed: int) -> np.ndarray:
    """Hashes of the texts to hold out, in order, drawn by seed, for rows with these hashes, `[n]`. Raises as `hold_out`."""
    wanted = max(1, min(MAX_HELD_OUT, limit or MAX_HELD_OUT, round(size if size >= 1 else size * len(hashes))))
    ordered = np.sort(hashes)
    begins = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    different = int(np.count_nonzero(begins))
    order = np.random.default_rng((seed, 0)).permutation(different)[: wanted + 1].copy()  # each has one row at least
    drawn = ordered[np.flatnonzero(begins)[order]]
    counts = np.searchsorted(ordered, drawn, "right") - np.searchsorted(ordered, drawn)
    taken = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
    if taken >= different:
        raise UserError(
            f"data: {len(hashes)} rows ({different} different) are too few to hold out {wanted} for evaluation; "
            "name data.eval, lower data.eval_size or bring more rows"
        )
    return np.sort(drawn[:taken])


def is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which of the values are among the ordered ones, `[n]`. `np.isin` would sort all of them together."""
    found = np.empty(len(values), bool)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        places = np.searchsorted(ordered, block)
        found[start : start + BLOCK] = ordered[np.minimum(places, len(ordered) - 1)] == block
    return found


def weigh(origin: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Positions of the rows of one epoch: each row of source `i` `weights[i]` times, a fraction of them drawn by seed.

    Args:
        origin: the number of each row's source, `[n]`.
    """
    chosen = []
    for number, weight in enumerate(weights):
        rows = np.flatnonzero(origin == number)
        whole = int(weight)
        part = np.random.default_rng((seed, 1, number)).permutation(rows)[: round((weight - whole) * len(rows))]
        chosen.append(np.concatenate([np.tile(rows, whole), part]))
    return np.sort(np.concatenate(chosen))


def overlap(train: Selection, held: Selection, tokenizer: Any) -> dict[str, Any]:
    """Rows that stand in train more than once, and rows of the evaluation that stand in train too.

    Rows are the same if their whole text is, without regard to case and white space.
    """
    ordered = _hashes(train)
    ordered.sort()
    again = ordered[1:] == ordered[:-1]
    second = again.copy()  # and not the third or fourth
    second[1:] &= ~again[:-1]
    twice = ordered[1:][np.flatnonzero(second)[:EXAMPLES]]
    shared = is_in(_hashes(held), ordered)
    del ordered, second
    return {
        "train_duplicates": int(np.count_nonzero(again)),
        "train_duplicate_examples": _texts(train, [np.argmax(_hashes(train) == one) for one in twice], tokenizer),
        "eval_rows_in_train": int(np.count_nonzero(shared)),
        "eval_rows_in_train_examples": _texts(held, np.flatnonzero(shared)[:EXAMPLES], tokenizer),
    }


def _begins(part: Selection) -> np.ndarray:
    """Which pieces are the first of their row."""
    numbers = part.of(part.row)
    begins = np.ones(len(numbers), bool)
    np.not_equal(numbers[1:], numbers[:-1], out=begins[1:])
    return begins


def _hashes(part: Selection) -> np.ndarray:
    """The hash of each row, `[rows]`, a copy."""
    begins, hashes = _begins(part), part.of(part.text_hash)
    if not begins.all():
        return hashes[begins]
    return hashes.copy() if part.places is None else hashes


def _texts(part: Selection, which: Iterable[Any], tokenizer: Any) -> list[str]:
    """The end of the prompt and the beginning of the answer: a row's very beginning may be the same system message in all.

    Args:
        which: numbers of rows, not of pieces.
    """
    shown = []
    for number in which:
        place = np.flatnonzero(_begins(part))[number]
        row = part.table[int(place if part.places is None else part.places[place])]
        first = next(index for index, label in enumerate(row["labels"]) if label != IGNORED)
        ids = row["input_ids"][max(0, first - BEFORE) : first + AFTER]
        shown.append(" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()))
    return shown


def overlap_lines(found: dict[str, Any]) -> list[str]:
    """In words, nothing where there is nothing."""
    lines = []
    for count, examples, words in (
        ("train_duplicates", "train_duplicate_examples", "training rows stand there already"),
        ("eval_rows_in_train", "eval_rows_in_train_examples", "evaluation rows stand in train too"),
        ("conflicting_texts", "conflicting_text_examples", "texts stand in train with different labels"),
    ):
        if found.get(count):
            lines.append(f"{found[count]:,} {words}, such as " + "; ".join(f'"{text}"' for text in found[examples]))
    return lines
