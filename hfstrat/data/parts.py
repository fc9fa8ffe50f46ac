"""Which rows train and which evaluate: held-out rows, weights, and rows that stand somewhere twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_HELD_OUT = 1000
EXAMPLES = 3
BEFORE, AFTER = 24, 12  # tokens of an example, around where its answer begins


def column(rows: Dataset, name: str) -> np.ndarray:
    """A column of numbers, `[rows]`.

    Straight from the mapped file: `rows[name]` of selected rows would cost some 700 bytes of memory for each of them.
    """
    values = rows.data.column(name).to_numpy()
    return values if rows._indices is None else values[rows._indices.column(0).to_numpy()]


def hold_out(rows: Dataset, size: float, limit: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to evaluate on, `[n]` each; equal rows, and pieces of one row, stay on one side.

    Raises:
        UserError: too few different rows.
    """
    wanted = max(1, min(MAX_HELD_OUT, limit or MAX_HELD_OUT, round(size if size >= 1 else size * len(rows))))
    _, group, counts = np.unique(column(rows, "text_hash"), return_inverse=True, return_counts=True)
    order = np.random.default_rng((seed, 0)).permutation(len(counts))
    taken = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
    if taken >= len(order):
        raise UserError(
            f"data: {len(rows)} rows ({len(counts)} different) are too few to hold out {wanted} for evaluation; "
            "name data.eval, lower data.eval_size or bring more rows"
        )
    held = np.isin(group, order[:taken])
    return np.flatnonzero(~held), np.flatnonzero(held)


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


def overlap(train: Dataset, held: Dataset, tokenizer: Any) -> dict[str, Any]:
    """Rows that stand in train more than once, and rows of the evaluation that stand in train too.

    Rows are the same if their whole text is, without regard to case and white space.
    """
    hashes, places = _by_row(train)
    found, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    others, other_places = _by_row(held)
    shared = np.isin(others, found)
    return {
        "train_duplicates": int((counts - 1).sum()),
        "train_duplicate_examples": _texts(train, places[first[counts > 1]], tokenizer),
        "eval_rows_in_train": int(shared.sum()),
        "eval_rows_in_train_examples": _texts(held, other_places[shared], tokenizer),
    }


def _by_row(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The hash of each row and the position of its first piece."""
    _, first = np.unique(column(rows, "row"), return_index=True)
    return column(rows, "text_hash")[first], first


def _texts(rows: Dataset, places: np.ndarray, tokenizer: Any) -> list[str]:
    """The end of the prompt and the beginning of the answer: a row's very beginning may be the same system message in all."""
    shown = []
    for place in places[:EXAMPLES]:
        row = rows[int(place)]
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
