"""Texts as a classifier reads them: the tokenizer's own special tokens, cutting and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hfstrat.data.labels import Labelled

if TYPE_CHECKING:
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

    def encode(self, rows: Sequence[Labelled], cut: bool = True) -> list[Encoded]:
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

    def _call(self, rows: Sequence[Labelled], **options: object) -> list[Encoded]:
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
