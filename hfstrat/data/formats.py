"""One function per row format: a row becomes a conversation, or a text that is trained on whole.

How the rows of a source are read: told once, from the first of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from hfstrat.data.messages import BadRow, Message, text_of, tools_of, turns
from hfstrat.data.readers import GLANCE, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data


class Example(NamedTuple):
    """Either `messages` to be rendered by a template, or a `text` trained on as it is.

    `prompt_turns`: how many of the messages are the prompt; 0 for a conversation, which has none apart.
    """

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Message] | None = None
    prompt_turns: int = 0

    @property
    def says_something(self) -> bool:
        """Whether there is anything to learn: a text, or an answer that is not blank."""
        answers = [m for m in self.messages or [] if m["role"] == "assistant"]
        return bool((self.text or "").strip()) or any(m["content"].strip() or m.get("tool_calls") for m in answers)

    @property
    def words(self) -> str:
        """Everything that is said, without the template's marks: what tells two rows apart."""
        said = (
            f"{m['role']} {m['content']} {json.dumps(m['tool_calls']) if 'tool_calls' in m else ''}"
            for m in self.messages or []
        )
        return self.text if self.text is not None else "\n".join(said)


def text(row: Row) -> Example:
    return Example(text=text_of(row["text"], "text"))


def prompt_completion(row: Row) -> Example:
    prompt = turns(row["prompt"], "prompt", "user")
    messages = prompt + turns(row["completion"], "completion", "assistant")
    return Example(messages, tools=tools_of(row.get("tools")), prompt_turns=len(prompt))


def alpaca(row: Row) -> Example:
    extra = row.get("input")
    prompt = text_of(row["instruction"], "instruction") + (f"\n\n{extra}" if extra else "")
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": text_of(row["system"], "system")})
    for asked, answered in row.get("history") or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": prompt})
    return Example([*messages, *turns(text_of(row["output"], "output"), "output", "assistant")], prompt_turns=len(messages))


def messages(row: Row) -> Example:
    return _conversation(row, "messages")


def conversations(row: Row) -> Example:
    return _conversation(row, "conversations")


def _conversation(row: Row, column: str) -> Example:
    if not isinstance(row[column], list) or not row[column]:
        raise BadRow(f"'{column}' is not a list with at least one message")
    talk = turns(row[column], column, "user")
    if not any(turn["role"] == "assistant" for turn in talk):
        raise BadRow(f"'{column}' has no assistant turn, so there is nothing to train on")
    if row.get("system") and talk[0]["role"] != "system":
        talk.insert(0, {"role": "system", "content": text_of(row["system"], "system")})
    return Example(talk, tools=tools_of(row.get("tools")))


FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Example]]] = {
    "messages": (frozenset({"messages"}), messages),
    "conversations": (frozenset({"conversations"}), conversations),
    "prompt-completion": (frozenset({"prompt", "completion"}), prompt_completion),
    "alpaca": (frozenset({"instruction", "output"}), alpaca),
    "text": (frozenset({"text"}), text),
}


LABELLED = [  # what tells rows of another task
    {one, two, label}
    for one, two in (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text", "text_pair"), ("text_a", "text_b"))
    for label in ("label", "labels")
] + [{one, label} for one in ("text", "sentence") for label in ("label", "labels")]


LATER = (  # what is recognised and not trained on yet: its name, and the columns that tell it
    ("preference pairs", [{"chosen", "rejected"}, {"chosen_messages", "rejected_messages"}]),
    ("preference labels (as KTO takes them)", [{"messages", "label"}, {"prompt", "completion", "label"}]),
    ("multiple choice", [{"choices", "gold"}, {"context_options", "gold"}, {"choices", "answer"}]),
)


ALIASES = {  # other names of a prompt and its answer, for the map that is proposed
    "prompt": ("question", "query", "context", "instruction", "input", "user", "source", "problem"),
    "completion": ("answer", "response", "continuation", "output", "chosen", "target", "assistant", "solution"),
}


OUR_COLUMNS = sorted({"input", "system", "tools", "history"}.union(*(needed for needed, _ in FORMATS.values())))


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
    if name in ("text-classification", "regression"):
        raise UserError(f"data.format: {name} needs `task: {name}` at the top of the recipe")
    if name == "auto":
        _refuse_later(given, source)
        for candidate, (needed, _) in FORMATS.items():
            if needed <= set(given):
                return candidate
        known = "; ".join(f"{' + '.join(sorted(needed, reverse=True))} ({key})" for key, (needed, _) in FORMATS.items())
        raise UserError(
            f"{source}: no known format has the columns {', '.join(given) or '(none)'}; expected {known}. "
            f"Map them, such as `columns: {{{_proposal(given)}}}` under data"
        )
    missing = sorted(FORMATS[name][0] - set(given))
    if missing:
        raise UserError(
            f"data.format: {source}: format {name} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"there are {', '.join(given) or 'none'}. Map them with `columns:` under data, or name another format"
        )
    return name


def _refuse_later(given: list[str], source: str) -> None:
    if any(shape <= set(given) for shape in LABELLED):
        raise UserError(
            f"{source}: rows with the columns {', '.join(given)} are texts with labels; `task: text-classification` at the "
            "top of the recipe learns them" + ("; `format: text` would train on text alone" if "text" in given else "")
        )
    for name, shapes in LATER:
        if any(shape <= set(given) for shape in shapes):
            fits = [known for known, (needed, _) in FORMATS.items() if needed <= set(given)]
            instead = f"; `format: {fits[0]}` would train on {' and '.join(sorted(FORMATS[fits[0]][0]))} alone" if fits else ""
            raise UserError(
                f"{source}: rows with the columns {', '.join(given)} are for {name}, which is kept for a later version{instead}"
            )


def _proposal(given: list[str]) -> str:
    """A map of these columns, as far as their names tell it."""
    pairs = {ours: next((alias for alias in aliases if alias in given), None) for ours, aliases in ALIASES.items()}
    if all(pairs.values()):
        return ", ".join(f"{theirs}: {ours}" for ours, theirs in pairs.items())
    return "question: prompt, answer: completion"


@dataclass
class Reading:
    """How the rows of one source are read: its format, and their names for our columns."""

    source: str
    kind: str
    names: dict[str, str]

    @classmethod
    def of(cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str]) -> Reading:
        """Told from the first rows.

        Raises:
            UserError: columns that are not there, or that fit no format.
        """
        names = rename(dict.fromkeys(name for row in head for name in row), mapping, source)
        return cls(source, choose(wanted, names.values(), source), names)

    def example(self, row: Row) -> Example:
        """Raises BadRow where the row does not fit."""
        named = {ours: row.get(theirs) for theirs, ours in self.names.items()}
        return FORMATS[self.kind][1](named)

    def resolve(self, train_on: str) -> str:
        """What `train_on: auto` comes to for these rows."""
        if train_on != "auto":
            return train_on
        return {"text": "all", "messages": "assistant", "conversations": "assistant"}.get(self.kind, "completions")

    def where(self, index: int) -> str:
        return f"{self.source}: row {index + 1}"


def read_as(
    rows: Iterable[Row], source: str, wanted: str, mapping: dict[str, str], told: Callable[..., Any] = Reading.of
) -> tuple[Iterator[Row], Any]:
    """The rows, and how to read them, which `told` tells from the first of them."""
    rows = iter(rows)
    head = list(itertools.islice(rows, GLANCE))
    if not head:
        raise UserError(f"{source}: there is no row; expected at least one")
    return itertools.chain(head, rows), told(head, source, wanted, mapping)


def check_train_on(data: Data, reading: Reading) -> None:
    """Raises UserError where `train_on` speaks of turns and the rows have none."""
    if reading.kind == "text" and data.train_on in ("completions", "assistant"):
        raise UserError(
            f"data.train_on: {data.train_on}: {reading.source} is plain text, which has no turns; write all, or auto for data "
            "of both kinds"
        )
