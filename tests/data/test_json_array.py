"""A JSON list read in pieces is what json.load makes of it, and where it is broken the same place is named."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data import readers
from hfstrat.errors import UserError

TEXTS = st.text(max_size=12) | st.sampled_from(['"', "\\", "\u2028", "\U0001f600", "[1,", "},{", "\x00\x1f\n"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
LISTS = st.lists(VALUES, max_size=6)


def in_pieces(text: str, chunk: int) -> Any:
    """The list, or what is wrong with it."""
    try:
        return list(readers.array_items(io.StringIO(text), chunk))
    except readers.InvalidJson as error:
        return error.msg, error.lineno, error.colno


def at_once(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


@given(LISTS, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_in_pieces_or_at_once(value: list[Any], indent: int | None, ascii_only: bool, chunk: int) -> None:
    text = " \n" + json.dumps(value, indent=indent, ensure_ascii=ascii_only) + "\n\n"
    assert in_pieces(text, chunk) == value


@given(LISTS.filter(bool), st.sampled_from([None, 1]), st.integers(1, 40), st.data())
@settings(max_examples=400, deadline=None)
def test_a_mistake_is_named_where_it_is(value: list[Any], indent: int | None, chunk: int, data: st.DataObject) -> None:
    """The text is cut off, or a sign is taken out, put in or exchanged."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    at = data.draw(st.integers(1, len(text)))
    harmed = data.draw(
        st.sampled_from([text[:at], text[:at] + text[at + 1 :]])
        | st.sampled_from('{}[],:"\\0-e.\n tN').flatmap(
            lambda sign: st.sampled_from([text[:at] + sign + text[at + skip :] for skip in (0, 1)])
        )
    )
    expected, found = at_once(harmed), in_pieces(harmed, chunk)
    if sys.version_info >= (3, 13) and "trailing comma" in str(expected):
        assert isinstance(found, tuple)  # which the list's own decoder would say otherwise
        return
    assert found == expected


ROWS = [{"prompt": f"Zeile {n} \U0001f600", "completion": "ä", "deep": {"a": [n, {"b": None}]}} for n in range(5000)]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_file_that_is_one_list(tmp_path: Path, name: str) -> None:
    content = json.dumps(ROWS, ensure_ascii=False, indent=1).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    assert list(readers.read(tmp_path / name)) == ROWS
    assert len(readers.read_head(tmp_path / name)) == readers.HEAD_ROWS


def test_where_a_file_is_broken(tmp_path: Path) -> None:
    lines = json.dumps(ROWS, indent=0).splitlines()
    lines[20_000] = lines[20_000].replace(":", "", 1) + "}"
    (tmp_path / "a.json").write_text("\n".join(lines))
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads("\n".join(lines))
    wanted = rf"a\.json:{expected.value.lineno}: not valid JSON: .*\(column {expected.value.colno}\)"
    rows = readers.read(tmp_path / "a.json")
    assert next(rows) == ROWS[0]
    with pytest.raises(UserError, match=wanted):
        list(rows)


def test_rows_have_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, 7]')
    with pytest.raises(UserError, match=r"row 2: expected an object with named columns, given 7"):
        list(readers.read(tmp_path / "a.json"))


def test_memory_is_that_of_a_row_and_not_of_the_file(tmp_path: Path) -> None:
    row = {"text": "cat " * 5000}
    (tmp_path / "a.json").write_text(json.dumps([row] * 1000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in readers.read(tmp_path / "a.json")) == 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / "a.json").stat().st_size / 4


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_of_one_piece_is_read_in_batches(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"{n} " + "cat " * 200 for n in range(20_000)]})
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file, row_group_size=len(table), compression="none", use_dictionary=False)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_batch(table.combine_chunks().to_batches()[0])
    del table
    tracemalloc.start()
    start, most = pa.total_allocated_bytes(), 0
    try:
        for number, row in enumerate(readers.read(file)):
            most = max(most, pa.total_allocated_bytes() - start) if number % 500 == 0 else most
            assert row["text"].startswith(f"{number} ")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == 19_999
    assert max(peak, most) < file.stat().st_size / 2
