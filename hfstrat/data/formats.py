"""Row formats: how a row of a file becomes an example, which is a conversation or a plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

from hfstrat.data.messages import BadRow as BadRow
from hfstrat.data.messages import Message as Message
from hfstrat.data.messages import is_blank, parse_messages, parse_template_kwargs, parse_tools, with_reasoning
from hfstrat.data.messages import require_text as require_text
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

Row = dict[str, Any]
HASH_BYTES = 8
PROMPT_CHARACTERS = 60  # of a plain text, shown as its prompt


class Example(NamedTuple):
    """Either `messages`, to be rendered by a template, or a `text`, which is trained on as it is.

    `prompt_turns` is the number of messages that form the prompt; 0 for a conversation without a separate prompt.
    `template_kwargs` are the row's own arguments of the chat template.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Message] | None = None
    prompt_turns: int = 0
    template_kwargs: Mapping[str, Any] = {}

    @property
    def has_target(self) -> bool:
        """Whether there is anything to train on: a text, or an answer that is not blank."""
        answers = [m for m in self.messages or [] if m["role"] == "assistant"]
        return bool((self.text or "").strip()) or not all(map(is_blank, answers))

    @property
    def content(self) -> str:
        """All text of the example without the markup of a template; equal for duplicates."""
        turns = (
            f"{m['role']} {with_reasoning(m)} {json.dumps(m['tool_calls']) if 'tool_calls' in m else ''}"
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
        given = {"tools": self.tools, "chat_template_kwargs": dict(self.template_kwargs)}
        more = {name: value for name, value in given.items() if value}
        return {"messages": messages[:last], **more} if more else messages[:last]

    @property
    def answer(self) -> str:
        """The last assistant turn; of a plain text what follows the first words."""
        if self.text is not None:
            return self.text[len(_first_words(self.text)) :][: 4 * PROMPT_CHARACTERS]
        answers: list[Any] = [with_reasoning(m) for m in self.messages or [] if m["role"] == "assistant"]
        return str(answers[-1]) if answers else ""


def _first_words(text: str) -> str:
    return text[:PROMPT_CHARACTERS].rpartition(" ")[0] if len(text) > PROMPT_CHARACTERS else text.rpartition(" ")[0]


def hash_text(text: str) -> int:
    """A 64-bit hash of a text, ignoring case and white space: rows with equal hashes are duplicates."""
    normalized = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalized.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "little", signed=True)


def text(row: Row) -> Example:
    return Example(text=require_text(row["text"], "text"))


def prompt_completion(row: Row) -> Example:
    prompt = parse_messages(row["prompt"], "prompt", "user")
    messages = prompt + parse_messages(row["completion"], "completion", "assistant")
    return Example(messages, tools=parse_tools(row), prompt_turns=len(prompt), template_kwargs=parse_template_kwargs(row))


def alpaca(row: Row) -> Example:
    extra = row.get("input")
    prompt = require_text(row["instruction"], "instruction") + (f"\n\n{extra}" if extra else "")
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": require_text(row["system"], "system")})
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt})
    completion = parse_messages(require_text(row["output"], "output"), "output", "assistant")
    return Example(messages + completion, prompt_turns=len(messages))


def conversation(row: Row, column: str) -> Example:
    if not isinstance(row[column], list) or not row[column]:
        raise BadRow(f"'{column}' is not a list with at least one message")
    turns = parse_messages(row[column], column, "user")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow(f"'{column}' has no assistant turn, so there is nothing to train on")
    if row.get("system") and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": require_text(row["system"], "system")})
    return Example(turns, tools=parse_tools(row), template_kwargs=parse_template_kwargs(row))


FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Example]]] = {  # name: the columns it needs, and its parser
    "messages": (frozenset({"messages"}), partial(conversation, column="messages")),
    "conversations": (frozenset({"conversations"}), partial(conversation, column="conversations")),
    "prompt-completion": (frozenset({"prompt", "completion"}), prompt_completion),
    "alpaca": (frozenset({"instruction", "output"}), alpaca),
    "text": (frozenset({"text"}), text),
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
OUR_COLUMNS = sorted(
    {"input", "system", "tools", "functions", "chat_template_kwargs", "history"}.union(
        *(needed for needed, _ in FORMATS.values())
    )
)


def rename(columns: Iterable[str], mapping: Mapping[str, str], source: str) -> dict[str, str]:
    """Our name for each column of the data.

    Raises:
        UserError: a mapped column that the data do not have, or two columns mapped to one name.
    """
    columns = list(columns)
    for theirs, ours in mapping.items():
        if theirs not in columns:
            near = get_close_matches(theirs, columns, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            if ours in columns and not near:
                hint = f"; the order is {{name in the data: our name}}: did you mean {{{ours}: {theirs}}}?"
            raise UserError(
                f"data.columns: {source} has no column '{theirs}'; its columns are {', '.join(columns) or '(none)'}{hint}"
            )
    names = {column: mapping.get(column, column) for column in columns}
    for ours in mapping.values():
        if len(same := [column for column in columns if names[column] == ours]) > 1:
            raise UserError(
                f"data.columns: {source}: two columns would be named '{ours}': {' and '.join(same)}; "
                "map one of them to another name"
            )
    return names


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
        for candidate, (needed, _) in FORMATS.items():
            if needed <= set(given):
                return candidate
        known = "; ".join(f"{' + '.join(sorted(needed, reverse=True))} ({key})" for key, (needed, _) in FORMATS.items())
        raise UserError(
            f"{source}: no known format has the columns {', '.join(given) or '(none)'}; expected {known}. "
            f"Map them under data, for example `columns: {{{_proposed_mapping(given)}}}`"
        )
    missing = sorted(FORMATS[name][0] - set(given))
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
            fits = [known for known, (needed, _) in FORMATS.items() if needed <= set(given)]
            instead = f"; `format: {fits[0]}` would train on {' and '.join(sorted(FORMATS[fits[0]][0]))} alone" if fits else ""
            raise UserError(f"{columns} are {name}, which are not supported yet{instead}")


def _proposed_mapping(given: list[str]) -> str:
    """A mapping of these columns as far as their names suggest one, else an example."""
    pairs = {ours: next((alias for alias in aliases if alias in given), None) for ours, aliases in ALIASES.items()}
    if all(pairs.values()):
        return ", ".join(f"{theirs}: {ours}" for ours, theirs in pairs.items())
    return "question: prompt, answer: completion"


@dataclass
class RowFormat:
    """How the rows of one source are read: the format, and the column of the data for each of our columns."""

    source: str
    kind: str
    names: dict[str, str]

    @classmethod
    def detect(cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str]) -> RowFormat:
        """The format of a source, detected from its first rows.

        Raises:
            UserError: a mapped column is missing, or the columns fit no format.
        """
        names = rename(dict.fromkeys(name for row in head for name in row), mapping, source)
        return cls(source, choose_format(wanted, names.values(), source), names)

    def example(self, row: Row) -> Example:
        """The row as an example. Raises BadRow if it does not fit the format."""
        return FORMATS[self.kind][1]({ours: row.get(theirs) for theirs, ours in self.names.items()})

    def resolve(self, train_on: str) -> str:
        """The value of `data.train_on` for these rows, with `auto` resolved."""
        if train_on != "auto":
            return train_on
        return {"text": "all", "messages": "assistant", "conversations": "assistant"}.get(self.kind, "completions")

    def where(self, index: int) -> str:
        """A row, named for messages."""
        return f"{self.source}: row {index + 1}"


def check_train_on(data: Data, row_format: RowFormat) -> None:
    """Raises UserError if `train_on` names turns and the rows have none."""
    if row_format.kind == "text" and data.train_on in ("completions", "assistant"):
        raise UserError(
            f"data.train_on: {data.train_on}: {row_format.source} is plain text, which has no turns; set all, or "
            "auto for data of both kinds"
        )
