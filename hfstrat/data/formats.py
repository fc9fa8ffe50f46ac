"""Row formats: how a row of a file becomes an example, which is a conversation or a plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hfstrat.data.columns import Reading, class_columns, columns_of, filled, propose, rename
from hfstrat.data.messages import Message as Message
from hfstrat.data.messages import is_blank, parse_messages, parse_template_kwargs, parse_tools, with_reasoning
from hfstrat.data.values import REPLACED, BadRow, Row, optional_text, parse_list, require_text, shown, text_or_json, valid
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

HASH_BYTES = 8
PROMPT_CHARACTERS = 60  # of a plain text, shown as its prompt


class Example(NamedTuple):
    """Either `messages`, to be rendered by a template, or a `text`, which is trained on as it is.

    `prompt_turns`: how many messages form the prompt; 0 for a conversation without a separate one. `template_kwargs`: the row's
    own arguments of the chat template. `changes`: by reading it.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Message] | None = None
    prompt_turns: int = 0
    template_kwargs: Mapping[str, Any] = {}
    changes: tuple[str, ...] = ()

    @property
    def has_target(self) -> bool:
        """Whether there is anything to train on: a text, or an answer that is not blank."""
        turns = (self.messages or [])[self.prompt_turns :]
        answers = [turn for turn in turns if turn["role"] == "assistant" and turn.get("weight", 1)]
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
    prompt = with_system(parse_messages(row["prompt"], "prompt", "user"), row)
    messages = prompt + parse_messages(row["completion"], "completion", "assistant")
    return Example(messages, tools=parse_tools(row), prompt_turns=len(prompt), template_kwargs=parse_template_kwargs(row))


def alpaca(row: Row) -> Example:
    extra = text_or_json(row.get("input"), "input")
    prompt = require_text(row["instruction"], "instruction") + (f"\n\n{extra}" if extra else "")
    messages = with_system([*parse_history(row.get("history")), {"role": "user", "content": prompt}], row)
    completion: Message = {"role": "assistant", "content": require_text(row["output"], "output")}
    return Example(
        [*messages, completion],
        tools=parse_tools(row),
        prompt_turns=len(messages),
        template_kwargs=parse_template_kwargs(row),
    )


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
    return Example(with_system(turns, row), tools=parse_tools(row), template_kwargs=parse_template_kwargs(row))


class Format(NamedTuple):
    """The columns that a format needs, its parser of rows by our names, and the columns that it also reads."""

    needed: frozenset[str]
    parse: Callable[[Row], Example]
    optional: frozenset[str] = frozenset()


AROUND = frozenset({"system", "tools", "functions", "chat_template_kwargs"})
FORMATS = {
    "messages": Format(frozenset({"messages"}), partial(conversation, column="messages"), AROUND),
    "conversations": Format(frozenset({"conversations"}), partial(conversation, column="conversations"), AROUND),
    "prompt-completion": Format(frozenset({"prompt", "completion"}), prompt_completion, AROUND),
    "alpaca": Format(frozenset({"instruction", "output"}), alpaca, AROUND | {"input", "history"}),
    "text": Format(frozenset({"text"}), text),
}
LABELED = [  # columns that identify rows of a classification
    {one, two, label}
    for one, two in (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text", "text_pair"), ("text_a", "text_b"))
    for label in ("label", "labels")
] + [{one, label} for one in ("text", "sentence") for label in ("label", "labels")]
PREFERENCES = (  # rows that need another objective: the name, the objective, and the columns that identify them
    ("preference pairs", "dpo", [{"chosen", "rejected"}, {"chosen_messages", "rejected_messages"}]),
    ("answers with labels", "kto", [{"messages", "label"}, {"prompt", "completion", "label"}]),
)
UNSUPPORTED = (  # formats that are recognized but not supported: the name, and the columns that identify it
    ("multiple choice questions", [{"choices", "gold"}, {"context_options", "gold"}, {"choices", "answer"}]),
)
ALIASES = {  # other names of a prompt and its completion, for the proposed mapping
    "prompt": ("question", "query", "context", "instruction", "input", "user", "source", "problem"),
    "completion": ("answer", "response", "continuation", "output", "chosen", "target", "assistant", "solution"),
}
OUR_COLUMNS = sorted(frozenset[str]().union(*(each.needed | each.optional for each in FORMATS.values())))


def choose_format(name: str, columns: Iterable[str], source: str, with_values: Iterable[str] | None = None) -> str:
    """The format to read rows by: the requested one, or the first whose columns are all present.

    Args:
        with_values: the columns that are not null everywhere, by which rows for another task are recognized; default all.

    Raises:
        UserError: the columns do not fit; the message lists them and shows how to map them.
    """
    given = list(columns)
    if name in ("text-classification", "regression"):
        raise UserError(f"data.format: {name} needs `task: {name}` at the top of the recipe")
    if name in ("preference", "unpaired-preference"):
        raise UserError(f"data.format: {name} needs a preference objective, such as `objective: dpo`, in the recipe")
    if name == "auto":
        _refuse_unsupported(given if with_values is None else list(with_values), source)
        for candidate, each in FORMATS.items():
            if each.needed <= set(given):
                return candidate
        known = "; ".join(f"{' + '.join(sorted(each.needed, reverse=True))} ({key})" for key, each in FORMATS.items())
        raise UserError(
            f"{source}: no known format has the columns {', '.join(given) or '(none)'}; expected {known}. {_proposal(given)}"
            + "; prompts alone are for `objective: grpo` with rewards" * ("prompt" in given)
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
    fits = next((known for known, each in FORMATS.items() if each.needed <= set(given)), None)
    alone = f"; `format: {fits}` would train on {' and '.join(sorted(FORMATS[fits].needed))} alone" if fits else ""
    for name, objective, shapes in PREFERENCES:
        if any(shape <= set(given) for shape in shapes):
            raise UserError(f"{columns} are {name}; set `objective: {objective}` to train on them{alone}")
    for name, shapes in UNSUPPORTED:
        if any(shape <= set(given) for shape in shapes):
            raise UserError(f"{columns} are {name}, which are not supported{alone}")


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
        kind = choose_format(wanted, names.values(), source, [names[column] for column in columns_of(filled(head))])
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
