"""Odd rows that users bring: each is read by one rule, or refused with its row."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from helpers.rows import of_commands, outcome, predicted, prepared, tokenizer

from hfstrat.data import readers
from hfstrat.data.formats import Example, RowFormat
from hfstrat.data.labeled import LabelFormat
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS

NAN = float("nan")
CLASSES, LANGUAGE, NUMBERS = "text-classification", "causal-lm", "regression"
TEXTS = [f"the cat sat on mat {number}" for number in range(24)]


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
    with pytest.raises(BadRow, match="'hypothesis' is .*expected text"):
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
    with pytest.raises(BadRow, match="column 'prompt', but data.columns maps 'q'"):
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
        with pytest.raises(BadRow, match="is not a list: .*write it as JSON"):
            labeled([{"text": "a", "labels": broken}])


def test_labels_that_are_hardly_different_are_named(tmp_path: Path) -> None:
    names = ["spam", "Spam", "ham ", "ham", "sp\u200bam", "spam|ham"]
    shown = lines(tmp_path, CLASSES, [{"text": text, "label": names[n % 6]} for n, text in enumerate(TEXTS)])
    assert any("labels that differ" in line or "labels differ only" in line for line in shown)
    assert any("'Spam' and 'spam' and 'sp" in line or "'spam' and" in line for line in shown)
    assert any("4 rows have white space around a label" in line for line in shown)
    assert any("'spam|ham' is one label here" in line for line in shown)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "saved", "dict"])
@pytest.mark.parametrize("many", [False, True])
def test_class_names_of_datasets_are_label_names(tmp_path: Path, kind: str, many: bool) -> None:
    """As `datasets` writes them, in the schema of its files or beside them."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    names = ["neg", "neutral", "pos"]
    label: Any = ClassLabel(names=names)
    values = [[n % 3] if many else n % 3 for n in range(24)]
    features = Features({"text": Value("string"), "label": List(label) if many else label})
    made = Dataset.from_dict({"text": TEXTS, "label": values}, features)
    place = tmp_path / ("rows.parquet" if kind == "parquet" else "saved")
    if kind == "parquet":
        made.to_parquet(str(place))
    elif kind == "saved":
        made.save_to_disk(str(place))
        (place / "cache-0123.arrow").write_bytes(b"of an earlier map")
    else:
        DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(place))
    found = TASKS[CLASSES].rows.prepare(Data.model_validate({"train": str(place), "eval_size": 6}), tokenizer(), 0)
    assert found.label_names == tuple(names)
    assert of_commands(place, CLASSES)["advise"] == 24


def test_an_id_without_a_class_name_is_refused_by_all(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    values = [-1 if n == 5 else n % 2 for n in range(24)]
    Dataset.from_dict({"text": TEXTS, "label": values}, features).to_parquet(str(tmp_path / "a.parquet"))
    found = set(of_commands(tmp_path / "a.parquet", CLASSES).values())
    assert found == {f"{tmp_path / 'a.parquet'}: row 6: 'label' is -1: this row has no label; use a labeled split"}


# columns


def refusal(task: str, head: dict[str, Any]) -> str:
    data = Data.model_validate({"train": "rows"})
    return str(outcome(lambda: TASKS[task].rows.read_format([head], "rows", data)))


@pytest.mark.parametrize(
    ("task", "columns", "words"),
    [
        (CLASSES, ["Text", "Label"], "`columns: {Text: text, Label: label}`"),
        (CLASSES, ["text", " label"], '`columns: {" label": label}`'),
        (CLASSES, ["review", "sentiment", "id"], "`columns: {review: text, sentiment: label}`"),
        (CLASSES, ["Premise", "Hypothesis", "labels"], "`columns: {Premise: premise, Hypothesis: hypothesis}`"),
        (CLASSES, ["text", "foo"], "no column looks like label"),
        (CLASSES, ["text;label"], '"text;label", looks like several that are separated by semicolons'),
        (CLASSES, ["text\tlabel"], "separated by tabs"),
        (LANGUAGE, ["Question", "ANSWER"], "`columns: {Question: prompt, ANSWER: completion}`"),
        (LANGUAGE, ["Text"], "`columns: {Text: text}`"),
        (LANGUAGE, ["foo", "bar"], "no column looks like prompt or completion"),
        (NUMBERS, ["review", "stars"], "`columns: {review: text, stars: target}`"),
        (NUMBERS, ["Text", "Score"], "`columns: {Text: text, Score: target}`"),
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
    words = "`task: text-classification` at the top of the recipe and `columns: {category: label}`"
    assert any(words in line for line in lines(tmp_path, LANGUAGE, rows))
    assert any("not read: category" in line for line in lines(tmp_path, LANGUAGE, rows))
    many = [{"text": text, "category": text} for text in TEXTS]
    assert not any(words in line for line in lines(tmp_path, LANGUAGE, many))


def test_few_evaluation_rows_are_named(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    assert any("only 1 evaluation row:" in line for line in lines(tmp_path, LANGUAGE, rows, eval_size=1))
    assert not any("evaluation row" in line for line in lines(tmp_path, LANGUAGE, rows, eval_size=12))


# files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label,label\na,0,1\n", "two columns are named 'label'"),
        ("a.tsv", "text\ttext\na\tb\n", "two columns are named 'text'"),
        ("a.csv", ",,text\n1,2,a\n", "two columns have no name"),
        ("a.csv", "text,label\na,0\nb\n", "a.csv:3: this row has 1 field, but the first line names 2 columns"),
        ("a.csv", "text,label\na,0\nb,1,2\n", "a.csv:3: this row has 3 fields"),
        ("a.csv", 'text,label\na,0\n"b,1\nc,0\n', "a.csv:3: the row that begins here cannot be read"),
        ("a.csv", "text,label\n", "no rows; expected at least one"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "a.jsonl:1: .*the key 'text' occurs twice"),
        ("a.json", '[{"text": "a"}, {"text": "a", "m": {"k": 1, "k": 2}}]', "row 2: .*the key 'k' occurs twice"),
        ("a.jsonl", '{"text": "a", "label": 1%s}\n' % ("0" * 5000), "a.jsonl:1: .*more digits than can be read"),
        ("a.jsonl", '{"text": %s%s}\n' % ("[" * 10**5, "]" * 10**5), "a.jsonl:1: .*nested too deeply"),
        ("a.json", '[{"text": %s%s}]\n' % ("[" * 10**5, "]" * 10**5), "row 1: .*nested too deeply"),
        ("a.jsonl", '{"text": "a"},\n', "a.jsonl:1: .*not valid JSON"),
    ],
)
def test_files_that_would_lose_values_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        readers.read_head(tmp_path / name)


def test_empty_columns_of_a_spreadsheet_are_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,,\r\na,0,,\r\n,,,\r\n\r\n")
    assert list(readers.read(tmp_path / "a.csv")) == [{"text": "a", "label": "0"}, {"text": "", "label": ""}]
    (tmp_path / "a.csv").write_text("text,label,,\na,0,,x\n")
    with pytest.raises(UserError, match="a.csv:2: this row has 4 fields, but the first line names 2 columns"):
        list(readers.read(tmp_path / "a.csv"))


def test_tables_with_two_columns_of_a_name_or_broken_text_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns are named 'text'"):
        readers.read_head(tmp_path / "a.parquet")
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not UTF-8"):
        readers.read_head(tmp_path / "a.parquet")


PROSE = textwrap.dedent(
    """\
    It was a bright cold day in the middle of the month, and all the clocks of the
    town were late again. Nobody who had been there before would have thought that
    this could ever change, and so the people went on with what they had always
    done in the evening, and when the night came they went to bed as they had done
    on every evening before. Only the miller did not sleep, since his mill stood at
    the river that had risen after the rain, and he was afraid that the water would
    carry it away. So he sat at the window and watched until the morning came.
    """
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (PROSE * 2, "wrapped"),
        ("one paragraph\n\n" * 20, "blank lines"),
        ("def f():\n    return 1\n" * 20, "indented"),
        ("".join(f"{text} and the dog ran under the hat.\n" for text in TEXTS), ""),
        ("".join(f"{text}{' and more' * (n % 7)}\n" for n, text in enumerate(TEXTS)), ""),
        (PROSE, ""),
    ],
    ids=["wrapped", "paragraphs", "code", "texts", "unequal texts", "too short to know"],
)
def test_one_text_in_lines_is_named(tmp_path: Path, text: str, why: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(text if name == "b.txt" else "".join(f"{each}\n" for each in TEXTS))
    given: dict[str, Any] = {"train": str(folder), "eval_size": 4}
    shown = TASKS[LANGUAGE].rows.prepare(Data.model_validate(given), tokenizer(), 0).lines()
    found = [line for line in shown if "set `documents: files`" in line]
    assert len(found) == bool(why)
    assert not why or (why in found[0] and "b.txt" in found[0])
    shown = TASKS[LANGUAGE].rows.prepare(Data.model_validate({**given, "documents": "lines"}), tokenizer(), 0).lines()
    assert not any("documents: files" in line for line in shown)


# all commands read rows alike


def rows_of(label: Callable[[int], Any], text: Callable[[int], Any] = lambda n: TEXTS[n]) -> list[dict[str, Any]]:
    return [{"text": text(n), "label": label(n)} for n in range(len(TEXTS))]


ODD: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "good": (CLASSES, rows_of(lambda n: "ab"[n % 2])),
    "a blank text": (CLASSES, rows_of(lambda n: n % 2, lambda n: " " if n == 3 else TEXTS[n])),
    "many blank texts": (CLASSES, rows_of(lambda n: n % 2, lambda n: "" if n < 5 else TEXTS[n])),
    "a null text": (CLASSES, rows_of(lambda n: n % 2, lambda n: None if n == 5 else TEXTS[n])),
    "numbers as text": (CLASSES, rows_of(lambda n: n % 2, lambda n: n)),
    "nan labels": (CLASSES, rows_of(lambda n: NAN if n == 2 else n % 2)),
    "no label": (CLASSES, [{key: row[key] for key in row if key == "text" or n != 4} for n, row in enumerate(rows_of(str))]),
    "one class": (CLASSES, rows_of(lambda n: "a")),
    "ids": (CLASSES, rows_of(lambda n: f"id {n}")),
    "fractions as text": (CLASSES, rows_of(lambda n: str(n % 3 / 2))),
    "vectors": (CLASSES, rows_of(lambda n: [n % 2, 1 - n % 2])),
    "mixed numbers and text": (CLASSES, rows_of(lambda n: [1, "1", "a"][n % 3])),
    "huge numbers": (CLASSES, rows_of(lambda n: 10**40 + n % 2)),
    "lists": (CLASSES, rows_of(lambda n: ["ab"[n % 2]])),
    "other columns": (CLASSES, [{"Text": "a", "Label": "b"}] * 20),
    "decimal commas": (NUMBERS, rows_of(lambda n: f"{n},5")),
    "exponents": (NUMBERS, rows_of(lambda n: f"{n}e3")),
    "infinite": (NUMBERS, rows_of(lambda n: float("inf") if n == 7 else n)),
    "a nan target": (NUMBERS, rows_of(lambda n: NAN if n == 0 else n)),
    "grouped digits": (NUMBERS, rows_of(lambda n: f"{n}_000")),
    "equal targets": (NUMBERS, rows_of(lambda n: 3)),
    "blank answers": (LANGUAGE, [{"prompt": text, "completion": "" if n < 4 else "x"} for n, text in enumerate(TEXTS)]),
    "a blank answer": (LANGUAGE, [{"prompt": text, "completion": "" if n < 1 else "x"} for n, text in enumerate(TEXTS)]),
    "an object as answer": (LANGUAGE, [{"prompt": text, "completion": {"a": 1}} for text in TEXTS]),
    "an odd history": (LANGUAGE, [{**ALPACA, "instruction": text, "history": ["ab"]} for text in TEXTS]),
    "odd tools": (LANGUAGE, [{"prompt": text, "completion": "x", "tools": ["no JSON"]} for text in TEXTS]),
    "messages as text": (LANGUAGE, [{"messages": "[]", "text": 1} for _ in TEXTS]),
    "zero width": (LANGUAGE, [{"text": f"{text}\u200b"} for text in TEXTS]),
}


@pytest.mark.parametrize("name", ODD)
def test_every_command_reads_rows_alike(name: str, tmp_path: Path) -> None:
    """The same number of rows, or the same sentence; preflight, which reads the first rows only, has no other objections."""
    task, rows = ODD[name]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = of_commands(file, task)
    assert found["advise"] == found["train"]
    assert found["preflight"] in (found["train"], len(rows))
    if task == CLASSES and isinstance(found["train"], str) and "'text' is" in found["train"]:
        assert predicted(file) == found["train"]
    if name in ("good", "lists", "huge numbers"):
        assert found["train"] == predicted(file) == len(rows)


def test_a_late_bad_row_has_the_same_sentence_everywhere(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(300)]
    rows[250]["text"] = None  # type: ignore[assignment]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = of_commands(file, CLASSES)
    assert found["train"] == found["advise"] == predicted(file) == f"{file}: row 251: 'text' is null, expected text"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_missing_values_are_none_in_every_file(tmp_path: Path, kind: str) -> None:
    rows = [{"instruction": text, "input": None if n % 2 else "politely", "output": "x"} for n, text in enumerate(TEXTS)]
    file = tmp_path / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        text = "\n".join(json.dumps(row) for row in rows) if kind == "jsonl" else json.dumps(rows)
        file.write_text(text.replace("null", "NaN"))
    elif kind == "csv":
        file.write_text("instruction,input,output\n" + "".join(f"{r['instruction']},{r['input'] or ''},x\n" for r in rows))
    elif kind == "parquet":
        write_parquet(file, rows)
    else:
        from datasets import Dataset

        file = tmp_path / "saved"
        Dataset.from_list(rows).save_to_disk(str(file))
    data = Data.model_validate({"train": str(file), "eval_size": 4})
    reading = RowFormat.detect(rows, "rows", "auto", {})
    files = [file] if file.is_file() else sorted(file.glob("*.arrow"))
    prompts = [(reading.example(row).messages or [])[0]["content"] for each in files for row in readers.read(each)]
    assert prompts == [f"{text}\n\npolitely" if n % 2 == 0 else text for n, text in enumerate(TEXTS)]
    assert prepared(file, data, LANGUAGE) == len(TEXTS)
