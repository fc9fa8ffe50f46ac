"""Texts that follow one another, tokenised apart with the ids that they have in the whole.

Some tokenizers put a space before every text (SentencePiece's `▁`: Llama 2, Mistral v1, T5; byte-level ones with
`add_prefix_space`). Tokenised by itself, a text that goes on from another one would get a space that nobody wrote. With
these it is tokenised behind the end of what stands before it, whose ids are then taken off again.


Where the turns of the assistant stand in what a chat template writes, told by rendering up to each of them.

Most templates write a turn the same way whatever follows it. Some do not: Qwen3's marks an answer without reasoning by
an empty `<think>` in the last turn alone, and many leave out the reasoning of earlier turns. An answer that is learnt
must then be the last thing in its row, as it is when the model gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.messages import BadRow, Message

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


Chat = Callable[[Sequence[Message], bool], str]  # messages as text; True: up to where the assistant begins its next turn


Places = dict[int, tuple[int, int]]  # by the number of a message: where it begins and ends, its end token included


class Segment(NamedTuple):
    """A text that is tokenised by itself, whether it carries loss, and whether the end token follows it."""

    text: str
    trained: bool
    ends: bool = False


def rows_of(messages: Sequence[Message], learnt: set[int], chat: Chat, everything: bool = False) -> list[list[Segment]]:
    """The conversation as one row; as one for each turn to be learnt, up to its end, where the template writes some of
    them otherwise once more follow.

    Args:
        learnt: the numbers of the messages that carry loss.
        everything: all carries loss, and nobody asks where what stands.

    Raises:
        BadRow: the template rewrites what stands before an answer as soon as the answer is there.
    """
    whole = chat(messages, False)
    found = _places(messages, whole, chat, is_last=True)
    if everything or learnt <= found.keys():
        return [_cut(whole, found, learnt, everything)]
    return [_row(messages, index, chat) for index in sorted(learnt)]


def prompt_segments(messages: Sequence[Message], chat: Chat, everything: bool = False) -> list[Segment]:
    """What stands before the next turn of the assistant, cut in the same places as in the row that has this turn."""
    whole = chat(messages, True)
    return _cut(whole, _places(messages, whole, chat), set(), everything)


def _row(messages: Sequence[Message], index: int, chat: Chat) -> list[Segment]:
    """Up to the end of one answer, which alone carries loss."""
    before, after = chat(messages[:index], True), chat(messages[: index + 1], False)
    if not after.startswith(before):
        raise BadRow(
            f"the chat template renders what stands before message {index + 1} otherwise once that message follows, so its "
            "tokens have no place; name another template, or say train_on: all"
        )
    found = _places(messages[:index], before, chat)
    return _cut(after, {**found, index: (len(before), len(after))}, {index})


def _places(messages: Sequence[Message], whole: str, chat: Chat, is_last: bool = False) -> Places:
    """The turns of the assistant that stand in the whole as they would with nothing behind them.

    Args:
        is_last: nothing follows the last message there.
    """
    found: Places = {}
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat(messages[:index], True)
        after = whole if is_last and index + 1 == len(messages) else chat(messages[: index + 1], False)
        if whole.startswith(after) and after.startswith(before) and len(before) >= done:
            found[index] = len(before), len(after)
            done = len(after)
    return found


def _cut(whole: str, places: Places, learnt: set[int], everything: bool = False) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for index, (begins, ends) in places.items():
        segments.append(Segment(whole[done:begins], everything))
        segments.append(Segment(whole[begins:ends], everything or index in learnt))
        done = ends
    return [segment for segment in [*segments, Segment(whole[done:], everything)] if segment.text]
