"""Valid rows of every format, changed a little: what is trained is in the row, or the row is refused.

The changes are those that people's files have: values of other types, missing and swapped columns, nesting, odd characters,
more columns. Any other exception than a refusal fails.
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, make_tokenizer, write_jsonl
from helpers.rows import CLASSES, LANGUAGE, NUMBERS, TEXTS, of_commands, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfstrat.data.formats import Example
from hfstrat.data.render import Renderer
from hfstrat.data.values import BadRow, valid
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS

RANDOM = "HFSTRAT_FUZZ" in os.environ  # other examples each time: to look for faults, not to be held up by a new one
TALK = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
VALID: list[tuple[str, dict[str, Any]]] = [
    (LANGUAGE, {"text": "one text"}),
    (LANGUAGE, {"prompt": "ask", "completion": "say", "system": "be brief"}),
    (LANGUAGE, {"prompt": TALK[:1], "completion": TALK[1:]}),
    (LANGUAGE, {"instruction": "do", "input": "this", "output": "done", "history": [["q", "a"]], "system": "s"}),
    (LANGUAGE, {"messages": TALK, "tools": [{"name": "find", "parameters": {"type": "object"}}]}),
    (LANGUAGE, {"messages": [*TALK, {"role": "user", "content": "more"}, {"role": "assistant", "content": "yes"}]}),
    (LANGUAGE, {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}], "system": "s"}),
    (CLASSES, {"text": "one text", "label": "a"}),
    (CLASSES, {"text": "one text", "label": 1}),
    (CLASSES, {"premise": "one", "hypothesis": "two", "labels": ["a", "b"]}),
    (CLASSES, {"sentence": "one", "labels": "['a', 'b']"}),
    (NUMBERS, {"text": "one text", "score": 1.5}),
    (NUMBERS, {"sentence1": "one", "sentence2": "two", "targets": [1.5, 2]}),
]
ODD_TEXTS = [
    "",
    " ",
    "\u200b",
    "\ud83d",
    "x\udc00y",
    "\ud83d\ude00",
    "é\u0301",
    "[]",
    "[1, 0]",
    "['a']",
    "null",
    "nan",
    "{}",
    "\x00",
    "1e3",
]
SCALARS = st.sampled_from([None, True, False, 0, 1, -1, 10**30, 0.5, math.nan, math.inf, *ODD_TEXTS])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "a", "\ud83d"]), inner, max_size=3),
    ),
    max_leaves=5,
)
NAMES = [
    "text",
    "label",
    "labels",
    "system",
    "tools",
    "history",
    "input",
    "weight",
    "images",
    "Text",
    " label",
    "",
    "\ud83d",
    "id",
]


@st.composite
def near_valid(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A task, a valid row, and the same row with one to three changes."""
    task, original = draw(st.sampled_from(VALID))
    row = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        columns = list(row)
        change = draw(st.sampled_from(["value", "inside", "remove", "swap", "add", "rename", "nest", "text"]))
        column = draw(st.sampled_from(columns)) if columns else ""
        if change == "add" or not columns:
            row[draw(st.sampled_from(NAMES))] = draw(VALUES)
        elif change == "value":
            row[column] = draw(VALUES)
        elif change == "inside" and isinstance(row[column], list) and row[column]:
            place = draw(st.integers(0, len(row[column]) - 1))
            entry = row[column][place]
            if isinstance(entry, dict) and entry:
                entry[draw(st.sampled_from(list(entry)))] = draw(VALUES)
            else:
                row[column][place] = draw(VALUES)
        elif change == "remove":
            del row[column]
        elif change == "swap":
            other = draw(st.sampled_from(columns))
            row[column], row[other] = row[other], row[column]
        elif change == "rename":
            row[draw(st.sampled_from(NAMES))] = row.pop(column)
        elif change == "nest":
            row[column] = draw(st.sampled_from([[row[column]], {"value": row[column]}]))
        elif change == "text" and not isinstance(row[column], str):
            row[column] = json.dumps(row[column])
    return task, original, row


def strings(value: Any) -> list[str]:
    """All text in a value, keys and numbers included, and the text in lists that are written as text."""
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in strings(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in strings(each)]
    found = [str(valid(value) if isinstance(value, str) else value), json.dumps(value, default=str)]
    return [*found, found[0].strip(), found[0].lower(), str(int(value)) if _is_whole(value) else ""]


def parts(value: Any) -> list[str]:
    """The text of a value as it stands there, without keys: neighboring parts of a message are joined."""
    if isinstance(value, dict):
        return [text for key, each in value.items() if key != "type" for text in parts(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in parts(each)]
    return [valid(value)] if isinstance(value, str) else []


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value == int(value)


RENDERERS: list[Renderer] = []


def renderers() -> list[Renderer]:
    if not RENDERERS:
        chat = make_tokenizer(chat=False)
        chat.chat_template = TEMPLATE
        RENDERERS.extend([Renderer(tokenizer(), "plain"), Renderer(chat, "chat")])
    return RENDERERS


def check_row(task: str, head: dict[str, Any], row: dict[str, Any]) -> None:
    """Read and render one row as training does, and compare."""
    try:
        reading = TASKS[task].rows.read_format([head], "rows", Data.model_validate({"train": "rows"}))
        example = reading.example(row)
        reading.unread(row)
    except (UserError, BadRow):
        return
    here = strings(row)
    if isinstance(example, Example):
        check_example(example, "\n".join(here), "\n".join(["".join(here), "".join(parts(row))]))
        return
    assert example.text in here
    assert example.pair is None or example.pair in here
    for label in example.labels:
        text = str([row.get("label"), row.get("labels")]).replace("\\", "")
        assert any(label == each or _same_number(label, each) for each in here) or str(label) in text
    assert task != NUMBERS or all(math.isfinite(number) for number in example.labels)


def _same_number(one: Any, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def check_example(example: Example, here: str, joined: str) -> None:
    for message in example.messages or []:
        assert isinstance(message["content"], str)
        if message["role"] == "assistant" and not message.get("tool_calls"):
            plain = message["content"].replace("<think>\n", "").replace("\n</think>\n\n", "")
            assert plain in here or plain in joined
    assert example.text is None or example.text in here
    for renderer in renderers():
        try:
            rows = renderer.render(example)
        except BadRow:
            continue
        renderer.encode(rows)  # no tokenizer refuses the text


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(near_valid())
def test_what_is_trained_is_in_the_row_or_the_row_is_refused(found: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    task, original, row = found
    check_row(task, row, row)
    check_row(task, original, row)  # in the middle of valid rows


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None, derandomize=not RANDOM, suppress_health_check=list(HealthCheck))
@given(near_valid())
def test_many_rows(found: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    task, original, row = found
    check_row(task, row, row)
    check_row(task, original, row)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=not RANDOM, suppress_health_check=list(HealthCheck))
@given(near_valid(), st.integers(0, 19))
def test_commands_agree_on_files(
    tmp_path_factory: pytest.TempPathFactory, found: tuple[str, dict[str, Any], dict[str, Any]], place: int
) -> None:
    """A file of valid rows, one of which is changed: the same number of rows, or the same sentence with the row."""
    task, original, row = found
    rows = [copy.deepcopy(original) for _ in TEXTS]
    for number, each in enumerate(rows):
        _vary(each, number)
    rows[place] = row
    file: Path = write_jsonl(tmp_path_factory.mktemp("fuzz") / "rows.jsonl", rows)
    answers = of_commands(file, task)
    if "set `objective: " in str(answers["train"]):
        return  # advise reads them as preferences, which have rules of their own
    assert answers["train"] == answers["advise"]
    assert answers["preflight"] in (answers["train"], len(rows))


def _vary(row: dict[str, Any], number: int) -> None:
    """Distinct texts, two classes, and numbers that vary."""
    for name, value in row.items():
        if name in ("label", "labels", "score", "targets"):
            values = {"a": "ab"[number % 2], 1: number % 2, 1.5: number + 0.5}
            row[name] = [number, 2] if name == "targets" else values.get(value, value) if not isinstance(value, list) else value
        elif isinstance(value, str) and name not in ("labels", "system"):
            row[name] = f"{value} {number}"
        elif name in ("messages", "conversations", "prompt") and isinstance(value, list):
            key = "value" if name == "conversations" else "content"
            value[0][key] += f" {number}"
