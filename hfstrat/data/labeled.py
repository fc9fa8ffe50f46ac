"""Rows of one text or two with labels: how they are read, and written as token ids to an Arrow file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from hfstrat.data.columns import CLASSES, Reading, columns_of, propose, rename
from hfstrat.data.formats import hash_text
from hfstrat.data.labels import BITS, STRIPPED, are_lists_as_text, find_vector, label_of, vector_sentence
from hfstrat.data.stats import MAX_UNSUPERVISED, Statistics
from hfstrat.data.tokenize import BATCH
from hfstrat.data.values import (
    REPLACED,
    BadRow,
    Row,
    is_missing,
    looks_like_list,
    parse_list,
    require_text,
    shown,
    valid,
)
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

FORMAT = "text-classification"
OF_TASKS = (
    "text-classification",
    "regression",
    "image-classification",
    "audio-classification",
    "object-detection",
)  # formats with the name of their task
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
    "text": (
        *("sentence", "content", "review", "comment", "document", "body", "message", "tweet", "utterance", "query", "question"),
        *("title", "sms", "input", "prompt", "phrase", "description"),
    ),
    "label": ("labels", *CLASSES, "target", "y", "output", "answer", "class_label", "rating", "stars"),
}
NO_LIMIT = 10**6  # tokenizers without a limit report far more
BREAK = "\n\n"


Made = TypeVar("Made", bound="LabeledText")


class LabeledText(NamedTuple):
    """A row: its text, the second text of a pair, and the names of its labels (one, or any number with `many`).

    `changes` are what reading the row has changed, in words.
    """

    text: str
    pair: str | None
    labels: list[str]
    changes: tuple[str, ...] = ()

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
class LabelFormat(Reading):
    """How the rows of one source are read.

    `columns` are our names of the text, the second text ("" for none) and the label; `class_names` are the names that the
    source has for label ids; `many`: a row has a list of labels.
    """

    columns: tuple[str, str, str] = ("", "", "")
    many: bool = False
    class_names: list[str] | None = None
    values_of: ClassVar[tuple[str, str]] = ("names", "string")  # name and type of the prepared column
    format: ClassVar[str] = FORMAT

    @classmethod
    def detect(
        cls,
        head: list[dict[str, Any]],
        source: str,
        wanted: str,
        mapping: dict[str, str],
        features: Mapping[str, list[str]] | None = None,
    ) -> LabelFormat:
        """The format of a source, detected from its first rows.

        Args:
            features: names of label ids, by column.

        Raises:
            UserError: a mapped column is missing, the columns are not a text with its label, or labels are vectors.
        """
        if wanted not in ("auto", cls.format):
            theirs = wanted if wanted in OF_TASKS else "causal-lm"
            raise UserError(f"data.format: {wanted} is for task: {theirs}; expected {cls.format} or auto")
        renamed = rename(columns_of(head), mapping, source)
        columns = cls.choose_columns(list(renamed.values()), source)
        theirs = next(column for column, ours in renamed.items() if ours == columns[2])
        given = [row[theirs] for row in head if not is_missing(row.get(theirs)) and row[theirs] != ""]
        many = any(isinstance(value, list | tuple) for value in given) or are_lists_as_text(given)
        names = (features or {}).get(theirs)
        found = cls(source, renamed, columns, many, names, reads=frozenset(filter(None, columns)))
        if many and (vector := find_vector(given)) is not None:
            first = next(index for index, row in enumerate(head) if not is_missing(row.get(theirs)) and len(row[theirs]))
            raise UserError(f"{found.where(first)}: {vector_sentence(columns[2], vector)}")
        return found

    @classmethod
    def choose_columns(cls, given: list[str], source: str) -> tuple[str, str, str]:
        """Our names of the text, the second text ("" for none) and the label. Raises UserError as `choose` does."""
        return choose(given, source)

    @property
    def kind(self) -> str:
        """The columns as text."""
        return " + ".join(filter(None, self.columns)) + (" (any number of labels per row)" if self.many else "")

    def example(self, row: Mapping[str, Any]) -> LabeledText:
        """Raises BadRow where the row does not fit."""
        named = self.values(row)
        first, second, label = self.columns
        given = self._given(named[label], label)
        labels = [label_of(value, label, self.class_names) for value in given]
        if len(set(labels)) < len(labels):
            raise BadRow(f"'{label}' contains duplicate labels: {shown(given)}; expected the labels that apply, such as [1, 4]")
        changes = (STRIPPED,) if any(isinstance(each, str) and each != each.strip() for each in given) else ()
        pair = require_text(named[second], second) if second else None
        return repaired(LabeledText(require_text(named[first], first), pair, labels, changes))

    def _given(self, value: Any, column: str) -> list[Any]:
        """The labels of a row as they are in the data."""
        if not self.many:
            return [value]
        if not isinstance(value, list | tuple) and not looks_like_list(value):
            raise BadRow(f"'{column}' is {shown(value)}, but other rows have a list; expected a list, or [] for no label")
        found = parse_list(value, column)
        bits = [str(each).lower() in BITS for each in found]
        if any(isinstance(each, bool) for each in found) or (all(bits) and len(set(map(str, found))) < len(found)):
            raise BadRow(vector_sentence(column, found))
        return found


def repaired(made: Made) -> Made:
    """The example with U+FFFD in place of halves of surrogate pairs."""
    parts = [made.text, made.pair, made.labels]
    if (clean := valid(parts)) is parts:
        return made
    return made._replace(text=clean[0], pair=clean[1], labels=clean[2], changes=(*made.changes, REPLACED))


def choose(given: list[str], source: str) -> tuple[str, str, str]:
    """Our names of the text, the second text ("" for none) and the label.

    Raises:
        UserError: the columns do not fit; the message lists them and shows how to map them.
    """
    label = next((name for name in LABELS if name in given), None)
    texts = choose_texts(given)
    if label and texts:
        return (*texts, label)
    shape = f"text + label, or a pair such as premise + hypothesis + label; the data have {', '.join(given) or 'no columns'}"
    wanted = {} if texts else wanted_texts(given)
    wanted |= {} if label else {"label": ALIASES["label"]}
    raise UserError(f"{source}: task text-classification needs {shape}. {propose(given, wanted)}")


def choose_texts(given: Collection[str]) -> tuple[str, str] | None:
    """Our names of the text and the second text ("" for none); None where there is no text."""
    pair = next((pair for pair in PAIRS if set(pair) <= set(given)), None)
    text = next((name for name in TEXTS if name in given), None)
    return pair or ((text, "") if text else None)


def wanted_texts(given: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The text columns that a mapping of the given ones should have, with their other names."""
    near = {name.casefold().strip() for name in given}
    pair = next((pair for pair in PAIRS if set(pair) <= near), None)
    return dict.fromkeys(pair, ()) if pair else {"text": ALIASES["text"]}


@dataclass
class TextFormat(Reading):
    """How the texts of a source are read for predictions, whether or not they have labels."""

    columns: tuple[str, str] = ("", "")

    @classmethod
    def detect(cls, head: list[dict[str, Any]], source: str, mapping: Mapping[str, str]) -> TextFormat:
        """The columns of the first rows; `mapping` is that of the training data, as far as it is about texts.

        Raises:
            UserError: there is no text.
        """
        given = columns_of(head)
        texts = {*TEXTS, *(name for pair in PAIRS for name in pair)}
        mapped = {theirs: ours for theirs, ours in mapping.items() if theirs in given and ours in texts and ours not in given}
        names = rename(given, mapped, source)
        columns = choose_texts(names.values())
        if columns is None:
            raise UserError(
                f"{source}: it has no column such as text, or premise and hypothesis; it has {', '.join(given)}. "
                "Rename the column, or name it as in training"
            )
        return cls(source, names, columns)

    def example(self, row: Mapping[str, Any]) -> LabeledText:
        """The row without labels. Raises BadRow where it has no text."""
        named = self.values(row)
        first, second = self.columns
        pair = require_text(named[second], second) if second else None
        found = repaired(LabeledText(require_text(named[first], first), pair, []))
        if not found.has_target:
            raise BadRow(f"'{first}' is empty, expected text")
        return found


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

    stats = Statistics(reading.source, reading.kind, many_labels=reading.many, warnings=list(reading.remarks))
    numbered, digest = enumerate(rows), hashlib.sha256()
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns_of := schema(reading.values_of)) as stream:
        while batch := list(itertools.islice(numbered, BATCH)):
            made = _batch(batch, reading, data, texts, stats)
            digest.update(repr([row[:3] for row in made]).encode("utf-8", "surrogatepass"))
            columns = zip(*made, strict=True) if made else [[]] * len(columns_of)
            stream.write_batch(pa.record_batch([list(column) for column in columns], schema=columns_of))
    stats.sha256 = digest.hexdigest()
    check_blank(stats.source, stats.rows_read, stats.rows_blank)
    if not stats.rows_kept:
        raise UserError(
            f"{stats.source}: of {stats.rows_read:,} rows, none is within data.max_length = {texts.max_length}; check the "
            "columns, or remove these rows"
        )
    return stats


def check_blank(source: str, rows: int, blank: int) -> None:
    """Raises UserError where too many rows have no text."""
    if blank > MAX_UNSUPERVISED * rows:
        raise UserError(f"{source}: of {rows:,} rows, {blank:,} have an empty text; check the columns, or remove these rows")


def _batch(
    batch: list[tuple[int, Row]], reading: LabelFormat, data: Data, texts: Texts, stats: Statistics
) -> list[tuple[Any, ...]]:
    stats.rows_read += len(batch)
    examples = [_example(row, reading, reading.where(index)) for index, row in batch]
    for (_, row), example in zip(batch, examples, strict=True):
        stats.note(reading.unread(row), example.changes)
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
