"""Rows of one text or two with labels: how they are read, and written as token ids to an Arrow file."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from hfstrat.data.formats import BadRow, hash_text, rename, require_text
from hfstrat.data.readers import Row
from hfstrat.data.stats import MAX_UNSUPERVISED, Statistics
from hfstrat.data.tokenize import BATCH
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

FORMAT = "text-classification"
LABELS = ("label", "labels")
PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("question", "sentence"),
)
TEXTS = ("text", "sentence")
OUR_COLUMNS = sorted({*LABELS, *TEXTS, *(name for pair in PAIRS for name in pair)})
ALIASES = {  # other names of a text and its label, for the proposed mapping
    "text": ("content", "review", "comment", "document", "body", "message", "tweet", "utterance", "query", "question", "title"),
    "label": ("class", "category", "intent", "sentiment", "target", "topic", "tag", "y", "label_text", "coarse_label"),
}
NO_LIMIT = 10**6  # tokenizers without a limit report far more
BREAK = "\n\n"


class LabeledText(NamedTuple):
    """A row: its text, the second text of a pair, and the names of its labels (one, or any number with `many`)."""

    text: str
    pair: str | None
    labels: list[str]

    @property
    def stratum(self) -> str:
        """The labels, in whose proportions examples are held out."""
        return str(self.labels)

    @property
    def has_target(self) -> bool:
        """Whether there is a text to train on."""
        return bool(self.content.strip())

    @property
    def content(self) -> str:
        """Both texts, without the labels; equal for duplicates."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"

    @property
    def prompt(self) -> dict[str, str]:
        """The text, or both texts of a pair, by the names that tokenizers have for them."""
        return {"text": self.text} | ({"text_pair": self.pair} if self.pair is not None else {})

    @property
    def answer(self) -> str:
        return ", ".join(self.labels)


@dataclass
class LabelFormat:
    """How the rows of one source are read.

    `columns` are our names of the text, the second text ("" for none) and the label; `class_names` are the names of a Hub
    data set's label ids; `many`: a row has a list of labels.
    """

    source: str
    names: dict[str, str]
    columns: tuple[str, str, str]
    many: bool
    class_names: list[str] | None = None
    values: ClassVar[tuple[str, str]] = ("names", "string")  # name and type of the prepared column

    @classmethod
    def detect(
        cls, head: list[dict[str, Any]], source: str, wanted: str, mapping: dict[str, str], names: list[str] | None = None
    ) -> LabelFormat:
        """The format of a source, detected from its first rows.

        Raises:
            UserError: a mapped column is missing, or the columns are not a text with its label.
        """
        if wanted not in ("auto", FORMAT):
            raise UserError(f"data.format: {wanted} is for task: causal-lm; expected {FORMAT} or auto")
        renamed = rename(dict.fromkeys(name for row in head for name in row), mapping, source)
        columns = choose(list(renamed.values()), source)
        theirs = next(column for column, ours in renamed.items() if ours == columns[2])
        return cls(source, renamed, columns, any(isinstance(row.get(theirs), list | tuple) for row in head), names)

    @property
    def kind(self) -> str:
        """The columns as text."""
        return " + ".join(filter(None, self.columns)) + (" (any number of labels per row)" if self.many else "")

    def example(self, row: Mapping[str, Any]) -> LabeledText:
        """Raises BadRow where the row does not fit."""
        named = {ours: row.get(theirs) for theirs, ours in self.names.items()}
        first, second, label = self.columns
        labels = self._labels(named[label], label)
        return LabeledText(require_text(named[first], first), require_text(named[second], second) if second else None, labels)

    def _labels(self, value: Any, column: str) -> list[str]:
        if not self.many:
            return [label_of(value, column, self.class_names)]
        if not isinstance(value, list | tuple):
            raise BadRow(f"'{column}' is {value!r}, but other rows have a list; expected a list, or [] for no label")
        found = [label_of(each, column, self.class_names) for each in value]
        if len(set(found)) < len(found):
            raise BadRow(
                f"'{column}' contains duplicate labels; expected the labels that apply, "
                "such as [1, 4] (vectors of 0 and 1 are not supported)"
            )
        return found

    def where(self, index: int) -> str:
        return f"{self.source}: row {index + 1}"


def label_of(value: Any, column: str, names: list[str] | None = None) -> str:
    """The name of one label.

    Raises:
        BadRow: null, an empty text, a fraction, or a number without a class name.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # tables store integers as floats if a value is missing
        if not value.is_integer():
            raise BadRow(
                f"'{column}' is {'empty' if math.isnan(value) else value}; expected a text or a whole number: a class. "
                "For numbers set task: regression"
            )
        value = int(value)
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise BadRow(f"'{column}' is {value}: this row has no label; use a labeled split")
        return names[value]
    if isinstance(value, list | tuple):
        raise BadRow(f"'{column}' is a list, but other rows have one label; expected a list in all of them, or in none")
    if not isinstance(value, str | int) or not str(value).strip():
        given = "empty" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise BadRow(f"'{column}' is {given}; expected a label, a text or a whole number")
    return str(value).strip()


def choose(given: list[str], source: str) -> tuple[str, str, str]:
    """Our names of the text, the second text ("" for none) and the label.

    Raises:
        UserError: the columns do not fit; the message lists them and shows how to map them.
    """
    label = next((name for name in LABELS if name in given), None)
    pair = next((pair for pair in PAIRS if set(pair) <= set(given)), None)
    text = next((name for name in TEXTS if name in given), None)
    if label and (pair or text):
        return (*pair, label) if pair else (str(text), "", label)
    shape = f"text + label, or a pair such as premise + hypothesis + label; the data have {', '.join(given) or 'no columns'}"
    raise UserError(
        f"{source}: task text-classification needs {shape}. Map them under data, for example `columns: {{{_proposal(given)}}}`"
    )


def _proposal(given: list[str]) -> str:
    """A mapping of these columns as far as their names suggest one, else an example."""
    pairs = {ours: next((n for n in given if n.lower() in names), None) for ours, names in ALIASES.items() if ours not in given}
    if all(pairs.values()):
        return ", ".join(f"{theirs}: {ours}" for ours, theirs in pairs.items())
    return "review: text, sentiment: label"


def sort_labels(names: Iterable[str], known: list[str] | None = None) -> list[str]:
    """Labels in the order of the data set, else in natural order: numbers by value, "b2" before "b10"."""
    if known is not None:
        return sorted(names, key=known.index)
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple[Any, ...]:
    if (number := as_number(name)) is not None:
        return (0, number, name)
    parts = re.split(r"(\d+)", name.casefold())
    return (1, [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name)


def as_number(name: str) -> float | None:
    """The label as a number, or None."""
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class Encoded(NamedTuple):
    """Token ids, token type ids (empty if the tokenizer has none), and the length before truncation."""

    input_ids: list[int]
    token_type_ids: list[int]
    length: int


class Texts:
    """Encodes single texts and pairs for one tokenizer.

    Args:
        max_length: the maximum number of tokens; the tokenizer's own limit if that is smaller.

    Special tokens are those that the tokenizer adds, and are never truncated. If it adds nothing between two texts, as those of
    most decoders, a blank line separates them.
    """

    template = ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "model_max_length", None) or NO_LIMIT
        self.max_length = min(max_length, int(own)) if own < NO_LIMIT else max_length
        alone, both = (len(tokenizer(*words)["input_ids"]) for words in (("a",), ("a", "a")))
        bare = len(tokenizer("a", add_special_tokens=False)["input_ids"])
        self.between = "" if both > alone + bare else BREAK

    def encode(self, rows: Sequence[LabeledText], cut: bool = True) -> list[Encoded]:
        """Each row, truncated to `max_length` by the tokenizer (the longer text of a pair first)."""
        if not rows:
            return []
        whole = self._call(rows)
        long = [index for index, row in enumerate(whole) if row.length > self.max_length]
        if long and cut:
            short = self._call([rows[index] for index in long], truncation="longest_first", max_length=self.max_length)
            for index, row in zip(long, short, strict=True):
                whole[index] = row._replace(length=whole[index].length)
        return whole

    def _call(self, rows: Sequence[LabeledText], **options: object) -> list[Encoded]:
        options = {"verbose": False, "return_token_type_ids": True, **options}  # a teacher may need them
        if any(row.pair is not None for row in rows):
            words = ([row.text for row in rows], [f"{self.between}{row.pair or ''}" for row in rows])
            found = self.tokenizer(*words, **options)
        else:
            found = self.tokenizer([row.text for row in rows], **options)
        ids = found["input_ids"]
        types = found.get("token_type_ids") or [[]] * len(ids)
        # all zeros are what a model assumes without them
        return [Encoded(i, t if any(t) else [], len(i)) for i, t in zip(ids, types, strict=True)]


def schema(values: tuple[str, str]) -> pyarrow.Schema:
    """Columns of the prepared rows; `values` are the name of the label column and the type of one label.

    `token_type_ids` is empty where it would be zeros; `text_hash` is of the texts alone.
    """
    import pyarrow as pa

    fields = {"input_ids": pa.list_(pa.int32()), "token_type_ids": pa.list_(pa.int8())}
    fields[values[0]] = pa.list_(pa.type_for_alias(values[1]))
    return pa.schema([*fields.items(), ("length", pa.int32()), ("row", pa.int64()), ("text_hash", pa.int64())])


def write(rows: Iterable[Row], reading: LabelFormat, data: Data, texts: Texts, target: Path) -> Statistics:
    """Write the prepared rows to an Arrow stream (see `schema`) and return their statistics.

    Raises:
        UserError: rows that do not fit their format, too many without text, or long ones (`overflow: error`).
    """
    import pyarrow as pa

    stats = Statistics(reading.source, reading.kind, many_labels=reading.many)
    numbered, digest = enumerate(rows), hashlib.sha256()
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns_of := schema(reading.values)) as stream:
        while batch := list(itertools.islice(numbered, BATCH)):
            made = _batch(batch, reading, data, texts, stats)
            digest.update(repr([row[:3] for row in made]).encode("utf-8", "surrogatepass"))
            columns = zip(*made, strict=True) if made else [[]] * len(columns_of)
            stream.write_batch(pa.record_batch([list(column) for column in columns], schema=columns_of))
    stats.sha256, blank = digest.hexdigest(), stats.rows_blank
    if not stats.rows_kept or blank > MAX_UNSUPERVISED * stats.rows_read:
        cause = f"{blank:,} have an empty text" if blank else f"none is within data.max_length = {texts.max_length}"
        raise UserError(f"{stats.source}: of {stats.rows_read:,} rows, {cause}; check the columns, or remove these rows")
    return stats


def _batch(
    batch: list[tuple[int, Row]], reading: LabelFormat, data: Data, texts: Texts, stats: Statistics
) -> list[tuple[Any, ...]]:
    stats.rows_read += len(batch)
    examples = [_example(row, reading, reading.where(index)) for index, row in batch]
    made = []
    for (index, _), example, encoded in zip(batch, examples, texts.encode(examples), strict=True):
        if not example.has_target or not encoded.input_ids:
            stats.rows_blank += 1
        elif _fits(encoded, data, texts, stats, reading.where(index)):
            ids, types, _ = encoded
            made.append((ids, types, example.labels, len(ids), index, hash_text(example.content)))
    stats.rows_kept += len(made)
    stats.rows_dropped += len(batch) - len(made)
    stats.tokens += sum(row[3] for row in made)
    return made


def _example(row: Row, reading: LabelFormat, where: str) -> LabeledText:
    try:
        return reading.example(row)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def _fits(encoded: Encoded, data: Data, texts: Texts, stats: Statistics, where: str) -> bool:
    """Whether the row is kept; what it loses is added to the statistics."""
    if encoded.length <= texts.max_length:
        return True
    if data.overflow == "error":
        raise UserError(f"{where}: {encoded.length} tokens, more than {texts.max_length} (data.overflow: error)")
    kept = data.overflow == "truncate"
    stats.rows_cut += kept
    stats.tokens_lost += encoded.length - (len(encoded.input_ids) if kept else 0)
    return kept
