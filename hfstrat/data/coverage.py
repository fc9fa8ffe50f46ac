"""Whether all text of a conversation is in its rendering.

A template may leave out a role, a second system message, tools or reasoning. Conversations of one shape (roles, tools,
reasoning) are rendered once more with a word of its own in place of each text: what is missing then is missing in all of them.
The texts themselves are looked up too, since a template may cut them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from hfstrat.data.messages import Message

Texts = Callable[[list[Message], list[Message] | None], list[str]]  # the rows of a conversation as texts
CLOSE = "</think>"
TAGS = re.compile(r"</?think>")
MOST_SHAPES = 10_000  # that are rendered once more; of others only the texts are looked up
SHOWN = 40  # characters of a text that is left out


@dataclass
class Notes:
    """What happened to the conversations of a source, for its statistics. `left_out` and `rewritten` count by kind."""

    left_out: Counter[str] = field(default_factory=Counter)
    rewritten: Counter[str] = field(default_factory=Counter)
    shown: dict[str, str] = field(default_factory=dict)  # the beginning of the first text of a kind that was left out
    blank: int = 0  # answers without text, which have no loss
    skipped: int = 0  # answers that the template cannot render
    unopened: int = 0  # answers that do not begin as the generation prompt ends
    unopened_by: str = ""  # with this text
    without_definitions: int = 0  # conversations whose tools are not rendered

    def lose(self, kind: str, text: str) -> None:
        self.left_out[kind] += 1
        self.shown.setdefault(kind, text.strip()[:SHOWN])


def shape(messages: Sequence[Message], tools: list[Message] | None, more: Hashable) -> Hashable:
    """What a template may decide by; `more` is anything else that the rendering depends on."""
    return tuple([_shape(message) for message in messages]), len(tools or ()), more


def _shape(message: Message) -> Hashable:
    content = message["content"]
    blank = not content or content.isspace()
    if len(message) == 2 and CLOSE not in content:
        return message["role"], blank
    return (
        message["role"],
        blank,
        content.lstrip().startswith("<think>") and _parts_of(content),
        CLOSE in content and _parts_of(content),
        "reasoning_content" in message,
        len(message.get("tool_calls", ())),
        "name" in message,
    )


def _parts_of(content: str) -> tuple[bool, ...]:
    return tuple(bool(part.strip()) for part in TAGS.split(content))


@dataclass(frozen=True)
class Word:
    """A word that stands for a text of the conversation."""

    text: str
    kind: str
    meant: str  # the text that it stands for


class Words:
    """A conversation with a word of its own in place of each text."""

    def __init__(self, messages: Sequence[Message], tools: list[Message] | None) -> None:
        self.words: list[Word] = []
        self.messages = [self._message(message) for message in messages]
        self.tools = [self._tool(tool) for tool in tools] if tools else None

    def _word(self, kind: str, meant: str) -> str:
        self.words.append(Word(f"hfstrat{len(self.words)}w", kind, meant))
        return self.words[-1].text

    def _message(self, message: Message) -> Message:
        made = {**message, "content": self._content(message)}
        if "reasoning_content" in message:
            made["reasoning_content"] = self._word("reasoning", message["reasoning_content"])
        if "tool_calls" in message:
            made["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return made

    def _content(self, message: Message) -> str:
        content, kind = message["content"], f"messages of role {message['role']}"
        if CLOSE not in content:
            return self._word(kind, content) if content.strip() else content
        pieces = re.split(f"({TAGS.pattern})", content)
        made, inside = "", CLOSE in pieces[:2] or "<think>" not in content.partition(CLOSE)[0]
        for piece in pieces:
            inside = piece == "<think>" or (inside and piece != CLOSE)
            blank = not piece.strip() or TAGS.fullmatch(piece)
            spaces = re.match(r"\s*", piece), re.search(r"\s*$", piece)
            around = [found.group() if found else "" for found in spaces]
            made += piece if blank else around[0] + self._word("reasoning" if inside else kind, piece) + around[1]
        return made

    def _call(self, call: Message) -> Message:
        function = call["function"]
        name = self._word("tool calls", function["name"])
        return {**call, "function": {**function, "name": name}}

    def _tool(self, tool: Message) -> Message:
        function = tool["function"] if isinstance(tool["function"], Mapping) else {}
        return {**tool, "function": {**function, "name": self._word("tool definitions", str(function.get("name")))}}


class Coverage:
    """Finds the texts that a template leaves out; one object per template, since it remembers shapes."""

    def __init__(self) -> None:
        self.known: dict[Hashable, list[int]] = {}

    def note(
        self, messages: list[Message], tools: list[Message] | None, rows: list[str], texts: Texts, more: Hashable, notes: Notes
    ) -> None:
        """Add the texts of a conversation that are missing from its rows to the notes."""
        key = shape(messages, tools, more)
        if key not in self.known and len(self.known) < MOST_SHAPES:
            self.known[key] = _missing(messages, tools, texts)
        gone = self.known.get(key, [])
        if gone:
            words = Words(messages, tools).words
            for place in gone:
                notes.lose(words[place].kind, words[place].meant)
            notes.without_definitions += any(words[place].kind == "tool definitions" for place in gone)
            return
        joined = rows[0] if len(rows) == 1 else "\n".join(rows)
        for text in _texts(messages):
            if text not in joined and not _is_in(text.strip(), joined):
                notes.lose("texts, or parts of them", text)


def _missing(messages: list[Message], tools: list[Message] | None, texts: Texts) -> list[int]:
    made = Words(messages, tools)
    try:
        rendered = texts(made.messages, made.tools)
    except Exception:  # the template reads the texts: then only they can be looked up
        return []
    return [place for place, word in enumerate(made.words) if not any(word.text in row for row in rendered)]


def _texts(messages: list[Message]) -> list[str]:
    found = []
    for message in messages:
        content = message["content"]
        found += [content] if CLOSE not in content else TAGS.split(content)
        found += [message["reasoning_content"]] if "reasoning_content" in message else []
    return found


def _is_in(text: str, row: str) -> bool:
    """Whether a text is in a row; templates trim texts, or write them as JSON."""
    if text in row or json.dumps(text, ensure_ascii=False)[1:-1] in row:
        return True
    return all(line.strip() in row for line in text.splitlines())
