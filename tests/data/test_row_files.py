"""Files with odd content, class names in files, and the same answer of every command."""

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
from helpers.rows import CLASSES, LANGUAGE, NUMBERS, TEXTS, of_commands, predicted, prepared, tokenizer

from hfstrat.data import readers
from hfstrat.data.formats import RowFormat
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS

NAN = float("nan")
ALPACA = {"instruction": "a", "output": "b"}


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
        ("a.jsonl", '{"text": ' + "[" * 10**5 + "]" * 10**5 + "}\n", "a.jsonl:1: .*nested too deeply"),
        ("a.json", '[{"text": ' + "[" * 10**5 + "]" * 10**5 + "}]", "row 1: .*nested too deeply"),
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
    with pytest.raises(UserError, match=r"a.csv:2: this row has 4 fields, but the first line names 2 columns"):
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
    found = [line for line in shown if "set `data.documents: files`" in line]
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


def test_predictions_use_the_columns_of_the_training(tmp_path: Path) -> None:
    from hfstrat.cli.inference import _read_prompts, _read_texts

    data = Data.model_validate({"train": "rows", "columns": {"review": "text", "stars": "label"}})
    file = write_jsonl(tmp_path / "a.jsonl", [{"review": "a", "stars": 3}, {"review": "b"}])
    assert _read_texts(file, data) == [{"text": "a"}, {"text": "b"}]
    file = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b", "review": 3}])
    assert _read_texts(file, data) == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "a.txt").write_text("\ufefffirst\u2028still first\n\nsecond\n")
    assert [row["text"] for row in _read_texts(tmp_path / "a.txt", None)] == ["first\u2028still first", "second"]
    with pytest.raises(UserError, match="no column such as text"):
        _read_texts(write_jsonl(tmp_path / "c.jsonl", [{"body": "a"}]), data)
    prompts = [{"prompt": "a"}, {"prompt": "a", "system": "s"}, {"messages": [{"from": "human", "value": "a"}]}]
    found = _read_prompts(write_jsonl(tmp_path / "d.jsonl", prompts))
    user = {"role": "user", "content": "a"}
    assert found == ["a", [{"role": "system", "content": "s"}, user], [user]]
    for odd, words in (({"prompt": 3}, "row 1: 'prompt' is int"), ({"text": "a", "x": 1}, "neither 'prompt' nor 'messages'")):
        with pytest.raises(UserError, match=words):
            _read_prompts(write_jsonl(tmp_path / "e.jsonl", [odd]))


def test_a_file_that_is_not_complete_is_not_there(tmp_path: Path) -> None:
    from hfstrat.tasks.artifact import written

    def fail() -> None:
        with written(tmp_path / "a.json") as file:
            file.write("{")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
    with written(tmp_path / "a.json") as file:
        file.write("{}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


def test_files_of_different_formats_are_no_single_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": text, "completion": "x"} for text in TEXTS])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "b.jsonl", [{"messages": talk}] * 9)
    found = of_commands(tmp_path, LANGUAGE)
    words = (
        "its files have different formats: a.jsonl (prompt-completion), b.jsonl (messages); name each as a source of its own"
    )
    assert found["train"] == found["advise"] == f"{tmp_path}: {words}"
    both = Data.model_validate(
        {"train": [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")], "eval_size": 4, "template": "plain"}
    )
    assert TASKS[LANGUAGE].rows.prepare(both, tokenizer(), 0).statistics["train"].rows_kept == len(TEXTS) + 9
