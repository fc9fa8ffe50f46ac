"""Odd rows that users bring: each is read by one rule, or refused with its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from helpers.rows import CLASSES, LANGUAGE, NUMBERS, TEXTS, outcome, predicted, tokenizer

from hfstrat.data.formats import Example, RowFormat
from hfstrat.data.labeled import LabelFormat
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS

NAN = float("nan")


def example(row: dict[str, Any], head: dict[str, Any] | None = None, **columns: str) -> Example:
    return RowFormat.detect([head or row], "rows", "auto", columns).example(row)


def labeled(rows: list[dict[str, Any]], **columns: str) -> list[Any]:
    reading = LabelFormat.detect(rows, "rows", "auto", columns)
    return [reading.example(row) for row in rows]


def lines(folder: Path, task: str, rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    """What `check` and `train` print about rows."""
    data = {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "eval_size": 4, "template": "plain", **settings}
    found: list[str] = TASKS[task].rows.prepare(Data.model_validate(data), tokenizer(), 0).lines()
    return found


# text columns

ALPACA = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize("nothing", [None, NAN, ""])
def test_an_optional_text_is_none_if_it_is_null_nan_or_empty(nothing: Any) -> None:
    row = {**ALPACA, "input": nothing, "system": nothing, "history": nothing, "tools": nothing}
    assert example(row) == example(ALPACA)
    assert example({"prompt": "a", "completion": "b", "system": nothing}) == example({"prompt": "a", "completion": "b"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (False, "false"),
        (1.5, "1.5"),
        ([0, 2], "[0, 2]"),
        ({"é": None, "x": True}, '{"é": null, "x": true}'),
        ("x", "x"),
    ],
)
def test_an_alpaca_input_that_is_no_text_is_json(value: Any, text: str) -> None:
    messages = example({**ALPACA, "input": value}).messages or []
    assert messages[0]["content"] == f"a\n\n{text}"


@pytest.mark.parametrize("value", [None, NAN, 0, 1.5, True, {"a": 1}, b"x"])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b", "system": "c"},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_text_column_holds_text(row: dict[str, Any], value: Any) -> None:
    column = list(row)[-1]
    if column == "system" and (value is None or value is NAN):
        return
    with pytest.raises(BadRow, match=f"'{column}' is .*expected text"):
        example({**row, column: value})


@pytest.mark.parametrize("value", [None, NAN, 7, ["a"]])
def test_both_texts_of_a_pair_are_text(value: Any) -> None:
    rows = [{"premise": "a", "hypothesis": value, "label": "c"}]
    with pytest.raises(BadRow, match=r"'hypothesis' is .*expected text"):
        labeled(rows)


@pytest.mark.parametrize("history", ["[]", [], '[["q", "a"]]', "[['q', 'a']]", [["q", "a"]], [("q", "a")]])
def test_a_history_is_pairs_also_as_text_of_a_csv(history: Any) -> None:
    turns = [message["content"] for message in example({**ALPACA, "history": history}).messages or []]
    assert turns == (["q", "a"] if "q" in str(history) else []) + ["a", "b"]


@pytest.mark.parametrize(
    "history",
    [
        [["q", None]],
        [{"user": "a", "assistant": "b"}],
        ["ab"],
        [["a", "b", "c"]],
        [["a", 1]],
        "text",
        3,
        {"a": "b"},
        [[["a"], "b"]],
    ],
    ids=str,
)
def test_any_other_history_is_refused(history: Any) -> None:
    with pytest.raises(BadRow, match="'history'"):
        example({**ALPACA, "history": history})


def test_a_system_message_and_tools_are_read_in_every_format_with_turns() -> None:
    tools = [{"name": "find", "parameters": {}}]
    for row in (ALPACA, {"prompt": "a", "completion": "b"}, {"messages": [{"role": "assistant", "content": "b"}]}):
        found = example({**row, "system": "be brief", "tools": tools})
        assert (found.messages or [])[0] == {"role": "system", "content": "be brief"}
        assert (found.tools or [])[0]["function"]["name"] == "find"
    prompted = example({"prompt": "a", "completion": "b", "system": "be brief"})
    assert prompted.prompt_turns == 2


def test_a_column_that_later_rows_have_is_read_too(tmp_path: Path) -> None:
    """Only the first rows decide on the format."""
    rows = [{"prompt": text, "completion": "x"} for text in TEXTS] * 10
    rows += [{"prompt": f"{text} again", "completion": "x", "system": "be brief", "extra": 1} for text in TEXTS]
    shown = lines(tmp_path, LANGUAGE, rows)
    assert any("columns not read: extra (24 rows)" in line for line in shown)
    reading = RowFormat.detect(rows[:200], "rows", "auto", {})
    assert (reading.example(rows[-1]).messages or [])[0]["role"] == "system"
    reading = RowFormat.detect([{"q": "a", "a": "b"}], "rows", "auto", {"q": "prompt", "a": "completion"})
    with pytest.raises(BadRow, match=r"column 'prompt', but data.columns maps 'q'"):
        reading.example({"q": "a", "a": "b", "prompt": "c"})


# characters

HALF = "x\ud83d"


def test_half_of_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": HALF}, {"role": "assistant", "content": HALF}]
    found = example({"messages": talk, "tools": json.dumps([{"name": HALF}])})
    assert "\ud83d" not in repr(found)
    assert [m["content"] for m in found.messages or []] == ["x\ufffd", "x\ufffd"]
    assert example({"text": "\ud83d\ude00"}).text == "\U0001f600"  # a pair that JSON did not join
    shown = lines(tmp_path, LANGUAGE, [{"text": f"{text} {HALF if n % 2 else ''}"} for n, text in enumerate(TEXTS)])
    assert any("12 rows have half of a surrogate pair" in line for line in shown)
    shown = lines(tmp_path, CLASSES, [{"text": text, "label": HALF + str(n % 2)} for n, text in enumerate(TEXTS)])
    assert any("24 rows have half of a surrogate pair" in line for line in shown)
    file = write_jsonl(tmp_path / "predict.jsonl", [{"text": HALF}])
    assert predicted(file) == 1
    with pytest.raises(UserError, match=r"'x\\ud83d' has half of a surrogate pair; rename"):
        example({"text": "a", HALF: 1})


# labels


@pytest.mark.parametrize("kind", [int, float, bool, str])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_vectors_of_zero_and_one_are_refused(kind: Callable[[int], Any], size: int) -> None:
    rows = [{"text": "a", "labels": [kind(place == n % size) for place in range(size)]} for n in range(6)]
    with pytest.raises(UserError, match=r"row 1: 'labels' is a vector of 0 and 1"):
        labeled(rows)
    with pytest.raises(UserError, match="vector of 0 and 1"):  # as a CSV file has them
        labeled([{**row, "labels": str(row["labels"])} for row in rows])


def test_lists_of_the_labels_0_and_1_are_no_vectors() -> None:
    rows = [{"text": "a", "labels": each} for each in ([0], [0, 1], [1], [], [1, 0])]
    assert [found.labels for found in labeled(rows)] == [["0"], ["0", "1"], ["1"], [], ["1", "0"]]
    with pytest.raises(BadRow, match="vector of 0 and 1"):
        labeled([*rows, {"text": "a", "labels": [True]}])
    with pytest.raises(BadRow, match="duplicate labels"):
        labeled([*rows, {"text": "a", "labels": ["x", "x"]}])


def test_lists_as_text_are_lists() -> None:
    rows = [{"text": "a", "labels": each} for each in ("['sport']", '["sport", "news"]', "[]", "[2, 3]")]
    assert [found.labels for found in labeled(rows)] == [["sport"], ["sport", "news"], [], ["2", "3"]]
    assert [found.labels for found in labeled([{"text": "a", "label": "[PER]"}])] == [["[PER]"]]
    for broken in ("[sport, news]", "[0 1]"):
        with pytest.raises(BadRow, match=r"is not a list: .*write it as JSON"):
            labeled([{"text": "a", "labels": broken}])


def test_labels_that_are_hardly_different_are_named(tmp_path: Path) -> None:
    names = ["spam", "Spam", "ham ", "ham", "sp\u200bam", "spam|ham"]
    shown = lines(tmp_path, CLASSES, [{"text": text, "label": names[n % 6]} for n, text in enumerate(TEXTS)])
    assert any("labels that differ" in line or "labels differ only" in line for line in shown)
    assert any("'Spam' and 'spam' and 'sp" in line or "'spam' and" in line for line in shown)
    assert any("4 rows have white space around a label" in line for line in shown)
    assert any("'spam|ham' is one label here" in line for line in shown)
    one = [{"text": text, "label": f"{'ab'[n % 2]}{' ' * (n == 3)}"} for n, text in enumerate(TEXTS)]
    shown = lines(tmp_path, CLASSES, one)
    assert any("1 row has white space around a label" in line for line in shown)


# columns


def refusal(task: str, head: dict[str, Any]) -> str:
    data = Data.model_validate({"train": "rows"})
    return str(outcome(lambda: TASKS[task].rows.read_format([head], "rows", data)))


@pytest.mark.parametrize(
    ("task", "columns", "words"),
    [
        (CLASSES, ["Text", "Label"], "`data.columns: {Text: text, Label: label}`"),
        (CLASSES, ["text", " label"], '`data.columns: {" label": label}`'),
        (CLASSES, ["review", "sentiment", "id"], "`data.columns: {review: text, sentiment: label}`"),
        (CLASSES, ["Premise", "Hypothesis", "labels"], "`data.columns: {Premise: premise, Hypothesis: hypothesis}`"),
        (CLASSES, ["id", "Review text", "news_category"], '`data.columns: {"Review text": text, news_category: label}`'),
        (CLASSES, ["text", "foo"], "no column looks like label"),
        (CLASSES, ["text;label"], '"text;label", looks like several that are separated by semicolons'),
        (CLASSES, ["text\tlabel"], "separated by tabs"),
        (LANGUAGE, ["Question", "ANSWER"], "`data.columns: {Question: prompt, ANSWER: completion}`"),
        (LANGUAGE, ["Text"], "`data.columns: {Text: text}`"),
        (LANGUAGE, ["foo", "bar"], "no column looks like prompt or completion"),
        (NUMBERS, ["review", "stars"], "`data.columns: {review: text, stars: target}`"),
        (NUMBERS, ["Text", "Score"], "`data.columns: {Text: text, Score: target}`"),
        (NUMBERS, ["text", "y-axis"], "no column looks like target"),
    ],
)
def test_a_proposed_mapping_names_only_columns_that_are_there(task: str, columns: list[str], words: str) -> None:
    sentence = refusal(task, dict.fromkeys(columns, "a"))
    assert words in sentence
    for foreign in ("review", "sentiment", "question", "stars"):
        assert foreign in {column.lower() for column in columns} or foreign not in sentence


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": text,
            "completion": "x",
            "images": ["a.png"],
            "Weight": 1,
            "id": n,
            "note": None,
            "source": "web" if n else "",
        }
        for n, text in enumerate(TEXTS)
    ]
    shown = lines(tmp_path, LANGUAGE, rows)
    (warning,) = (line for line in shown if "may be part of the task are not read" in line)
    assert "images, Weight" in warning
    (line,) = (line for line in shown if "columns not read:" in line)
    assert line.endswith("columns not read: id, source (23 rows)")
    shown = lines(tmp_path, CLASSES, [{"text": text, "label": n % 2, "weight": 2} for n, text in enumerate(TEXTS)])
    assert any("not read: weight" in line for line in shown)
    shown = lines(tmp_path, NUMBERS, [{"text": text, "score": 3, "label": n} for n, text in enumerate(TEXTS)])
    assert any("not read: score" in line for line in shown)


def test_a_text_with_few_categories_gets_a_proposal(tmp_path: Path) -> None:
    rows = [{"text": text, "category": "abc"[n % 3]} for n, text in enumerate(TEXTS)]
    words = "`task: text-classification` and `data.columns: {category: label}`"
    assert any(words in line for line in lines(tmp_path, LANGUAGE, rows))
    assert any("not read: category" in line for line in lines(tmp_path, LANGUAGE, rows))
    many = [{"text": text, "category": text} for text in TEXTS]
    assert not any(words in line for line in lines(tmp_path, LANGUAGE, many))


def test_few_evaluation_rows_are_named(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    assert any("only 1 evaluation row:" in line for line in lines(tmp_path, LANGUAGE, rows, eval_size=1))
    assert not any("evaluation row" in line for line in lines(tmp_path, LANGUAGE, rows, eval_size=12))
