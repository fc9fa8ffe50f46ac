"""Texts as a classifier reads them: the tokenizer's own special tokens, cutting and pairs.

Rows of one source into an Arrow file of token ids with the names of their labels, a batch at a time."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.classification.labels import LabeledText, LabelFormat
from hfstrat.data.formats import BadRow
from hfstrat.data.readers import Row
from hfstrat.data.splits import hash_text
from hfstrat.data.stats import MAX_UNSUPERVISED, Statistics
from hfstrat.data.tokenize import BATCH
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase


NO_LIMIT = 10**6  # what tokenizers without a limit say is far beyond this


BREAK = "\n\n"


class Encoded(NamedTuple):
    """Token ids, which of two texts each is of (empty where the tokenizer does not tell), and the length before cutting."""

    input_ids: list[int]
    token_type_ids: list[int]
    length: int


class Texts:
    """Encodes single texts and pairs for one tokenizer.

    Args:
        max_length: tokens, at most; the tokenizer's own limit if that is smaller.

    Special tokens are those that the tokenizer puts around a text, and are never cut off. Where it puts nothing between two
    texts, as most decoders' do, a blank line stands there.
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
        """Each row, cut to `max_length` by the tokenizer's rules (the longer text of a pair first)."""
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
        options = {"verbose": False, "return_token_type_ids": True, **options}  # a teacher may tell texts apart by them
        if any(row.pair is not None for row in rows):
            words = ([row.text for row in rows], [f"{self.between}{row.pair or ''}" for row in rows])
            found = self.tokenizer(*words, **options)
        else:
            found = self.tokenizer([row.text for row in rows], **options)
        ids = found["input_ids"]
        types = found.get("token_type_ids") or [[]] * len(ids)
        # all zeros say nothing: they are what a model takes where it is told nothing
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
    """Write the prepared rows into an Arrow stream; see `schema`.

    Raises:
        UserError: rows that do not fit their format, too many without a text, or too long ones (`overflow: error`).
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
        raise UserError(f"{stats.source}: of {stats.rows_read:,} rows {cause}; check the columns, or remove these rows")
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
    """Whether the row is kept, with what it loses written into the account."""
    if encoded.length <= texts.max_length:
        return True
    if data.overflow == "error":
        raise UserError(f"{where}: {encoded.length} tokens, more than {texts.max_length} (overflow: error)")
    kept = data.overflow == "truncate"
    stats.rows_cut += kept
    stats.tokens_lost += encoded.length - (len(encoded.input_ids) if kept else 0)
    return kept
