"""Row formats: how a row of a file becomes an example, which is a conversation or a plain text.

Conversations are accepted as OpenAI and ShareGPT write them and with content as a list of parts. All become plain messages:
`role` and `content`, and where present `tool_calls` (`{"type": "function", "function": {"name", "arguments"}}` with
`arguments` as an object) and `weight` 0 (a turn without loss).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hfstrat.data.columns import Reading, class_columns, columns_of, propose, rename
from hfstrat.data.values import (
    REPLACED,
    BadRow,
    Row,
    optional_text,
    parse_json,
    parse_list,
    require_text,
    shown,
    text_or_json,
    valid,
)
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

Message = dict[str, Any]
HASH_BYTES = 8
PROMPT_CHARACTERS = 60  # of a plain text, shown as its prompt
ROLES = {  # ShareGPT's speakers and variants
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "function_call", "tool_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "function"), "tool"),
}
CALLS = ("function_call", "tool_call")
WEIGHTS = ("weight", "loss_weight")


class Example(NamedTuple):
    """Either `messages`, to be rendered by a template, or a `text`, which is trained on as it is.

    `prompt_turns`: how many messages form the prompt; 0 for a conversation without a separate one. `changes`: by reading it.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Message] | None = None
    prompt_turns: int = 0
    changes: tuple[str, ...] = ()

    @property
    def has_target(self) -> bool:
        """Whether there is anything to train on: a text, or an answer that is not blank."""
        answers = [m for m in self.messages or [] if m["role"] == "assistant"]
        return bool((self.text or "").strip()) or any(m["content"].strip() or m.get("tool_calls") for m in answers)

    @property
    def content(self) -> str:
        """All text of the example without the markup of a template; equal for duplicates."""
        turns = (
            f"{m['role']} {m['content']} {json.dumps(m['tool_calls']) if 'tool_calls' in m else ''}"
            for m in self.messages or []
        )
        return self.text if self.text is not None else "\n".join(turns)

    @property
    def prompt(self) -> Any:
        """What precedes the last assistant turn, as `Renderer.prompt_ids` takes it; of a plain text the first words."""
        if self.text is not None:
            return _first_words(self.text) or None
        messages = self.messages or []
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if not messages[:last]:
            return None
        return {"messages": messages[:last], "tools": self.tools} if self.tools else messages[:last]

    @property
    def answer(self) -> str:
        """The last assistant turn; of a plain text what follows the first words."""
        if self.text is not None:
            return self.text[len(_first_words(self.text)) :][: 4 * PROMPT_CHARACTERS]
        answers: list[Any] = [m["content"] for m in self.messages or [] if m["role"] == "assistant"]
        return str(answers[-1]) if answers else ""


def _first_words(text: str) -> str:
    return text[:PROMPT_CHARACTERS].rpartition(" ")[0] if len(text) > PROMPT_CHARACTERS else text.rpartition(" ")[0]


def hash_text(text: str) -> int:
    """A 64-bit hash of a text, ignoring case and white space: rows with equal hashes are duplicates."""
    normalized = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalized.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "little", signed=True)


def parse_messages(value: Any, column: str, role: str) -> list[Message]:
    """A text as one message of `role`, or a list of messages in any of the accepted spellings.

    Raises:
        BadRow: anything else, or messages with an unknown role or without text.
    """
    if isinstance(value, list):
        return [_parse_message(entry, column) for entry in value]
    return [{"role": role, "content": require_text(value, column)}]


def _parse_message(entry: Any, column: str) -> Message:
    if not isinstance(entry, Mapping):
        raise BadRow(f"'{column}' contains an entry that is not a message with 'role' and 'content'")
    if "from" in entry:
        return _parse_sharegpt(entry, column)
    if not isinstance(entry.get("role"), str):
        raise BadRow(f"'{column}' contains an entry that is not a message with 'role' and 'content'")
    message = _join_parts(entry, column)
    calls = [_parse_call(call, column) for call in entry.get("tool_calls") or []] + message.pop("calls", [])
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if entry.get(name):
            message[name] = entry[name]
    return message | _parse_weight(entry, column)


def _join_parts(entry: Mapping[str, Any], column: str) -> Message:
    """Role and content; a list of parts is joined, with reasoning in <think> tags, which most templates parse."""
    content, calls, reasoning = entry.get("content"), [], entry.get("reasoning_content") or ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            value = next((part[name] for name in ("text", "value") if isinstance(part.get(name), str)), None) if kind else None
            if value is None or kind not in ("text", "reasoning", "tool_call"):
                raise BadRow(
                    f"'{column}' contains a message with a part of type {kind!r}, expected text, reasoning or tool_call"
                )
            if kind == "tool_call":
                calls += parse_calls(value)
            elif kind == "reasoning":
                reasoning += value
            else:
                texts.append(value)
        content = "".join(texts)
    if content is None and (entry.get("tool_calls") or calls):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"'{column}' contains a message whose content is not text")
    if reasoning:
        content = f"<think>\n{reasoning}\n</think>\n\n{content}"
    joined: Message = {"role": entry["role"], "content": content}
    return joined | ({"calls": calls} if calls else {})


def _parse_sharegpt(entry: Mapping[str, Any], column: str) -> Message:
    speaker = str(entry["from"])
    if speaker not in ROLES:
        raise BadRow(f"'{column}' contains a message from {speaker!r}, expected one of {', '.join(ROLES)}")
    text = require_text(entry.get("value"), f"{column}.value")
    message: Message = {"role": ROLES[speaker], "content": text}
    if speaker in CALLS and (calls := parse_calls(text)):
        message |= {"content": "", "tool_calls": calls}
    return message | _parse_weight(entry, column)


def _parse_weight(entry: Mapping[str, Any], column: str) -> Message:
    """`weight: 0`, as in OpenAI's format, excludes an assistant turn from the loss."""
    weight = next((entry[name] for name in WEIGHTS if entry.get(name) is not None), 1)
    if weight not in (0, 1):
        raise BadRow(f"'{column}' contains a message of weight {weight}; expected 1 (trained) or 0 (not trained)")
    return {"weight": 0} if weight == 0 and entry.get("role") == "assistant" else {}


def parse_calls(text: str) -> list[Message]:
    """Tool calls written as JSON, one object or a list; empty if the text is anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return []
    found = found if isinstance(found, list) else [found]
    are_calls = all(isinstance(call, dict) and ("name" in call or "function" in call) for call in found)
    return [_parse_call(call, "tool_calls") for call in found] if are_calls else []


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


def parse_tools(value: Any) -> list[Message] | None:
    """Tool definitions, given as a list or as JSON text; each as `{"type": "function", "function": ...}`.

    Raises:
        BadRow: invalid JSON, or not a list of objects.
    """
    if not value:
        return None
    try:
        found = parse_json(value) if isinstance(value, str) else value
        found = [
            parse_json(tool) if isinstance(tool, str) else tool for tool in (found if isinstance(found, list) else [found])
        ]
    except ValueError as error:
        raise BadRow(f"'tools' is not valid JSON: {error}") from None
    if not all(isinstance(tool, Mapping) for tool in found):
        raise BadRow("'tools' is not a list of tool definitions")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in found] or None


def text(row: Row) -> Example:
    return Example(text=require_text(row["text"], "text"))


def prompt_completion(row: Row) -> Example:
    prompt = with_system(parse_messages(row["prompt"], "prompt", "user"), row)
    messages = prompt + parse_messages(row["completion"], "completion", "assistant")
    return Example(messages, tools=parse_tools(row.get("tools")), prompt_turns=len(prompt))


def alpaca(row: Row) -> Example:
    extra = text_or_json(row.get("input"), "input")
    prompt = require_text(row["instruction"], "instruction") + (f"\n\n{extra}" if extra else "")
    messages = with_system([*parse_history(row.get("history")), {"role": "user", "content": prompt}], row)
    completion: Message = {"role": "assistant", "content": require_text(row["output"], "output")}
    return Example([*messages, completion], tools=parse_tools(row.get("tools")), prompt_turns=len(messages))


def parse_history(value: Any) -> list[Message]:
    """Earlier turns: a list of pairs of a question and its answer; none for null and empty text.

    Raises:
        BadRow: anything else.
    """
    messages: list[Message] = []
    for pair in parse_list(value, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(turn, str) for turn in pair):
            raise BadRow(f"'history' has {shown(pair)}, expected pairs of texts: [[question, answer], ...]")
        question, answer = pair
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """The messages after the text of the column `system`, unless they begin with a system message."""
    system = optional_text(row.get("system"), "system")
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def conversation(row: Row, column: str) -> Example:
    if not isinstance(row[column], list) or not row[column]:
        raise BadRow(f"'{column}' is not a list with at least one message")
    turns = parse_messages(row[column], column, "user")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow(f"'{column}' has no assistant turn, so there is nothing to train on")
    return Example(with_system(turns, row), tools=parse_tools(row.get("tools")))


class Format(NamedTuple):
    """The columns that a format needs, its parser of rows by our names, and the columns that it also reads."""

    needed: frozenset[str]
    parse: Callable[[Row], Example]
    optional: frozenset[str] = frozenset()


_AROUND = frozenset({"system", "tools"})
FORMATS = {
    "messages": Format(frozenset({"messages"}), partial(conversation, column="messages"), _AROUND),
    "conversations": Format(frozenset({"conversations"}), partial(conversation, column="conversations"), _AROUND),
    "prompt-completion": Format(frozenset({"prompt", "completion"}), prompt_completion, _AROUND),
    "alpaca": Format(frozenset({"instruction", "output"}), alpaca, _AROUND | {"input", "history"}),
    "text": Format(frozenset({"text"}), text),
}
LABELED = [  # columns that identify rows of a classification
    {one, two, label}
    for one, two in (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text", "text_pair"), ("text_a", "text_b"))
    for label in ("label", "labels")
] + [{one, label} for one in ("text", "sentence") for label in ("label", "labels")]
UNSUPPORTED = (  # formats that are recognized but not supported yet: the name, and the columns that identify it
    ("preference pairs", [{"chosen", "rejected"}, {"chosen_messages", "rejected_messages"}]),
    ("preference labels (KTO)", [{"messages", "label"}, {"prompt", "completion", "label"}]),
    ("multiple choice questions", [{"choices", "gold"}, {"context_options", "gold"}, {"choices", "answer"}]),
)
ALIASES = {  # other names of a prompt and its completion, for the proposed mapping
    "prompt": ("question", "query", "context", "instruction", "input", "user", "source", "problem"),
    "completion": ("answer", "response", "continuation", "output", "chosen", "target", "assistant", "solution"),
}
OUR_COLUMNS = sorted(frozenset[str]().union(*(each.needed | each.optional for each in FORMATS.values())))


def choose_format(name: str, columns: Iterable[str], source: str) -> str:
    """The format to read rows by: the requested one, or the first whose columns are all present.

    Raises:
        UserError: the columns do not fit; the message lists them and shows how to map them.
    """
    given = list(columns)
    if name in ("text-classification", "regression"):
        raise UserError(f"data.format: {name} needs `task: {name}` at the top of the recipe")
    if name == "auto":
        _refuse_unsupported(given, source)
        for candidate, each in FORMATS.items():
            if each.needed <= set(given):
                return candidate
        known = "; ".join(f"{' + '.join(sorted(each.needed, reverse=True))} ({key})" for key, each in FORMATS.items())
        raise UserError(
            f"{source}: no known format has the columns {', '.join(given) or '(none)'}; expected {known}. {_proposal(given)}"
        )
    missing = sorted(FORMATS[name].needed - set(given))
    if missing:
        raise UserError(
            f"data.format: {source}: format {name} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"the data have {', '.join(given) or 'none'}. Map them with data.columns, or choose another format"
        )
    return name


def _refuse_unsupported(given: list[str], source: str) -> None:
    columns = f"{source}: rows with the columns {', '.join(given)}"
    if any(shape <= set(given) for shape in LABELED):
        text_only = "; `format: text` would train on the text alone" if "text" in given else ""
        raise UserError(
            f"{columns} are texts with labels; set `task: text-classification` at the top of the recipe to train a classifier"
            f"{text_only}"
        )
    for name, shapes in UNSUPPORTED:
        if any(shape <= set(given) for shape in shapes):
            fits = next((known for known, each in FORMATS.items() if each.needed <= set(given)), None)
            alone = f"; `format: {fits}` would train on {' and '.join(sorted(FORMATS[fits].needed))} alone" if fits else ""
            raise UserError(f"{columns} are {name}, which are not supported yet{alone}")


def _proposal(given: list[str]) -> str:
    """How to map these columns: as one that any format needs alone, else as prompts with completions."""
    near = {name.casefold().strip(): name for name in reversed(given)}
    if single := next((name for name in ("messages", "conversations", "text") if name in near), None):
        return propose([near[single]], {single: ()})
    return propose(given, ALIASES)


@dataclass
class RowFormat(Reading):
    """How the rows of one source are read: the format, and the column of the data for each of our columns."""

    kind: str = ""

    @classmethod
    def detect(
        cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str], features: Mapping[str, list[str]] | None = None
    ) -> RowFormat:
        """The format of a source, detected from its first rows.

        Raises:
            UserError: a mapped column is missing, or the columns fit no format.
        """
        names = rename(columns_of(head), mapping, source)
        kind = choose_format(wanted, names.values(), source)
        reads = FORMATS[kind].needed | FORMATS[kind].optional
        remarks = class_columns(head, names) if kind == "text" and wanted == "auto" else []
        return cls(source, names, kind, reads=reads, remarks=remarks)

    def example(self, row: Row) -> Example:
        """The row as an example. Raises BadRow if it does not fit the format."""
        made = FORMATS[self.kind].parse(self.values(row))
        parts = [made.messages, made.text, made.tools]
        if (clean := valid(parts)) is parts:
            return made
        return made._replace(messages=clean[0], text=clean[1], tools=clean[2], changes=(REPLACED,))

    def resolve(self, train_on: str) -> str:
        """The value of `data.train_on` for these rows, with `auto` resolved."""
        if train_on != "auto":
            return train_on
        return {"text": "all", "messages": "assistant", "conversations": "assistant"}.get(self.kind, "completions")


def check_train_on(data: Data, row_format: RowFormat) -> None:
    """Raises UserError if `train_on` names turns and the rows have none."""
    if row_format.kind == "text" and data.train_on in ("completions", "assistant"):
        raise UserError(
            f"data.train_on: {data.train_on}: {row_format.source} is plain text, which has no turns; set all, or "
            "auto for data of both kinds"
        )
