"""Conversations as they are found in files (OpenAI, ShareGPT, lists of parts), made into plain messages.

A message has `role` and `content`, and where there are any `tool_calls` (`{"type": "function", "function": {"name",
"arguments"}}` with arguments as an object) and `weight` 0 (a turn that is not to be learnt).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
SPEAKERS = {  # ShareGPT's names and their likes
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "function_call", "tool_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "function"), "tool"),
}
CALLS = ("function_call", "tool_call")
WEIGHTS = ("weight", "loss_weight")


class BadRow(ValueError):
    """A row that its format cannot read; the message says what was given."""


def text_of(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {type(value).__name__ if value is not None else 'null'}, expected text")
    return value


def turns(value: Any, column: str, role: str) -> list[Message]:
    """A text as one message of `role`, or a list of messages in any of the known spellings.

    Raises:
        BadRow: anything else, and messages without a known role or without text.
    """
    if isinstance(value, list):
        return [_message(entry, column) for entry in value]
    return [{"role": role, "content": text_of(value, column)}]


def _message(entry: Any, column: str) -> Message:
    if not isinstance(entry, Mapping):
        raise BadRow(f"'{column}' holds an entry that is no message with 'role' and 'content'")
    if "from" in entry:
        return _sharegpt(entry, column)
    if not isinstance(entry.get("role"), str):
        raise BadRow(f"'{column}' holds an entry that is no message with 'role' and 'content'")
    message = _with_parts(entry, column)
    calls = [_call(call, column) for call in entry.get("tool_calls") or []] + message.pop("calls", [])
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if entry.get(name):
            message[name] = entry[name]
    return message | _weight(entry, column)


def _with_parts(entry: Mapping[str, Any], column: str) -> Message:
    """Role and content; content that is a list of parts is joined, with reasoning in <think> as most templates read it."""
    content, calls, thought = entry.get("content"), [], entry.get("reasoning_content") or ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            value = next((part[name] for name in ("text", "value") if isinstance(part.get(name), str)), None) if kind else None
            if value is None or kind not in ("text", "reasoning", "tool_call"):
                raise BadRow(f"'{column}' holds a message with a part of type {kind!r}, expected text, reasoning or tool_call")
            if kind == "tool_call":
                calls += calls_of(value)
            elif kind == "reasoning":
                thought += value
            else:
                texts.append(value)
        content = "".join(texts)
    if content is None and (entry.get("tool_calls") or calls):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"'{column}' holds a message whose content is not text")
    made: Message = {"role": entry["role"], "content": f"<think>\n{thought}\n</think>\n\n{content}" if thought else content}
    return made | ({"calls": calls} if calls else {})


def _sharegpt(entry: Mapping[str, Any], column: str) -> Message:
    speaker = str(entry["from"])
    if speaker not in SPEAKERS:
        raise BadRow(f"'{column}' holds a message from {speaker!r}, expected one of {', '.join(SPEAKERS)}")
    said = text_of(entry.get("value"), f"{column}.value")
    message: Message = {"role": SPEAKERS[speaker], "content": said}
    if speaker in CALLS and (calls := calls_of(said)):
        message |= {"content": "", "tool_calls": calls}
    return message | _weight(entry, column)


def _weight(entry: Mapping[str, Any], column: str) -> Message:
    """`weight: 0`, as OpenAI has it, keeps a turn out of the loss."""
    given = next((entry[name] for name in WEIGHTS if entry.get(name) is not None), 1)
    if given not in (0, 1):
        raise BadRow(f"'{column}' holds a message of weight {given}; a turn is learnt (1) or not (0)")
    return {"weight": 0} if given == 0 and entry.get("role") == "assistant" else {}


def calls_of(text: str) -> list[Message]:
    """Calls written as JSON: one object or a list of them; empty where it is something else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return []
    found = found if isinstance(found, list) else [found]
    well = all(isinstance(call, dict) and ("name" in call or "function" in call) for call in found)
    return [_call(call, "tool_calls") for call in found] if well else []


def _call(call: Any, column: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"'{column}' holds a tool call without a function's name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # OpenAI writes JSON in a text; templates want the object
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {"arguments": arguments}
    made: Message = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if call.get("id") else {})


def tools_of(value: Any) -> list[Message] | None:
    """Definitions of tools: a list, or one as JSON in a text; each as `{"type": "function", "function": ...}`.

    Raises:
        BadRow: no JSON, or no list of objects.
    """
    if not value:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise BadRow(f"'tools' is no valid JSON: {error.msg}") from None
    found = [json.loads(tool) if isinstance(tool, str) else tool for tool in found] if isinstance(found, list) else [found]
    if not all(isinstance(tool, Mapping) for tool in found):
        raise BadRow("'tools' is no list of tool definitions")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in found] or None
