"""Texts that follow one another, tokenised apart with the ids that they have in the whole.

Some tokenizers put a space before every text (SentencePiece's `▁`: Llama 2, Mistral v1, T5; byte-level ones with
`add_prefix_space`). Tokenised by itself, a text that goes on from another one would get a space that nobody wrote. With
these it is tokenised behind the end of what stands before it, whose ids are then taken off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAIL = 64  # characters of what stands before: more than a special token has
ANCHORS = ("\n", "0", "|", "a")  # what rarely grows together with what follows
PROBES = ("a", "A", "1", "(")


class Pieces:
    """Tokenises texts that follow one another; `prepends`: the tokenizer puts a space before every text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.anchors = [(text, ids) for text, ids in zip(ANCHORS, self._alone(ANCHORS), strict=True) if self._is_sound(ids)]
        self.prepends = any(self._anchored(text) != ids for text, ids in zip(PROBES, self._alone(PROBES), strict=True))

    def ids(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it.

        Args:
            before: what stands before each of them in its row, to its last `TAIL` characters; empty for the first.
        """
        if not self.prepends:
            return self._alone(texts)
        found = self._alone([tail + text for tail, text in zip(before, texts, strict=True)])
        tails = list(dict.fromkeys(filter(None, before)))
        heads = dict(zip(tails, self._alone(tails), strict=True))
        return [self._behind(heads[b], ids, text) if b else ids for b, ids, text in zip(before, found, texts, strict=True)]

    def _behind(self, head: list[int], ids: list[int], text: str) -> list[int]:
        """The ids without those of the head. Where the two have grown together: the text's own, for the head keeps its ids."""
        if self._is_sound(head) and ids[: len(head)] == head:
            return ids[len(head) :]
        return self._anchored(text)

    def _anchored(self, text: str) -> list[int]:
        """Behind the first anchor that it does not grow together with; as it is by itself where there is none."""
        for anchor, head in self.anchors:
            (ids,) = self._alone([anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._alone([text])[0]

    def _is_sound(self, head: list[int]) -> bool:
        """Whether equal ids mean the same characters: the unknown token stands for any number of them."""
        return bool(head) and head[-1] != self.tokenizer.unk_token_id

    def _alone(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: Any = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return list(found)
