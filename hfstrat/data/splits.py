"""Which rows train and which evaluate: selections of a mapped table, held-out rows, source weights and duplicates.

A selection keeps a few numbers for each row in memory (16 bytes) and no tokens. Why not `Dataset.select`, `filter` and
`train_test_split`: they go through Python lists of indices, 40 bytes and more for each row.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data.formats import RowFormat, hash_text
from hfstrat.data.labeled import LabeledText
from hfstrat.data.render import IGNORED
from hfstrat.data.sources import DataSource
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from hfstrat.data.formats import Example
    from hfstrat.recipe.schema import Recipe

MAX_HELD_OUT = 1000
EXAMPLES = 3
BLOCK = 1 << 16  # values searched for at a time
TOKENS_BEFORE, TOKENS_AFTER = 24, 12  # tokens shown of a duplicate, around the start of its answer


def read_columns(file: Path, types: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """Numeric columns of an Arrow stream as NumPy arrays of the given types, `[count]` each.

    The file is mapped for this read alone and its pages are released on the way: otherwise the columns of short rows, which
    lie between their tokens, would pull all tokens into memory.
    """
    import pyarrow as pa

    columns = {name: np.empty(count, kind) for name, kind in types.items()}
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = 0
    for batch in pa.ipc.open_stream(pa.py_buffer(mapped)):
        for name, values in columns.items():
            values[start : start + len(batch)] = batch.column(name).to_numpy()
        start += len(batch)
        mapped.madvise(mmap.MADV_DONTNEED)
    return columns


@dataclass(frozen=True)
class Selection:
    """Some rows of a table, in some order.

    Args:
        table: the mapped rows of all sources, `[n]`.
        row: the index of each one's source row over all sources, `[n]`; it never decreases, since the parts of a row
            (`overflow: split`) follow one another.
        length: tokens, `[n]`.
        text_hash: equal for rows of the same text, `[n]`.
        positions: the selected rows in their order, `[rows]`; None for all.
    """

    table: Dataset
    row: np.ndarray
    length: np.ndarray
    text_hash: np.ndarray
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row if self.positions is None else self.positions)

    def take(self, column: np.ndarray) -> np.ndarray:
        """The values of a column of the table for these rows, `[rows]`."""
        return column if self.positions is None else column[self.positions]

    def select(self, positions: np.ndarray) -> Selection:
        """The rows at these positions of the selection."""
        return replace(self, positions=positions if self.positions is None else self.positions[positions])

    def first(self, count: int | None) -> Selection:
        """The first `count` rows; all of them for None."""
        return self if count is None or count >= len(self) else self.select(np.arange(count))

    def lengths(self) -> np.ndarray:
        """Tokens of each row, `[rows]`."""
        return self.take(self.length)

    def digest(self) -> str:
        """SHA-256 over which rows these are, their order and their lengths."""
        digest = hashlib.sha256()
        for column in (self.row, self.length):
            digest.update(np.ascontiguousarray(self.take(column)).data)
        return digest.hexdigest()

    def dataset(self) -> Dataset:
        """The rows as a data set without the column `text_hash`, as by `Dataset.select` without its Python list."""
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        rows = self.table.remove_columns("text_hash")
        if self.positions is None:
            return rows
        name = hashlib.sha256(self.positions.data).hexdigest()[:32]
        indices = InMemoryTable(pa.table({"indices": pa.array(self.positions.view(np.uint64))}))
        return Dataset(rows.data, info=rows.info, split=rows.split, indices_table=indices, fingerprint=name)


class Distinct(NamedTuple):
    """The position of each distinct row's first occurrence, and for each row the index of its distinct row, `[len(rows)]`."""

    first: np.ndarray
    which: np.ndarray


def distinct(rows: Any) -> Distinct:
    """The distinct rows of a Dataset, in which repeated rows are repeated indices; of anything else, every row."""
    indices = getattr(rows, "_indices", None)
    numbers = np.arange(len(rows)) if indices is None else indices.column(0).to_numpy()
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    return Distinct(first, which)


def column(rows: Dataset, name: str) -> np.ndarray:
    """A numeric column, `[rows]`, read from the mapped file: `rows[name]` of selected rows takes about 700 bytes per row."""
    chunks = [chunk.to_numpy() for chunk in rows.data.column(name).chunks]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values if rows._indices is None else values[rows._indices.column(0).to_numpy()]


def divide(rows: Selection, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows whose text hash is not in `held_out` (sorted), and of those whose hash is."""
    held = contains(held_out, rows.take(rows.text_hash))
    return np.flatnonzero(~held), np.flatnonzero(held)


def choose_held_out(
    hashes: np.ndarray, size: float, limit: int | None, seed: int, strata: list[str] | None = None
) -> np.ndarray:
    """Sorted hashes of the texts to hold out, drawn by seed. Equal rows, and the parts of one row, stay on one side.

    Args:
        hashes: text hashes of all rows, `[n]`.
        size: rows to hold out; below 1 a share.
        limit: rows at most.
        strata: the class of each row, `[n]`: each is held out in its proportion, but not the last text of one.

    Raises:
        UserError: too few distinct rows.
    """
    wanted = max(1, min(MAX_HELD_OUT, limit or MAX_HELD_OUT, round(size if size >= 1 else size * len(hashes))))
    if strata is not None:
        return _choose_stratified(hashes, strata, wanted, seed)
    ordered = np.sort(hashes)
    starts = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=starts[1:])
    count = int(np.count_nonzero(starts))
    order = np.random.default_rng((seed, 0)).permutation(count)[: wanted + 1].copy()  # each has at least one row
    drawn = ordered[np.flatnonzero(starts)[order]]
    sizes = np.searchsorted(ordered, drawn, "right") - np.searchsorted(ordered, drawn)
    taken = int(np.searchsorted(np.cumsum(sizes), wanted)) + 1
    if taken >= count:
        raise UserError(
            f"data: {len(hashes)} rows ({count} distinct) are too few to hold out {wanted} for evaluation; "
            "set data.eval, lower data.eval_size, or add rows"
        )
    return np.sort(drawn[:taken])


def _choose_stratified(hashes: np.ndarray, strata: list[str], wanted: int, seed: int) -> np.ndarray:
    distinct_hashes, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    sizes = np.bincount(group)
    _, stratum = np.unique([strata[index] for index in first], return_inverse=True)
    order = np.random.default_rng((seed, 0)).permutation(len(first))
    by_stratum = order[np.argsort(stratum[order], kind="stable")]
    members = np.split(by_stratum, np.cumsum(np.bincount(stratum))[:-1])
    share = np.array([sizes[each].sum() for each in members]) * wanted / len(hashes)
    quota = np.floor(share).astype(int)
    rest = np.argsort(-(share - quota), kind="stable")
    quota[rest[: wanted - quota.sum()]] += 1
    # the last text of each is left to train on
    held = np.concatenate([_first_groups(each[:-1], sizes, count) for each, count in zip(members, quota, strict=True)])
    if not len(held):
        raise UserError(
            f"data: {len(hashes)} rows ({len(first)} distinct texts) are too few to hold out {wanted} for evaluation; "
            "set data.eval, or add rows"
        )
    return distinct_hashes[np.sort(held)]


def _first_groups(groups: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """The first groups that together have `count` rows."""
    return groups[: int(np.searchsorted(np.cumsum(sizes[groups]), count)) + 1] if count and len(groups) else groups[:0]


def contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the values are among the ordered ones, `[len(values)]`. `np.isin` would sort all of them together."""
    found = np.empty(len(values), bool)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        positions = np.searchsorted(ordered, block)
        found[start : start + BLOCK] = ordered[np.minimum(positions, len(ordered) - 1)] == block
    return found


def apply_weights(origin: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Positions of the rows of one epoch: each row of source `i` `weights[i]` times, a fraction of them drawn by seed.

    Args:
        origin: the index of each row's source, `[n]`.
    """
    chosen = []
    for number, weight in enumerate(weights):
        rows = np.flatnonzero(origin == number)
        repeats = int(weight)
        part = np.random.default_rng((seed, 1, number)).permutation(rows)[: round((weight - repeats) * len(rows))]
        chosen.append(np.concatenate([np.tile(rows, repeats), part]))
    return np.sort(np.concatenate(chosen))


def find_duplicates(train: Selection, held: Selection, shown: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Counts and examples of the duplicates among training rows, and of the evaluation rows that are also training rows.

    Rows are duplicates if their complete texts are equal, ignoring case and white space.

    Args:
        shown: a prepared row as text.
    """
    ordered = _row_hashes(train)
    ordered.sort()
    repeats = ordered[1:] == ordered[:-1]
    second = repeats.copy()  # and not the third or fourth
    second[1:] &= ~repeats[:-1]
    repeated = ordered[1:][np.flatnonzero(second)[:EXAMPLES]]
    shared = contains(ordered, _row_hashes(held))
    del ordered, second
    return {
        "train_duplicates": int(np.count_nonzero(repeats)),
        "train_duplicate_examples": show(train, [np.argmax(_row_hashes(train) == one) for one in repeated], shown),
        "eval_rows_in_train": int(np.count_nonzero(shared)),
        "eval_rows_in_train_examples": show(held, np.flatnonzero(shared)[:EXAMPLES], shown),
    }


def _first_parts(rows: Selection) -> np.ndarray:
    """Which parts are the first of their row."""
    numbers = rows.take(rows.row)
    starts = np.ones(len(numbers), bool)
    np.not_equal(numbers[1:], numbers[:-1], out=starts[1:])
    return starts


def _row_hashes(rows: Selection) -> np.ndarray:
    """The text hash of each row, `[rows]`, as a copy."""
    starts, hashes = _first_parts(rows), rows.take(rows.text_hash)
    if not starts.all():
        return hashes[starts]
    return hashes.copy() if rows.positions is None else hashes


def show(rows: Selection, which: Iterable[Any], shown: Callable[[dict[str, Any]], str]) -> list[str]:
    """Rows as text.

    Args:
        which: indices of rows, not of parts.
        shown: a prepared row as text.
    """
    starts = np.flatnonzero(_first_parts(rows))
    places = [starts[number] if rows.positions is None else rows.positions[starts[number]] for number in which]
    return [shown(rows.table[int(place)]) for place in places]


def text_of(row: dict[str, Any], tokenizer: Any) -> str:
    """The start of a tokenized row, or the end of its prompt and the start of its answer: many have the same system message."""
    first = next((index for index, label in enumerate(row.get("labels", ())) if label != IGNORED), None)
    window = slice(TOKENS_BEFORE) if first is None else slice(max(0, first - TOKENS_BEFORE), first + TOKENS_AFTER)
    return " ".join(tokenizer.decode(row["input_ids"][window], skip_special_tokens=True).split())


def describe_duplicates(found: dict[str, Any]) -> list[str]:
    """One line for each kind of duplicates that was found."""
    lines = []
    for count, examples, words in (
        ("train_duplicates", "train_duplicate_examples", "duplicates among the training rows"),
        ("eval_rows_in_train", "eval_rows_in_train_examples", "evaluation rows are also in the training data"),
        ("conflicting_texts", "conflicting_text_examples", "training texts occur with different labels"),
        ("conflicting_images", "conflicting_image_examples", "training images occur with different labels"),
        ("conflicting_recordings", "conflicting_recording_examples", "training recordings occur with different labels"),
    ):
        if found.get(count):
            lines.append(f"{found[count]:,} {words}, for example " + "; ".join(f'"{text}"' for text in found[examples]))
    return lines


@dataclass
class Corpus:
    """The training sources of a recipe before a tokenizer exists."""

    sources: list[DataSource]
    held_out: np.ndarray | None  # text hashes; None if evaluation rows have their own source

    def examples(self) -> Iterator[Example | LabeledText]:
        """The training rows, each once."""
        held = set() if self.held_out is None else set(self.held_out.tolist())
        return (example for example in _examples(self.sources) if hash_text(example.content) not in held)

    def texts(self) -> Iterator[str]:
        """Their text, without the markup of a template."""
        for example in self.examples():
            if isinstance(example, LabeledText):
                yield from filter(None, (example.text, example.pair))
            elif example.text is not None:
                yield example.text
            else:
                yield from (message["content"] for message in example.messages or [])

    def has_conversations(self) -> bool:
        """Whether any source has prompts or conversations."""
        formats = [row_format for _, row_format in map(DataSource.read, self.sources)]
        return any(isinstance(row_format, RowFormat) and row_format.kind != "text" for row_format in formats)


def open_corpus(recipe: Recipe, detect: Callable[..., Any]) -> Corpus:
    """The corpus of a recipe. If rows of `data.train` are to be held out, they are chosen here.

    Args:
        detect: how the task reads rows; see `DataSource`.
    """
    data, size, limit = recipe.data, recipe.data.eval_size, recipe.evaluation.max_rows
    sources = [DataSource.open(source, data, "data.train") for source in data.train]
    for source in sources:
        source.detect = detect
    if data.eval or data.eval_split:
        return Corpus(sources, None)
    if data.documents == "files":
        for source in sources:
            source.part = "head"
        return Corpus(sources, None)
    labels: list[str] = []
    hashes, seed = np.fromiter(_hashes(_examples(sources), labels), dtype=np.int64), data.drawn_by(recipe.seed)
    return Corpus(sources, choose_held_out(hashes, size, limit, seed, labels or None))


def held_out(recipe: Recipe, detect: Callable[..., Any]) -> np.ndarray | None:
    """Text hashes of the rows to hold out, if a new tokenizer must not see them; else None."""
    return None if recipe.strategy.new_tokenizer is None else open_corpus(recipe, detect).held_out


def _hashes(examples: Iterator[Example | LabeledText], labels: list[str]) -> Iterator[int]:
    """The text hashes of the rows that are not blank; their labels, if any, are appended to `labels`."""
    for example in examples:
        if example.has_target:
            if isinstance(example, LabeledText):
                labels.append(example.stratum)
            yield hash_text(example.content)


def _examples(sources: list[DataSource]) -> Iterator[Example | LabeledText]:
    for source in sources:
        rows, row_format = source.read()
        for index, row in enumerate(rows):
            try:
                yield row_format.example(row)
            except BadRow as error:
                raise UserError(f"{row_format.where(index)}: {error}") from None
