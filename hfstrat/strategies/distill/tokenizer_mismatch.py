"""A teacher that reads and writes otherwise than its student: with a tokenizer, a chat template or an end token of its own.

It is asked in its own form, since a model that is asked in another one's markers answers badly, and nobody sees it. What it
writes is handed over as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.render import IGNORED, TAIL, Renderer, SegmentTokenizer
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.recipe.data import Data

ENDLESS = 1 << 30  # tokens, where a model has no longest context


@dataclass
class Foreign:
    """How to ask it and to understand it.

    Args:
        ours: the student's tokenizer.
        theirs: the teacher's.
        section: the recipe's `data`.
        reach: the teacher's context, in tokens.
        line: what is other, in words.
    """

    ours: Any
    theirs: Any
    section: Data
    reach: int
    line: str

    @classmethod
    def of(cls, ours: Any, theirs: Any, words: int, renderer: Any, section: Data, context: int | None) -> Foreign | None:
        """None where the teacher reads the student's ids as they are.

        Args:
            words: how many token ids the teacher knows.
            renderer: of the student's rows.
        """
        from hfstrat.strategies.distill.teacher import different_words

        found, form = different_words(ours.get_vocab(), theirs.get_vocab(), words), Renderer(theirs, "auto")
        own = (form.template, theirs.chat_template if form.template == "chat" else "", theirs.eos_token_id)
        if not found and own == (renderer.template, ours.chat_template if own[0] == "chat" else "", ours.eos_token_id):
            return None
        said = f"reads and writes with a tokenizer of its own ({found})" if found else "has a form of its own"
        how = "its own chat template" if form.template == "chat" else "the plain template: it has none of its own"
        return cls(
            ours, theirs, section, context or ENDLESS, f"{said}: it is asked in {how}, and what it says is handed over as text"
        )

    def asked(self, rows: Any, first: np.ndarray, prompts: list[list[int]]) -> list[list[int]]:
        """What the teacher reads for each prompt: the same turns of the same row in its own form, or, where a row was cut
        into pieces that have no such turn, the prompt's text.

        Args:
            rows: the student's training rows.
            first: the places of the different ones, in the order of the source.
            prompts: their ids before the last answer.

        Raises:
            UserError: a prompt is longer than the teacher's context, or its template cannot render a row.
        """
        theirs, numbers = self._turns(), [int(number) for number in np.asarray(rows["row"])[first]]
        answers = [len(begins_of(rows[int(place)]["labels"])) for place in first]
        pieces, total, spoken = Counter(numbers), Counter[int](), Counter[int]()
        for number, count in zip(numbers, answers, strict=True):
            total[number] += count
        found = []
        for number, count, prompt in zip(numbers, answers, prompts, strict=True):
            spoken[number] += count
            turns = theirs(number)
            same = total[number] == len(turns) or (pieces[number] == 1 and count < len(turns))  # else cut into pieces
            found.append(turns[spoken[number] - 1] if same else heard(prompt, self.ours, self.theirs))
        longest = max(map(len, found))
        if longest >= self.reach:
            raise UserError(
                f"strategy.teacher: its context is {self.reach:,} tokens, and a prompt takes {longest:,} of them in its own "
                "form; take another teacher, or rows with shorter prompts"
            )
        return found

    def _turns(self) -> Callable[[int], list[list[int]]]:
        """The ids before each answer of a row of the source, by its number."""
        from hfstrat.data.prepare import prepare_untruncated

        try:
            made = prepare_untruncated(self.section, self.theirs)
        except UserError as error:
            raise UserError(f"strategy.teacher: the rows in the teacher's own form: {error}") from error
        table, all_numbers = made.dataset(), made.take(made.row)  # never smaller than the one before

        def turns(number: int) -> list[list[int]]:
            begin, end = np.searchsorted(all_numbers, [number, number + 1])
            pieces = [table[place] for place in range(int(begin), int(end))]
            return [piece["input_ids"][:begin] for piece in pieces for begin in begins_of(piece["labels"])]

        return turns

    def repeated(self, answers: list[list[int]], asked: list[list[int]], prompts: list[list[int]]) -> list[list[int]]:
        return repeated(answers, asked, prompts, SegmentTokenizer(self.ours), self.theirs)


def begins_of(labels: Any) -> list[int]:
    """Where answers begin: the first of each stretch of labels that carry loss."""
    carries = np.asarray(labels) != IGNORED
    return [int(place) for place in np.flatnonzero(carries & ~np.concatenate([[False], carries[:-1]]))]


def prompt_of(row: dict[str, Any], key: str = "level: sequence") -> list[int]:
    """The ids before a row's last answer. Raises UserError where there are none."""
    carries, begins = np.asarray(row["labels"]) != IGNORED, begins_of(row["labels"])
    if not begins or begins[-1] == 0 or (carries[1:].all() and len(carries) > 1):
        raise UserError(f"strategy.{key}: a row has no prompt that could be answered; give rows with prompts")
    return [int(one) for one in row["input_ids"][: begins[-1]]]


def heard(prompt: list[int], ours: Any, theirs: Any) -> list[int]:
    """A prompt's text in the teacher's tokens."""
    begin = int(prompt[0] == ours.bos_token_id)  # the teacher has its own
    ids: list[int] = theirs(ours.decode(prompt[begin:], clean_up_tokenization_spaces=False))["input_ids"]
    return ids[:-1] if ids[1:] and ids[-1] == theirs.eos_token_id else ids


def repeated(
    answers: list[list[int]], asked: list[list[int]], prompts: list[list[int]], ours: SegmentTokenizer, theirs: Any
) -> list[list[int]]:
    """What the teacher wrote to what it was asked, in our tokens as they go on from our prompts (`prompts`), with our end
    where it came to its end."""
    tokenizer = ours.tokenizer
    texts = [_written(answer, heard, theirs) for answer, heard in zip(answers, asked, strict=True)]
    before = [str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))[-TAIL:] for prompt in prompts]
    ended = [answer[-1:] == [theirs.eos_token_id] for answer in answers]
    made = zip(ours.ids(texts, before), ended, strict=True)
    return [ids + [tokenizer.eos_token_id] if end or not ids else ids for ids, end in made]


def _written(answer: list[int], asked: list[int], theirs: Any) -> str:
    """The answer's text as it goes on: read by itself, tokenizers such as Llama 2's take its first space away."""
    before, whole, alone = (
        str(theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (asked, asked + answer, answer)
    )
    return whole[len(before) :] if whole.startswith(before) else alone
