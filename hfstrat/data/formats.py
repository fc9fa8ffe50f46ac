"""One function per row format: a row becomes a conversation, or a text that is trained on whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from hfstrat.errors import UserError

Message = dict[str, Any]


class Example(NamedTuple):
    """Either `messages` to be rendered by a template, or a `text` trained on as it is."""

    messages: list[Message] | None = None
    text: str | None = None


class BadRow(ValueError):
    """A row that its format cannot read; the message says what was given."""


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {type(value).__name__ if value is not None else 'null'}, expected text")
    return value


def _turns(value: Any, column: str, role: str) -> list[Message]:
    """A prompt or completion is a text, or already a list of messages (TRL's conversational form)."""
    if isinstance(value, list):
        for message in value:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise BadRow(f"'{column}' holds an entry that is no message with 'role' and 'content'")
            if not isinstance(message.get("content"), str):
                raise BadRow(f"'{column}' holds a message whose content is not text")
        return [{"role": message["role"], "content": message["content"]} for message in value]
    return [{"role": role, "content": _text({column: value}, column)}]


def text(row: Mapping[str, Any]) -> Example:
    return Example(text=_text(row, "text"))


def prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt = _turns(row["prompt"], "prompt", "user")
    return Example(messages=prompt + _turns(row["completion"], "completion", "assistant"))


def alpaca(row: Mapping[str, Any]) -> Example:
    extra = row.get("input")
    prompt = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, "output")}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return Example(messages=messages)


def messages(row: Mapping[str, Any]) -> Example:
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise BadRow("'messages' is not a list with at least one message")
    turns = _turns(row["messages"], "messages", "user")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow("'messages' has no assistant turn, so there is nothing to train on")
    return Example(messages=turns)


FORMATS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], Example]]] = {
    "messages": (frozenset({"messages"}), messages),
    "prompt-completion": (frozenset({"prompt", "completion"}), prompt_completion),
    "alpaca": (frozenset({"instruction", "output"}), alpaca),
    "text": (frozenset({"text"}), text),
}


OUR_COLUMNS = sorted({"input", "system"}.union(*(needed for needed, _ in FORMATS.values())))


def rename(columns: Iterable[str], mapping: Mapping[str, str], source: str) -> dict[str, str]:
    """Our name for each column.

    Raises:
        UserError: a mapped column that the data do not have, or two columns that would get the same name.
    """
    columns = list(columns)
    for theirs, ours in mapping.items():
        if theirs not in columns:
            near = get_close_matches(theirs, columns, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            if ours in columns and not near:
                hint = f"; it is written {{their name: our name}}: did you mean {{{ours}: {theirs}}}?"
            raise UserError(f"data.columns: {source} has no column '{theirs}'; it has {', '.join(columns) or 'none'}{hint}")
    names = {column: mapping.get(column, column) for column in columns}
    for ours in mapping.values():
        if len(same := [column for column in columns if names[column] == ours]) > 1:
            raise UserError(
                f"data.columns: {source}: two columns would be called '{ours}': {' and '.join(same)}; "
                "map one of them to another name"
            )
    return names


def choose(name: str, columns: Iterable[str], source: str) -> str:
    """The format to read rows by: the one asked for, or the first whose columns are all there.

    Raises:
        UserError: the columns do not fit; it says which there are and how to map them.
    """
    given = list(columns)
    if name == "auto":
        for candidate, (needed, _) in FORMATS.items():
            if needed <= set(given):
                return candidate
        known = "; ".join(f"{' + '.join(sorted(needed, reverse=True))} ({key})" for key, (needed, _) in FORMATS.items())
        raise UserError(
            f"{source}: no known format has the columns {', '.join(given) or '(none)'}; expected {known}. "
            "Map them, such as `columns: {question: prompt, answer: completion}` under data"
        )
    missing = sorted(FORMATS[name][0] - set(given))
    if missing:
        raise UserError(
            f"data.format: {source}: format {name} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"there are {', '.join(given) or 'none'}. Map them with `columns:` under data, or name another format"
        )
    return name
