"""Messages of a conversation, read from the spellings that data sets use.

All become `role` and `content`, and where present `reasoning_content`, `tool_calls` (`{"type": "function", "function": {"name",
"arguments"}}` with `arguments` as an object), `tool_call_id`, `name` and `weight` 0 (a turn without loss). Read are messages as
OpenAI, ShareGPT and Anthropic write them, content as a list of parts, and OpenAI's older `function_call` and role `function`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hfstrat.data.values import BadRow, parse_json, require_text

Message = dict[str, Any]
ROLES = {  # ShareGPT's speakers and variants
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "function_call", "tool_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "function"), "tool"),
}
CALLS = ("function_call", "tool_call")
WEIGHTS = ("weight", "loss_weight")
REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")  # OpenRouter and vLLM, gpt-oss and Anthropic
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking", "reasoning.text", "reasoning.summary")


def parse_messages(value: Any, column: str, role: str) -> list[Message]:
    """A text as one message of `role`, or a list of messages in any of the accepted spellings.

    Raises:
        BadRow: anything else, or messages with an unknown role or without text.
    """
    if isinstance(value, list):
        return [_parse_message(entry, column) for entry in value]
    return [{"role": role, "content": require_text(value, column)}]


def with_reasoning(message: Message) -> str:
    """The content of a message after its reasoning in <think> tags, which most templates parse."""
    content, reasoning = message["content"], message.get("reasoning_content")
    return f"<think>\n{reasoning}\n</think>\n\n{content}" if reasoning else str(content)


def is_blank(message: Message) -> bool:
    """Whether a message has neither text nor calls."""
    return not (message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))


def _parse_message(entry: Any, column: str) -> Message:
    if not isinstance(entry, Mapping):
        raise BadRow(f"'{column}' contains an entry that is not a message with 'role' and 'content'")
    if "from" in entry:
        return _parse_sharegpt(entry, column)
    if not isinstance(entry.get("role"), str):
        raise BadRow(f"'{column}' contains an entry that is not a message with 'role' and 'content'")
    given = entry["role"].lower()
    message, parts = _join_parts(entry, column)
    message["role"] = ROLES.get(given, entry["role"])
    calls = _parse_calls(entry.get("tool_calls"), column) + parts
    if entry.get("function_call"):  # OpenAI's older form: one call, and its result in the role `function`
        calls.append(_parse_call(entry["function_call"], column))
    if given in CALLS and (written := parse_calls(message["content"])):
        message["content"], calls = "", calls + written
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if entry.get(name):
            message[name] = entry[name]
    return message | _parse_weight(entry, message["role"], column)


def _join_parts(entry: Mapping[str, Any], column: str) -> tuple[Message, list[Message]]:
    """Content and reasoning, each as one text, and the calls among the parts of the content."""
    content, reasoning, calls = entry.get("content"), _reasoning(entry, column), list[Message]()
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
            if kind == "tool_use":
                calls.append(_parse_call({**part, "arguments": part.get("input")}, column))
                continue
            value = part if isinstance(part, str) else _part_text(part)
            if value is None or kind not in (*TEXT_PARTS, *REASONING_PARTS, "tool_call"):
                raise BadRow(
                    f"'{column}' contains a message with a part of type {kind!r}, expected text, reasoning or tool_call"
                )
            if kind == "tool_call":
                calls += parse_calls(value)
            elif kind in REASONING_PARTS:
                reasoning += value
            else:
                texts.append(value)
        content = "".join(texts)
    if content is None and (entry.get("tool_calls") or entry.get("function_call") or calls or reasoning):
        content = ""
    if not isinstance(content, str):
        found = "null" if content is None else type(content).__name__
        others = ", ".join(name for name, value in entry.items() if value and name not in ("role", "content"))
        raise BadRow(
            f"'{column}' contains a message whose content is not text but {found}" + (f" (it also has {others})" * bool(others))
        )
    joined: Message = {"role": "", "content": content}
    return joined | ({"reasoning_content": reasoning} if reasoning else {}), calls


def _part_text(part: Any) -> str | None:
    names = ("text", "value", "thinking", "reasoning", "summary")
    return next((part[name] for name in names if isinstance(part.get(name), str)), None) if isinstance(part, Mapping) else None


def _reasoning(entry: Mapping[str, Any], column: str) -> str:
    """The reasoning of a message, under the first of its names that has some."""
    name = next((name for name in REASONING if entry.get(name)), None)
    value = entry[name] if name else ""
    if isinstance(value, list):
        texts = [_part_text(part) for part in value]
        value = None if None in texts else "".join(map(str, texts))
    if not isinstance(value, str):
        raise BadRow(f"'{column}' contains a message whose {name} is not text")
    return value


def _parse_sharegpt(entry: Mapping[str, Any], column: str) -> Message:
    speaker = str(entry["from"]).lower()
    if speaker not in ROLES:
        raise BadRow(f"'{column}' contains a message from {entry['from']!r}, expected one of {', '.join(ROLES)}")
    text = require_text(entry.get("value"), f"{column}.value")
    message: Message = {"role": ROLES[speaker], "content": text}
    if speaker in CALLS and (calls := parse_calls(text)):
        message |= {"content": "", "tool_calls": calls}
    if reasoning := _reasoning(entry, column):
        message["reasoning_content"] = reasoning
    return message | _parse_weight(entry, message["role"], column)


def _parse_weight(entry: Mapping[str, Any], role: str, column: str) -> Message:
    """`weight: 0`, as in OpenAI's format, excludes an assistant turn from the loss."""
    weight = next((entry[name] for name in WEIGHTS if entry.get(name) is not None), 1)
    if weight not in (0, 1):
        raise BadRow(f"'{column}' contains a message of weight {weight}; expected 1 (trained) or 0 (not trained)")
    return {"weight": 0} if weight == 0 and role == "assistant" else {}


def parse_calls(text: str) -> list[Message]:
    """Tool calls written as JSON, one object or a list; empty if the text is anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return []
    found = found if isinstance(found, list) else [found]
    are_calls = all(isinstance(call, dict) and ("name" in call or "function" in call) for call in found)
    return [_parse_call(call, "tool_calls") for call in found] if are_calls else []


def _parse_calls(value: Any, column: str) -> list[Message]:
    """The calls of a message, given as a list or as JSON text."""
    found = parse_calls(value) if isinstance(value, str) else value or []
    if not isinstance(found, list) or (value and not found):
        raise BadRow(f"'{column}' contains a message whose tool_calls are not a list of calls")
    return [_parse_call(call, column) for call in found]


def _parse_call(call: Any, column: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"'{column}' contains a tool call without a function name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # OpenAI writes JSON as a string; templates expect the object
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {"arguments": arguments}
    parsed: Message = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return parsed | ({"id": call["id"]} if call.get("id") else {})


def parse_tools(row: Mapping[str, Any]) -> list[Message] | None:
    """Tool definitions of a row, given as a list or as JSON text in `tools` or, as OpenAI once named them, in `functions`; each
    as `{"type": "function", "function": ...}`.

    Raises:
        BadRow: invalid JSON, or not a list of objects.
    """
    name = next((name for name in ("tools", "functions") if row.get(name)), None)
    if not name:
        return None
    value = row[name]
    try:
        found = parse_json(value) if isinstance(value, str) else value
        listed = found if isinstance(found, list) else [found]
        found = [parse_json(tool) if isinstance(tool, str) else tool for tool in listed]
    except ValueError as error:
        raise BadRow(f"'{name}' is not valid JSON: {error}") from None
    if not all(isinstance(tool, Mapping) for tool in found):
        raise BadRow(f"'{name}' is not a list of tool definitions")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in found] or None


def parse_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own arguments of the chat template, as TRL reads them: an object, or JSON text.

    Raises:
        BadRow: anything else.
    """
    value = row.get("chat_template_kwargs")
    if not value:
        return {}
    try:
        found = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(f"'chat_template_kwargs' is not valid JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise BadRow("'chat_template_kwargs' is not an object such as {\"enable_thinking\": false}")
    return {str(name): given for name, given in found.items() if given is not None}  # Arrow fills absent keys with null
