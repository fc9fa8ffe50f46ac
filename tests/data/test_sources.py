"""What is in a file is what is trained on: no value is guessed to be something else than its text."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from hfstrat.data import readers
from hfstrat.errors import UserError

ANSWERS = ["2", "NA", "", "007", "1e5", "None", "true", "2024-01-01", "a, b", 'say "no"', "two\nlines"]


def csv_of(answers: list[str], separator: str = ",") -> str:
    quoted = ['"' + answer.replace('"', '""') + '"' for answer in answers]
    return f"prompt{separator}completion\n" + "".join(f"{n}{separator}{answer}\n" for n, answer in enumerate(quoted))


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("A.TSV", "\t"), ("a.csv.gz", ",")])
def test_every_field_of_a_csv_is_the_text_that_stands_there(tmp_path: Path, name: str, separator: str) -> None:
    """pandas would read 007 as 7.0, and NA, None and an empty field as nothing."""
    content = csv_of(ANSWERS, separator).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = list(readers.read(tmp_path / name))
    assert [row["completion"] for row in rows] == ANSWERS
    assert [row["prompt"] for row in rows[:2]] == ["0", "1"]
    glanced = readers.read_head(tmp_path / name)
    assert [row["completion"] for row in glanced] == ANSWERS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,completion\na,b\n"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n'),
        ("a.json", '[{"prompt": "a", "completion": "b"}]'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, content: str) -> None:
    """Excel and some editors begin UTF-8 files by one."""
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert readers.read_head(tmp_path / name) == [{"prompt": "a", "completion": "b"}]
    assert list(readers.read(tmp_path / name)) == [{"prompt": "a", "completion": "b"}]


def test_long_fields_are_read(tmp_path: Path) -> None:
    """Python's csv would stop at 128 KiB."""
    (tmp_path / "a.csv").write_text(csv_of(["x" * 200_000]))
    glanced = readers.read_head(tmp_path / "a.csv")
    assert len(glanced[0]["completion"]) == 200_000


def test_a_row_that_breaks_the_table_is_named_wherever_it_is(tmp_path: Path) -> None:
    """Beyond the first rows too, which are all that is read before training starts."""
    many = readers.HEAD_ROWS + 50
    (tmp_path / "a.csv").write_text(csv_of(["x"] * many) + "1,2,3\n")
    with pytest.raises(UserError, match=rf"a\.csv:{many + 2}: this row has 3 fields"):
        list(readers.read(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * many + "{\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:{many + 1}: this row is not valid JSON"):
        list(readers.read(tmp_path / "a.jsonl"))


def test_dates_in_json_stay_text(tmp_path: Path) -> None:
    """A column of nothing but dates is still text."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "when", "completion": "2024-01-01"}\n' * 3)
    rows = list(readers.read(tmp_path / "a.jsonl"))
    assert [row["completion"] for row in rows] == ["2024-01-01"] * 3
