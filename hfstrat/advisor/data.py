"""What there is to learn from: rows, tokens, classes, lengths, duplicates. No torch, no transformers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data import readers, sources
from hfstrat.data.formats import BadRow, Example
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS

if TYPE_CHECKING:
    from hfstrat.advisor.shapes import Model

MOST_READ = 50_000  # rows; beyond them their number is told from the size of the file
SAMPLE = 2_000  # rows that are tokenised
BYTES_A_TOKEN = 4.0  # of English, where there is no tokenizer at hand
TURN_TOKENS = 5  # that a template puts around a turn, about
BY_HAND = "by hand"  # in the place of a source
KEPT = 0.995  # share of the tokens that the proposed max_length keeps


@dataclass
class Survey:
    """Rows and tokens of a data set.

    `lengths` are tokens of the sampled rows before cutting; `texts` are these rows as plain text; `labels` are rows by label
    (of a classification), `names` those of `texts`. `estimated`: what is not exact, in words.
    """

    source: str
    task: str
    rows: int
    lengths: np.ndarray
    supervised_share: float = 1.0
    bytes_read: int = 0
    duplicates: float = 0.0
    labels: dict[str, int] = field(default_factory=dict)
    many: bool = False
    texts: list[str] = field(default_factory=list, repr=False)
    names: list[str] = field(default_factory=list, repr=False)
    max_length: int = 1024
    format: str = ""
    estimated: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> float:
        """Of all rows, cut to `max_length`."""
        return self.rows * self.mean_length

    @property
    def supervised(self) -> float:
        return self.tokens * self.supervised_share

    @property
    def longest(self) -> int:
        return int(min(self.max_length, self.lengths.max()))

    @property
    def pieces(self) -> np.ndarray:
        """Lengths of the sampled rows as they are trained on: a classifier's are cut, others are split."""
        whole, rest = np.divmod(self.lengths, self.max_length)
        split = np.concatenate([np.full(int(whole.sum()), self.max_length), rest[rest > 0]])
        return self.cut_lengths if self.labels else split

    @property
    def cut_lengths(self) -> np.ndarray:
        return np.minimum(self.lengths, self.max_length)

    @property
    def mean_length(self) -> float:
        return float(self.cut_lengths.mean())

    @property
    def cut_share(self) -> float:
        """Of the tokens, beyond `max_length`."""
        return 1 - float(self.cut_lengths.sum() / self.lengths.sum())

    @property
    def by_hand(self) -> bool:
        return self.source == BY_HAND

    def lines(self) -> list[str]:
        """What there is, in words."""
        if self.by_hand:
            return self._said_by_hand()
        middle, high = np.percentile(self.lengths, (50, 99))
        share = "" if self.labels else f", {self.supervised_share:.0%} of them carry loss"
        found = [
            f"{self.source}: {self.rows:,} rows ({self.format}), about {self.tokens:,.0f} tokens{share}",
            f"lengths: median {middle:,.0f}, 99 % under {high:,.0f}, longest {self.lengths.max():,} tokens; max_length "
            f"{self.max_length:,} cuts {self.cut_share:.1%} of the tokens; {self.duplicates:.1%} of the rows are duplicates",
        ]
        if self.labels:
            small, large = (pick(self.labels, key=lambda name: self.labels[name]) for pick in (min, max))
            share = f"{self.labels[large] / max(1, sum(self.labels.values())):.1%}"
            found.append(
                f"{len(self.labels):,} classes: smallest {small} {self.labels[small]:,} rows, largest {large} "
                f"{self.labels[large]:,} = {share}, the accuracy of always saying it"
            )
        return found + [f"not exact: {words}" for words in self.estimated]

    def _said_by_hand(self) -> list[str]:
        """Of rows that nobody has seen yet."""
        each = next(iter(self.labels.values()), 0)
        classes = f", {len(self.labels):,} classes of {each:,} rows" if self.labels else ""
        return [
            f"sizes given by hand: {self.rows:,} rows{classes}, about {self.tokens:,.0f} tokens",
            f"not known: lengths, balance, duplicates; every row is taken to have {self.longest:,} tokens",
        ]


def by_hand(rows: int, tokens: int, task: str, classes: int, context: int) -> Survey:
    """Where there is no data yet. Raises UserError: no rows, or fewer tokens than rows."""
    if rows < 1:
        raise UserError(f"--rows: {rows}: expected at least 1")
    if tokens < rows:
        raise UserError(f"--tokens: {tokens} tokens for {rows} rows; expected the tokens of all rows together")
    if task == "text-classification" and classes < 2:
        raise UserError("--classes: missing; how many labels will there be? Such as --classes 3")
    each = max(8, min(context, -(-tokens // rows)))
    labels = {f"class {n}": rows // classes for n in range(classes)} if task == "text-classification" else {}
    lengths = np.full(1, each)
    if task != "text-classification" and classes:
        raise UserError(f"--classes: task {task} has none; leave it out, or say --task text-classification")
    return Survey(BY_HAND, task, rows, lengths, labels=labels, max_length=each, format="sizes given by hand")


def survey(path: str, model: Model, task: str | None = None) -> Survey:
    """Read local rows.

    Raises:
        UserError: rows that are not there, cannot be read, or fit no task.
    """
    files = sources.local_files(path, "--data")
    if files is None:
        raise UserError(f"--data: {path}: no such file here; the adviser reads local rows (or --rows and --tokens by hand)")
    rows, guessed, bytes_read = _read(files)
    task = task or _task_of(rows, path)
    data = Data.model_validate({"train": path})
    try:
        reading = TASKS[task].told(_with_all_columns(rows[: readers.HEAD_ROWS]), path, data, "auto", {})
    except UserError as error:
        raise UserError(f"--data: {error}") from None
    found = Survey(path, task, len(rows), np.ones(1, dtype=np.int64), bytes_read=bytes_read, format=reading.kind)
    if guessed:
        found.rows = guessed
        found.estimated.append(f"the number of rows, from the first {len(rows):,} and the size of the files")
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(reading.example({**dict.fromkeys(reading.names), **row}))
        except BadRow as error:
            raise UserError(f"--data: {reading.where(number)}: {error}") from None
    words = [example.content for example in examples]
    found.duplicates = 1 - len(set(words)) / len(words)
    chosen = list(range(0, len(rows), max(1, len(rows) // SAMPLE)))[:SAMPLE]
    found.texts = [words[index] for index in chosen]
    if task == "text-classification":
        found.many = bool(reading.many)
        counts = Counter(label for example in examples for label in example.labels)
        found.labels = {name: count * found.rows // len(rows) for name, count in counts.most_common()}
        found.names = [examples[index].labels[0] if examples[index].labels else "" for index in chosen]
        if len(found.labels) < 2:
            raise UserError(f"--data: {path}: {len(found.labels)} label; a classification needs two at least")
    _tokenise(found, [examples[index] for index in chosen], model)
    if len(chosen) < len(rows):
        found.estimated.append(f"tokens and lengths, from {len(chosen):,} rows")
    found.max_length = proposed_length(found.lengths, model.context)
    return found


def _read(files: list[Path]) -> tuple[list[dict[str, Any]], int, int]:
    """The first rows, how many there are if that had to be guessed (else 0), and the bytes of the files."""
    size = sum(file.stat().st_size for file in files)
    stream: Iterator[dict[str, Any]] = itertools.chain.from_iterable(readers.read(file) for file in files)
    rows = list(itertools.islice(stream, MOST_READ))
    if not rows:
        raise UserError(f"--data: {files[0]}: the file holds no row; expected at least one")
    if len(rows) < MOST_READ or next(stream, None) is None:
        return rows, 0, size
    if any(file.suffix in (".gz", ".parquet", ".arrow") for file in files):
        return rows, len(rows) + 1 + sum(1 for _ in stream), size
    read = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in rows)
    return rows, max(len(rows), round(size / read * len(rows))), size


def _with_all_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _task_of(rows: list[dict[str, Any]], path: str) -> str:
    """The first task whose columns are there; labels tell a classification."""
    problems = []
    for task in sorted(TASKS.values(), key=lambda task: task.unit == "token"):
        try:
            data = Data.model_validate({"train": path})
            task.told(_with_all_columns(rows[: readers.HEAD_ROWS]), path, data, "auto", {})
        except UserError as error:
            problems.append(str(error))
        else:
            return task.name
    raise UserError(f"--data: {problems[-1]}")


def proposed_length(lengths: np.ndarray, context: int) -> int:
    """The least multiple of 16 that keeps nearly all tokens, within the context."""
    top = int(min(context, lengths.max()))
    for length in range(16, top + 16, 16):
        if np.minimum(lengths, length).sum() >= KEPT * lengths.sum():
            return max(16, min(length, context))
    return max(16, min(-(-top // 16) * 16, context))


def _tokenise(found: Survey, examples: list[Any], model: Model) -> None:
    """Tokens of the sampled rows, with what a template would put around turns."""
    pieces = [_pieces(example) for example in examples]
    texts = [text for row in pieces for text, _ in row]
    counts = count_tokens(texts, model)
    if counts is None:
        counts = [max(1, round(len(text.encode()) / BYTES_A_TOKEN)) for text in texts]
        found.estimated.append(f"tokens, at {BYTES_A_TOKEN:g} bytes each: this model's tokenizer.json is not at hand")
    place, lengths, learnt = 0, [], 0
    for row in pieces:
        marks = TURN_TOKENS if len(row) > 1 else 1
        each = [count + marks for count in counts[place : place + len(row)]]
        learnt += sum(count for count, (_, trained) in zip(each, row, strict=True) if trained)
        lengths.append(sum(each))
        place += len(row)
    if any(len(row) > 1 for row in pieces) and found.task == "causal-lm":
        found.estimated.append(f"the template, at {TURN_TOKENS} tokens a turn")
    found.lengths = np.asarray(lengths, dtype=np.int64)
    found.supervised_share = learnt / max(1, sum(lengths))


def _pieces(example: Any) -> list[tuple[str, bool]]:
    """Texts of a row, and whether they carry loss."""
    if not isinstance(example, Example):
        return [(example.content, True)]
    if example.text is not None:
        return [(example.text, True)]
    messages = example.messages or []
    return [
        (str(message["content"]), message["role"] == "assistant" and index >= example.prompt_turns)
        for index, message in enumerate(messages)
    ]


def count_tokens(texts: list[str], model: Model) -> list[int] | None:
    """Tokens of each text, without special ones; None where the model has no tokenizer.json here."""
    file = (model.folder or Path("/nowhere")) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(each.ids) for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
