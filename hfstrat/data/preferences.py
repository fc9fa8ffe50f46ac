"""Rows of preferences: a prompt with a chosen and a rejected answer, or an answer with a label (desirable or not).

Read are the columns of TRL (`prompt`, `chosen`, `rejected`, also without a prompt, which is then what both conversations begin
with; `prompt`, `completion`, `label`), of LLaMA-Factory (`conversations` or `instruction` and `input` with `chosen` and
`rejected`; `chosen_messages`, `rejected_messages`; `messages`, `label`), as texts, messages, or ShareGPT's messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from hfstrat.data.columns import Reading, columns_of, propose, rename
from hfstrat.data.formats import AROUND, Example, parse_history, with_system
from hfstrat.data.messages import Message, is_blank, parse_messages, parse_template_kwargs, parse_tools, with_reasoning
from hfstrat.data.values import REPLACED, BadRow, Row, is_missing, require_text, text_or_json, valid
from hfstrat.errors import UserError

PAIRS, LABELED = "preference", "unpaired-preference"  # TRL's names of the two kinds of rows
EQUAL = "two equal answers"
BLANK = "an answer without text"
OTHER_PROMPT = "two answers to different prompts"
NO_LABEL = "a label that is neither true nor false"
PROMPT_COLUMNS = ("instruction", "prompt", "conversations", "messages")  # in the order in which they are read
ALIASES = {
    PAIRS: {
        "prompt": ("question", "instruction", "query", "input", "context"),
        "chosen": ("preferred", "accepted", "winner", "better", "positive", "good"),
        "rejected": ("dispreferred", "declined", "loser", "worse", "negative", "bad"),
    },
    LABELED: {
        "prompt": ("question", "instruction", "query", "input", "context"),
        "completion": ("answer", "response", "output", "reply"),
        "label": ("kto_tag", "feedback", "desirable", "thumbs_up", "is_good", "rating"),
    },
}


class Preference(NamedTuple):
    """A prompt and its answers: the chosen and the rejected one, or a single one with a label.

    answers: each a list of messages that begins with the assistant's.
    desirable: the label of a single answer.
    problem: why it cannot be trained on, in words that follow a number of rows; empty if it can.
    images: of the marks in the messages, in order, where the data have images (`image_places.MARK`).
    """

    messages: list[Message]
    answers: tuple[list[Message], ...]
    desirable: bool | None = None
    problem: str = ""
    tools: list[Message] | None = None
    template_kwargs: Mapping[str, Any] = {}
    changes: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()

    def examples(self) -> list[Example]:
        """The prompt with each answer."""
        return [self.with_answer(answer) for answer in self.answers]

    def with_answer(self, answer: list[Message]) -> Example:
        """The prompt with some answer."""
        turns = len(self.messages)
        return Example([*self.messages, *answer], None, self.tools, turns, self.template_kwargs)

    @property
    def has_target(self) -> bool:
        """Whether it can be trained on."""
        return not self.problem

    @property
    def content(self) -> str:
        """All text, without the markup of a template; equal for duplicates."""
        return "\n\n".join(example.content for example in self.examples())

    @property
    def prompt(self) -> Any:
        """What is answered, as `prompt_ids` of the renderer takes it."""
        found = self.examples()[0].prompt if self.answers else None
        if not self.images or found is None:
            return found
        return {**(found if isinstance(found, dict) else {"messages": found}), "images": list(self.images)}

    @property
    def answer(self) -> str:
        """The text of the chosen answer, or of the only one."""
        return str(with_reasoning(self.answers[0][-1])) if self.answers else ""


def prompt_column(row: Mapping[str, Any]) -> str | None:
    """The column that is read as the prompt, the first of `PROMPT_COLUMNS` that has a value."""
    return next((name for name in PROMPT_COLUMNS if not is_missing(row.get(name))), None)


def prompt_of(row: Row) -> list[Message]:
    """The messages before the answers, from whichever columns there are; empty if there are none."""
    if not is_missing(row.get("instruction")):
        extra = text_or_json(row.get("input"), "input")
        text = require_text(row["instruction"], "instruction") + (f"\n\n{extra}" if extra else "")
        return [*parse_history(row.get("history")), {"role": "user", "content": text}]
    column = prompt_column(row)
    return parse_messages(row[column], column, "user") if column else []


def answer_of(value: Any, column: str) -> list[Message]:
    """An answer given as text, as one message or as several."""
    return parse_messages([value] if isinstance(value, Mapping) else value, column, "assistant")


def answer_column(row: Mapping[str, Any], name: str) -> str:
    """The column of an answer: `name`, or `name_messages` where only that has a value."""
    only_messages = is_missing(row.get(name)) and not is_missing(row.get(f"{name}_messages"))
    return f"{name}_messages" if only_messages else name


def _answer_in(row: Row, name: str) -> list[Message]:
    """The answer in the column `name`, or in `name_messages`."""
    found = answer_column(row, name)
    return answer_of(row.get(found), found)


def pair(row: Row) -> Preference:
    """A row with a chosen and a rejected answer. Raises BadRow."""
    chosen, rejected = (_answer_in(row, name) for name in ("chosen", "rejected"))
    prompt, problem = prompt_of(row), ""
    if not chosen or not rejected:
        problem = BLANK
    elif chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        prompt, chosen, rejected, problem = without_prompt(prompt, chosen, rejected)
    elif not prompt:
        raise BadRow("it has no prompt: expected a column prompt, or complete conversations in chosen and rejected")
    if not problem:
        problem = problem_of(chosen) or problem_of(rejected) or (EQUAL if same(chosen, rejected) else "")
    return _around(row, prompt, (chosen, rejected), problem)


def without_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message], str]:
    """The prompt that two conversations begin with, what follows it in each, and the problem if they have different prompts.

    Args:
        prompt: as given in a column of its own, if there is one: both conversations have to contain its last message.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        return prompt, chosen, rejected, EQUAL
    begins = chosen[shared : shared + 1] + rejected[shared : shared + 1]
    if not shared or len(begins) < 2 or any(turn["role"] != "assistant" for turn in begins):
        return prompt, chosen, rejected, OTHER_PROMPT
    if prompt and not any(turn["content"].strip() == prompt[-1]["content"].strip() for turn in chosen[:shared]):
        return prompt, chosen, rejected, OTHER_PROMPT
    if len(prompt) > shared and prompt[-shared:] == chosen[:shared]:  # both repeat the end of the prompt alone
        return prompt, chosen[shared:], rejected[shared:], ""
    return chosen[:shared], chosen[shared:], rejected[shared:], ""


def same(one: list[Message], other: list[Message]) -> bool:
    """Whether two answers have the same text, up to white space around it."""
    texts = ([(turn["role"], with_reasoning(turn).strip(), turn.get("tool_calls")) for turn in each] for each in (one, other))
    return next(texts) == next(texts)


def problem_of(answer: list[Message]) -> str:
    """Why an answer cannot be trained on; empty if it can."""
    return BLANK if not answer or answer[-1]["role"] != "assistant" or is_blank(answer[-1]) else ""


def labeled(row: Row) -> Preference:
    """A row with one answer and its label; of a conversation the last turn is the answer. Raises BadRow."""
    desirable = parse_label(row.get("label"))
    if not is_missing(row.get("completion")):
        prompt, answer = prompt_of(row), answer_of(row["completion"], "completion")
        if answer and answer[0]["role"] != "assistant":  # the complete conversation
            turns = answer if not prompt or answer[: len(prompt)] == prompt else [*prompt, *answer]
            prompt, answer = _last_answer(turns)
    else:
        prompt, answer = _last_answer(prompt_of(row))
    problem = (NO_LABEL if desirable is None else "") or problem_of(answer)
    return _around(row, prompt, (answer,) if answer else (), problem)._replace(desirable=desirable)


def _last_answer(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation up to its last answer, and the rest."""
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return turns[:last], turns[last:]


def parse_label(value: Any) -> bool | None:
    """Whether an answer is desirable, from true, false, 1 or 0, also written as text; None for anything else."""
    text = str(value).strip().lower()
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(text)


def _around(row: Row, prompt: list[Message], answers: tuple[list[Message], ...], problem: str) -> Preference:
    return Preference(with_system(prompt, row), answers, None, problem, parse_tools(row), parse_template_kwargs(row))


PROMPTS = frozenset({*PROMPT_COLUMNS, "input", "history"})


@dataclass
class PreferenceFormat(Reading):
    """How the rows of one source of preferences are read."""

    kind: str = PAIRS
    wanted: ClassVar[str] = PAIRS

    @classmethod
    def detect(
        cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str], features: Mapping[str, list[str]] | None = None
    ) -> PreferenceFormat:
        """The format of a source, by its columns.

        Raises:
            UserError: a mapped column is missing, or the columns are not those of preferences.
        """
        names = rename(columns_of(head), mapping, source)
        given = set(names.values())
        found = next((kind for kind in cls.kinds() if any(shape <= given for shape in SHAPES[kind])), None)
        if wanted not in ("auto", *cls.kinds()):
            raise UserError(f"data.format: {source}: {wanted} has no preferences; set auto, or `objective: sft`")
        if found is None or wanted not in ("auto", found):
            raise UserError(f"{source}: {_expected(cls.kinds(), names)}")
        reads = PROMPTS | AROUND | {"chosen", "rejected", "chosen_messages", "rejected_messages"}
        return cls(source, names, found, reads=reads if found == PAIRS else PROMPTS | AROUND | {"completion", "label"})

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The kinds of rows that can be read, the first one preferred."""
        return (PAIRS,)

    def example(self, row: Row) -> Preference:
        """The row as a preference. Raises BadRow if it does not fit the format."""
        return self.parsed(self.values(row))

    def parsed(self, values: Row) -> Preference:
        """The same from the row's values by our names."""
        made = (pair if self.kind == PAIRS else labeled)(values)
        parts = [made.messages, made.answers, made.tools]
        if (clean := valid(parts)) is parts:
            return made
        return made._replace(messages=clean[0], answers=tuple(clean[1]), tools=clean[2], changes=(REPLACED,))

    def resolve(self, train_on: str) -> str:
        """Which tokens count: those of the answers."""
        return "the answers"


class LabeledFormat(PreferenceFormat):
    """Answers with labels; a pair is read as one desirable and one undesirable answer, as TRL does."""

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        return LABELED, PAIRS


SHAPES: dict[str, tuple[set[str], ...]] = {
    PAIRS: ({"chosen", "rejected"}, {"chosen_messages", "rejected_messages"}),
    LABELED: ({"prompt", "completion", "label"}, {"messages", "label"}, {"conversations", "label"}),
}
WORDS = {
    PAIRS: "prompt, chosen and rejected",
    LABELED: "prompt, completion and label",
}


def _expected(kinds: tuple[str, ...], names: Mapping[str, str]) -> str:
    """What the columns would have to be."""
    columns = ", ".join(names) or "(none)"
    words = " or ".join(WORDS[kind] for kind in kinds)
    return (
        f"rows with the columns {columns} are no preferences: expected {words}, or set `objective: sft`. "
        f"{propose(list(names.values()), ALIASES[kinds[0]])}"
    )
