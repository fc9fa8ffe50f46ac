"""Chat templates: the tokenizer's, a file's, and what stands in where a template does not know tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfstrat.data.turns import Message
from hfstrat.errors import UserError

NAMES = ("auto", "chat", "plain")
PROBE = "hfstrat_probe"
_FUNCTION = {"name": PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
_QUESTION = {"role": "user", "content": "a"}
_CALL = {"type": "function", "function": {"name": PROBE, "arguments": {}}}


def check_template(template: str) -> str | None:
    """The text of a template file, or None for one of the names.

    Raises:
        UserError: no such file, or no jinja.
    """
    if template in NAMES:
        return None
    path = Path(template).expanduser()
    if not path.is_file():
        raise UserError(f"data.template: {template}: no such file; expected {', '.join(NAMES)} or a .jinja file")
    text = path.read_text(encoding="utf-8")
    import jinja2

    try:
        if "generation" not in text:  # a tag of transformers, which jinja alone does not know
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {template}:{error.lineno}: this is no valid jinja: {error.message}") from None
    return text


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template writes both the definitions of tools and the calls: asked, not guessed from its text."""
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    tools = [{"type": "function", "function": _FUNCTION}]
    try:
        defined = tokenizer.apply_chat_template([_QUESTION], tools=tools, tokenize=False)
        called = tokenizer.apply_chat_template([_QUESTION, answer], tokenize=False)
    except Exception:  # jinja raises many kinds, templates their own
        return False
    return PROBE in defined and PROBE in called


def tools_as_text(messages: Sequence[Message], tools: list[Message] | None) -> list[Message]:
    """The same conversation for a template that does not know tools, in the form that Hermes and Qwen models use.

    Definitions go into the system message, a call into the assistant's text, a result into a user's turn.
    """
    talk = [_said(message) for message in messages]
    if not tools:
        return talk
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = f"You may call these tools, by a <tool_call> with a name and arguments in JSON:\n<tools>\n{listed}\n</tools>"
    if talk and talk[0]["role"] == "system":
        return [{**talk[0], "content": f"{talk[0]['content']}\n\n{text}"}, *talk[1:]]
    return [{"role": "system", "content": text}, *talk]


def _said(message: Message) -> Message:
    plain = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id", "name")}
    if message["role"] == "tool":
        return {**plain, "role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {**plain, "content": "\n".join(filter(None, [message["content"], *written]))}
