"""Rows of prompts, which a model answers itself: with an answer to compare with, and with columns for functions of one's own.

Read are `prompt` (text or messages), also with `completion` or `answer`, conversations, whose last turn is then the answer, and
Alpaca rows. All columns of a row are kept, since a reward function may take any of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hfstrat.data.columns import Reading, columns_of, propose, rename
from hfstrat.data.formats import with_system
from hfstrat.data.messages import Message, is_blank, parse_messages, parse_template_kwargs, parse_tools, with_reasoning
from hfstrat.data.preferences import prompt_of
from hfstrat.data.values import REPLACED, Row, is_missing, text_or_json, valid
from hfstrat.errors import UserError

FORMAT = "prompts"
GIVEN = "given"  # the column of token rows with what a reward function is given, as JSON
PROMPTS = ("prompt", "messages", "conversations", "instruction")  # a row has one of these
REFERENCES = ("answer", "completion", "solution", "output")  # the answer to compare with, the first one of these
COLUMNS = [*PROMPTS, "input", "history", "system", "tools", "chat_template_kwargs", *REFERENCES]
ALIASES = {"prompt": ("question", "query", "problem", "input", "user", "text")}
EMPTY = "a prompt without text"
NO_ANSWER = "no answer to compare with (a column answer, or a last turn of the assistant)"


class Prompt(NamedTuple):
    """A prompt, and what its answers are scored by.

    Args:
        answer: the text to compare with; None where the row has none.
        is_text: whether the prompt was given as text, and not as messages.
        columns: the values of the row by the names of the data.
    """

    messages: list[Message]
    answer: str | None = None
    is_text: bool = True
    columns: Mapping[str, Any] = {}
    tools: list[Message] | None = None
    template_kwargs: Mapping[str, Any] = {}
    changes: tuple[str, ...] = ()

    @property
    def prompt(self) -> Any:
        """What is answered, as `Renderer.prompt_ids` takes it."""
        given = {"tools": self.tools, "chat_template_kwargs": dict(self.template_kwargs)}
        return {"messages": self.messages, **{name: value for name, value in given.items() if value}}

    @property
    def content(self) -> str:
        """All text of the prompt; equal for duplicates."""
        return "\n\n".join(str(with_reasoning(turn)) for turn in self.messages)

    @property
    def problem(self) -> str:
        """Why it cannot be answered, in words that follow a number of rows; empty if it can."""
        return "" if self.messages and not is_blank(self.messages[-1]) else EMPTY

    @property
    def has_target(self) -> bool:
        """Whether there is something to answer."""
        return not self.problem

    def given(self) -> str:
        """What a reward function is given of the row, as JSON."""
        prompt = self.messages[-1]["content"] if self.is_text and len(self.messages) == 1 else self.messages
        return json.dumps({"prompt": prompt, "answer": self.answer, "columns": dict(self.columns)}, default=str)


@dataclass
class PromptFormat(Reading):
    """How the rows of one source of prompts are read."""

    kind: str = FORMAT

    @classmethod
    def detect(
        cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str], features: Mapping[str, list[str]] | None = None
    ) -> PromptFormat:
        """The format of a source, by its columns.

        Raises:
            UserError: a mapped column is missing, or there is no prompt.
        """
        if wanted != "auto":
            raise UserError(f"data.format: {source}: {wanted}: objective grpo reads the prompts of any rows; remove it")
        names = rename(columns_of(head), mapping, source)
        if not any(name in names.values() for name in PROMPTS):
            raise UserError(
                f"{source}: rows with the columns {', '.join(names) or '(none)'} have no prompt: expected a column "
                f"{', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}. {propose(list(names.values()), ALIASES)}"
            )
        return cls(source, names, reads=frozenset(names.values()))

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """None: reward functions are given all columns."""
        return []

    def example(self, row: Row) -> Prompt:
        """The row as a prompt. Raises BadRow if it does not fit."""
        values = self.values(row)
        messages, answer = prompt_of(values), None
        if messages and messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], str(with_reasoning(messages[-1]))
        column = next((name for name in REFERENCES if not is_missing(values.get(name))), None)
        answer = _answer(values[column], column) if column else answer
        is_text = isinstance(values.get("prompt"), str) or not is_missing(values.get("instruction"))
        is_text &= "system" not in self.names.values()  # the same form for all rows
        given = {theirs: None if is_missing(row.get(theirs)) else row[theirs] for theirs in (*self.names, *row)}
        parts = [with_system(messages, values), answer, parse_tools(values), given]
        clean = valid(parts)
        changes = () if clean is parts else (REPLACED,)
        return Prompt(clean[0], clean[1], is_text, clean[3], clean[2], parse_template_kwargs(values), changes)

    def resolve(self, train_on: str) -> str:
        """Which tokens count: none of the data."""
        return ""


def _answer(value: Any, column: str) -> str:
    """The answer as text; of messages the last one."""
    is_messages = isinstance(value, list) and value and all(isinstance(turn, Mapping) and "content" in turn for turn in value)
    if is_messages:
        return str(with_reasoning(parse_messages(value, column, "assistant")[-1]))
    return text_or_json(value, column)
