"""A teacher with another tokenizer, chat template or end token than its student.

Prompts are rendered in the teacher's own format, since a model answers badly (and silently so) in the format of another one.
Its answers are converted as text.
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

ENDLESS = 1 << 30  # tokens, for a model without a maximum context


@dataclass
class OtherTokenizer:
    """Converts prompts to the teacher's tokens, and its answers to the student's.

    Args:
        ours: the student's tokenizer.
        theirs: the teacher's.
        section: the recipe's `data`.
        reach: the teacher's context, in tokens.
        line: a description of the difference.
    """

    ours: Any
    theirs: Any
    section: Data
    reach: int
    line: str

    @classmethod
    def detect(
        cls, ours: Any, theirs: Any, words: int, renderer: Any, section: Data, context: int | None
    ) -> OtherTokenizer | None:
        """The conversion that is needed; None if the teacher can read the student's ids.

        Args:
            words: the number of token ids that the teacher knows.
            renderer: of the student's examples.
        """
        from hfstrat.strategies.distill.teacher import first_difference

        found, form = first_difference(ours.get_vocab(), theirs.get_vocab(), words), Renderer(theirs, "auto")
        own = (form.template, theirs.chat_template if form.template == "chat" else "", theirs.eos_token_id)
        if not found and own == (renderer.template, ours.chat_template if own[0] == "chat" else "", ours.eos_token_id):
            return None
        said = f"has another tokenizer ({found})" if found else "has another format"
        how = "its own chat template" if form.template == "chat" else "the plain template, since it has no chat template"
        return cls(
            ours, theirs, section, context or ENDLESS, f"{said}: its prompts use {how}, and its answers are converted as text"
        )

    def prompts(self, rows: Any, first: np.ndarray, prompts: list[list[int]]) -> list[list[int]]:
        """The teacher's ids of each prompt: the same turns of the same example in its own format, or the text of the prompt if
        the example was split into pieces without such a turn.

        Args:
            rows: the student's training examples.
            first: the indices of the distinct ones, in the order of the source.
            prompts: their ids before the last answer.

        Raises:
            UserError: a prompt is longer than the teacher's context, or its template cannot render an example.
        """
        theirs, numbers = self._turns(), [int(number) for number in np.asarray(rows["row"])[first]]
        answers = [len(answer_starts(rows[int(place)]["labels"])) for place in first]
        pieces, total, spoken = Counter(numbers), Counter[int](), Counter[int]()
        for number, count in zip(numbers, answers, strict=True):
            total[number] += count
        found = []
        for number, count, prompt in zip(numbers, answers, prompts, strict=True):
            spoken[number] += count
            turns = theirs(number)
            same = total[number] == len(turns) or (pieces[number] == 1 and count < len(turns))  # else it was split into pieces
            found.append(turns[spoken[number] - 1] if same else retokenize_prompt(prompt, self.ours, self.theirs))
        longest = max(map(len, found))
        if longest >= self.reach:
            raise UserError(
                f"strategy.teacher: its context is {self.reach:,} tokens, and a prompt has {longest:,} tokens in its format; "
                "use another teacher, or shorter prompts"
            )
        return found

    def _turns(self) -> Callable[[int], list[list[int]]]:
        """A function from the number of a source row to the ids before each of its answers."""
        from hfstrat.data.prepare import prepare_untruncated

        try:
            made = prepare_untruncated(self.section, self.theirs)
        except UserError as error:
            raise UserError(f"strategy.teacher: the data cannot be rendered in the format of the teacher: {error}") from error
        table, all_numbers = made.dataset(), made.take(made.row)  # in ascending order

        def turns(number: int) -> list[list[int]]:
            begin, end = np.searchsorted(all_numbers, [number, number + 1])
            pieces = [table[place] for place in range(int(begin), int(end))]
            return [piece["input_ids"][:begin] for piece in pieces for begin in answer_starts(piece["labels"])]

        return turns

    def answers(self, answers: list[list[int]], asked: list[list[int]], prompts: list[list[int]]) -> list[list[int]]:
        return retokenize_answers(answers, asked, prompts, SegmentTokenizer(self.ours), self.theirs)


def answer_starts(labels: Any) -> list[int]:
    """The positions where answers begin: the first of each span of supervised labels."""
    carries = np.asarray(labels) != IGNORED
    return [int(place) for place in np.flatnonzero(carries & ~np.concatenate([[False], carries[:-1]]))]


def prompt_ids(row: dict[str, Any], key: str = "seq_kd: true") -> list[int]:
    """The ids before the last answer of an example. Raises UserError if there are none."""
    carries, begins = np.asarray(row["labels"]) != IGNORED, answer_starts(row["labels"])
    if not begins or begins[-1] == 0 or (carries[1:].all() and len(carries) > 1):
        raise UserError(f"strategy.{key}: an example has no prompt to answer; expected examples with prompts")
    return [int(one) for one in row["input_ids"][: begins[-1]]]


def retokenize_prompt(prompt: list[int], ours: Any, theirs: Any) -> list[int]:
    """A prompt's text in the teacher's tokens."""
    begin = int(prompt[0] == ours.bos_token_id)  # the teacher adds its own
    ids: list[int] = theirs(ours.decode(prompt[begin:], clean_up_tokenization_spaces=False))["input_ids"]
    return ids[:-1] if ids[1:] and ids[-1] == theirs.eos_token_id else ids


def retokenize_answers(
    answers: list[list[int]], asked: list[list[int]], prompts: list[list[int]], ours: SegmentTokenizer, theirs: Any
) -> list[list[int]]:
    """The teacher's answers in the student's tokens, as they continue the student's `prompts`, with the student's end token
    if they are complete."""
    tokenizer = ours.tokenizer
    texts = [_answer_text(answer, before, theirs) for answer, before in zip(answers, asked, strict=True)]
    before = [str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))[-TAIL:] for prompt in prompts]
    ended = [answer[-1:] == [theirs.eos_token_id] for answer in answers]
    made = zip(ours.ids(texts, before), ended, strict=True)
    return [ids + [tokenizer.eos_token_id] if end or not ids else ids for ids, end in made]


def _answer_text(answer: list[int], asked: list[int], theirs: Any) -> str:
    """The text of an answer after its prompt: decoded alone, tokenizers such as Llama 2's remove its first space."""
    before, whole, alone = (
        str(theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (asked, asked + answer, answer)
    )
    return whole[len(before) :] if whole.startswith(before) else alone
