"""Texts that follow one another in a row, and their token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAIL = 64  # characters of preceding text that matter for tokenization: more than any special token has
ANCHORS = ("\n", "0", "|", "a")  # texts that rarely merge with what follows
PROBES = ("a", "A", "1", "(")


class Segment(NamedTuple):
    """A text that is tokenized separately, whether it has loss, and whether the end token follows it."""

    text: str
    trained: bool
    ends: bool = False


class Rendered(NamedTuple):
    """Segments in order; `framed`: the template wrote BOS and EOS itself."""

    segments: list[Segment]
    framed: bool

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class SegmentTokenizer:
    """Tokenizes texts that follow one another separately, with the ids that they have in the complete text.

    Some tokenizers put a space before every text (SentencePiece's `▁`: Llama 2, Mistral v1, T5; byte-level ones with
    `add_prefix_space`), so that a continuation tokenized by itself would gain a space (`prepends`). It is then tokenized
    after the end of the preceding text, whose ids are removed again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        anchors = zip(ANCHORS, self._ids_of_each(ANCHORS), strict=True)
        self.anchors = [(text, ids) for text, ids in anchors if self._is_unambiguous(ids)]
        self.prepends = any(
            self._ids_after_anchor(text) != ids for text, ids in zip(PROBES, self._ids_of_each(PROBES), strict=True)
        )

    def ids(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it.

        Args:
            before: the last `TAIL` characters that precede each text in its row; empty for the first.
        """
        if not self.prepends:
            return self._ids_of_each(texts)
        joined = self._ids_of_each([tail + text for tail, text in zip(before, texts, strict=True)])
        tails = list(dict.fromkeys(filter(None, before)))
        heads = dict(zip(tails, self._ids_of_each(tails), strict=True))
        return [
            self._without_head(heads[b], ids, text) if b else ids for b, ids, text in zip(before, joined, texts, strict=True)
        ]

    def _without_head(self, head: list[int], ids: list[int], text: str) -> list[int]:
        """The ids without those of the head; if the two merged, the ids of the text alone, since the head keeps its ids."""
        if self._is_unambiguous(head) and ids[: len(head)] == head:
            return ids[len(head) :]
        return self._ids_after_anchor(text)

    def _ids_after_anchor(self, text: str) -> list[int]:
        """The ids after the first anchor that the text does not merge with; by itself if there is none."""
        for anchor, head in self.anchors:
            (ids,) = self._ids_of_each([anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._ids_of_each([text])[0]

    def _is_unambiguous(self, head: list[int]) -> bool:
        """Whether equal ids mean equal characters: the unknown token stands for any number of characters."""
        return bool(head) and head[-1] != self.tokenizer.unk_token_id

    def _ids_of_each(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: Any = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return list(found)
