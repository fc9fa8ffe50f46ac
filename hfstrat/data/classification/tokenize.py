"""Rows of a classification as token ids, with the tokenizer's special tokens, truncation and pairs, in an Arrow file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.classification.labels import LabeledText, LabelFormat
from hfstrat.data.formats import BadRow, hash_text
from hfstrat.data.readers import Row
from hfstrat.data.stats import MAX_UNSUPERVISED, Statistics
from hfstrat.data.tokenize import BATCH
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase


NO_LIMIT = 10**6  # tokenizers without a limit report far more
BREAK = "\n\n"


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
