"""Data that are read while training: the same rows as a slow obvious loop reads, from any position, in memory that is flat."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer, sentences, write_jsonl

from hfstrat.data import streams
from hfstrat.data.formats import RowFormat
from hfstrat.data.render import Renderer
from hfstrat.data.streaming import StreamedData, prepare_streamed
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.trainer.streamed import StreamedSteps, StreamOrder

KINDS = ("jsonl", "json", "csv", "txt", "parquet", "jsonl.gz")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def texts(count: int, name: str = "row") -> list[str]:
    """Different texts."""
    return [f"{name} {number} {text}" for number, text in enumerate(sentences(count))]


def write(path: Path, rows: list[str]) -> Path:
    """Rows of text in a file of the kind that its name says."""
    kind = path.suffix[1:]
    records = [{"text": row} for row in rows]
    if kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{row}"\n' for row in rows))
    elif kind == "txt":
        path.write_text("\n\n".join(rows))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": rows}), path, row_group_size=7)
    elif kind == "gz":
        path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    else:
        write_jsonl(path, records)
    return path


def prepare(tokenizer: Any, seed: int = 1, **settings: Any) -> StreamedData:
    settings = {"eval_size": 3, "shuffle_buffer": 1, "max_length": 64, **settings}
    return prepare_streamed(Data.model_validate({"streaming": True, **settings}), tokenizer, seed)


def ids_of(tokenizer: Any, row: str, overflow: str = "truncate", limit: int = 64) -> list[list[int]]:
    """The token ids of a row: the slow obvious way."""
    (rendered,) = Renderer(tokenizer, "auto", "auto").render(RowFormat("x", {"text": "text"}, "text").example({"text": row}))
    ids = Renderer(tokenizer, "auto", "auto").encode([rendered])[0][0]
    if overflow == "split":
        return [ids[start : start + limit] for start in range(0, max(1, len(ids) - 1), limit - 1)]
    return [ids[:limit]]


def taken(data: StreamedData, count: int) -> list[list[int]]:
    return [row["input_ids"] for row in data.stream.take(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_order_without_those_held_out_and_again(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    rows = texts(20)
    data = prepare(tokenizer, train=str(write(tmp_path / f"rows.{kind}", rows)))
    expected = [ids for row in rows[3:] for ids in ids_of(tokenizer, row)]
    assert taken(data, 40) == list(itertools.islice(itertools.cycle(expected), 40))
    assert sorted(map(list, data.eval["input_ids"])) == sorted(ids for row in rows[:3] for ids in ids_of(tokenizer, row))
    assert [len(ids) for ids in data.eval["input_ids"]] == sorted(data.eval_lengths, reverse=True)


def test_long_rows_are_split_across_positions(tokenizer: Any, tmp_path: Path) -> None:
    rows = [" ".join(sentences(count, seed=seed)) for seed, count in enumerate((1, 9, 2, 14, 1, 1, 6, 3))]
    settings = {"train": str(write(tmp_path / "rows.jsonl", rows)), "overflow": "split", "max_length": 16, "eval_size": 1}
    expected = [ids for row in rows[1:] for ids in ids_of(tokenizer, row, "split", 16)]
    assert len(expected) > 20
    assert taken(prepare(tokenizer, **settings), len(expected)) == expected
    assert_resumes(tokenizer, settings, steps=range(1, 9), size=3)


MIXED: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled": {"shuffle_buffer": 8},
    "a buffer beyond the data": {"shuffle_buffer": 1000},
    "split": {"overflow": "split", "max_length": 12, "shuffle_buffer": 5},
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_continues_from_any_step(tokenizer: Any, tmp_path: Path, case: str, kind: str) -> None:
    """Several files, sources with weights, rows that are bad, blank, long or held out."""
    for name, count in (("a0", 11), ("a1", 6)):
        write(tmp_path / f"{name}.{kind}", texts(count, name))
    other = write_jsonl(tmp_path / "b.jsonl", [{"body": row} for row in [*texts(9, "b"), "", *texts(14, "c")]])
    with other.open("a") as file:
        file.write('{"body": \n{"body": 5}\n')
    train = [{"path": str(tmp_path / f"a*.{kind}"), "weight": 2}, {"path": str(other), "columns": {"body": "text"}}]
    assert_resumes(tokenizer, {"train": train, "bad_rows": "skip", **MIXED[case]}, steps=range(1, 14), size=5)


def assert_resumes(tokenizer: Any, settings: dict[str, Any], steps: range, size: int) -> None:
    """From the position after each step, as JSON, the same examples and statistics follow as without an interruption."""
    whole = StreamedSteps(prepare(tokenizer, **settings).stream, size, steps.stop)
    examples = [whole.step(step) for step in range(steps.stop)]
    last = whole.position(steps.stop)
    for step in steps:
        before = StreamedSteps(prepare(tokenizer, **settings).stream, size, steps.stop)
        before.step(step)  # a data loader reads ahead
        position = json.loads(json.dumps(before.position(step)))
        after = StreamedSteps(prepare(tokenizer, **settings).stream, size, steps.stop)
        after.restore(position)
        order = StreamOrder(after)
        order.begin(step)
        numbers = list(order)
        assert len(numbers) == steps.stop * size
        assert [after[number] for number in numbers[step * size :]] == [row for rows in examples[step:] for row in rows]
        found = after.position(steps.stop)
        assert (found["place"]["draws"], found["part"]) == (last["place"]["draws"], last["part"])
        assert found["statistics"] == last["statistics"]


def test_the_position_of_another_step_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(tokenizer, train=str(write(tmp_path / "rows.jsonl", texts(20))))
    with pytest.raises(Exception, match="no position in the data"):
        StreamOrder(StreamedSteps(data.stream, 4, 10)).begin(3)


def epochs(data: StreamedData, count: int, size: int) -> list[list[tuple[int, ...]]]:
    return [[tuple(ids) for ids in taken(data, size)] for _ in range(count)]


def test_each_row_once_per_epoch_in_another_order(tokenizer: Any, tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.jsonl", texts(10, f"file {number} row"))
    settings = {"train": str(tmp_path / "*.jsonl"), "eval_size": 4}
    one, two, three = epochs(prepare(tokenizer, **settings, shuffle_buffer=7), 3, 36)
    assert len(set(one)) == 36
    assert sorted(one) == sorted(two) == sorted(three)
    assert one != two != three
    assert epochs(prepare(tokenizer, **settings, shuffle_buffer=7), 1, 36) == [one]
    assert epochs(prepare(tokenizer, **settings, shuffle_buffer=7, seed=2), 1, 36) != [one]
    plain = epochs(prepare(tokenizer, **settings), 1, 36)[0]
    assert sorted(plain) == sorted(one)
    moved = [abs(plain.index(row) - place) for place, row in enumerate(one)]
    assert np.mean(moved) > 3


def test_weights_are_shares_of_the_rows(tokenizer: Any, tmp_path: Path) -> None:
    """Each source is read in its order, whatever comes between, and begins again by itself."""
    rows = {name: texts(count, name) for name, count in (("a", 50), ("b", 7))}
    train = [
        {"path": str(write(tmp_path / "a.jsonl", rows["a"])), "weight": 3},
        {"path": str(write(tmp_path / "b.txt", rows["b"])), "weight": 1},
    ]
    data = prepare(tokenizer, train=train, eval_size=4)
    found = [tuple(ids) for ids in taken(data, 1000)]
    own = {name: [tuple(ids) for row in rows[name] for ids in ids_of(tokenizer, row)] for name in rows}
    held = {"a": 3, "b": 1}
    for name, share in (("a", 0.75), ("b", 0.25)):
        mine = [ids for ids in found if ids in own[name]]
        assert len(mine) == pytest.approx(1000 * share, abs=60)
        assert mine == list(itertools.islice(itertools.cycle(own[name][held[name] :]), len(mine)))
    assert any("75.0%" in line for line in data.lines())


BAD = {
    "no JSON": ('{"text": "a"', "rows.jsonl:6: this row is not valid JSON"),
    "no object": ("[1, 2]", "rows.jsonl:6: expected an object"),
    "no text": ('{"text": 5}', "rows.jsonl:6: 'text' "),
    "a key twice": ('{"text": "a", "text": "b"}', "rows.jsonl:6: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(tokenizer: Any, tmp_path: Path, case: str) -> None:
    line, message = BAD[case]
    rows, file = texts(600), tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": row}) for row in rows]
    file.write_text("\n".join([*lines[:5], line, *lines[5:400], "", line, *lines[400:]]))
    with pytest.raises(UserError, match=message) as refused:
        prepare(tokenizer, train=str(file))
    assert "data.bad_rows: skip" in str(refused.value)
    data = prepare(tokenizer, train=str(file), bad_rows="skip")
    assert taken(data, 597) == [ids for row in rows[3:] for ids in ids_of(tokenizer, row)]
    read = data.stream.statistics()
    assert (read.rows_read, read.rows_kept, read.rows_dropped, read.rows_bad) == (599, 597, 2, 2)
    assert any(f"{file}:6" in remark for remark in read.remarks())
    assert "2 that cannot be read" in read.line()


def test_a_bad_row_beyond_the_sample_ends_the_run_with_its_name(tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in texts(1500)])
    with file.open("a") as opened:
        opened.write('{"text": 1}\n')
    data = prepare(tokenizer, train=str(file))
    with pytest.raises(UserError, match=r"rows\.jsonl:1501: "):
        taken(data, 1500)


def test_csv_rows_with_other_fields_are_skipped(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,more\n" + "".join(f"{row},x\n" for row in texts(10)) + "a,b,c\n" + "last one,x\n")
    with pytest.raises(UserError, match=r"rows\.csv:12: this row has 3 fields"):
        prepare(tokenizer, train=str(file))
    data = prepare(tokenizer, train=str(file), bad_rows="skip")
    assert taken(data, 8) == [ids for row in [*texts(10)[3:], "last one"] for ids in ids_of(tokenizer, row)]


def test_texts_of_evaluation_rows_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = texts(10)
    file = write(tmp_path / "rows.jsonl", [*rows, rows[1].upper(), rows[2], "one more"])
    data = prepare(tokenizer, train=str(file))
    assert taken(data, 8) == [ids for row in [*rows[3:], "one more"] for ids in ids_of(tokenizer, row)]
    assert data.stream.statistics().rows_evaluated == 2
    own = prepare(tokenizer, train=str(file), eval=str(write(tmp_path / "eval.jsonl", rows[:1])), eval_size=0.05)
    assert taken(own, 12) == [
        ids for row in [*rows[1:], rows[1].upper(), rows[2], "one more"] for ids in ids_of(tokenizer, row)
    ]


def test_files_of_different_formats_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", texts(20))
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": row, "completion": row} for row in texts(20)])
    with pytest.raises(UserError, match="different formats"):
        prepare(tokenizer, train=str(tmp_path / "*.jsonl"))


def test_a_file_that_looks_like_one_text_is_named(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join("\n".join(f"{number} {text}," for text in sentences(4, number)) for number in range(20)))
    assert any("looks like one text" in line for line in prepare(tokenizer, train=str(file)).lines())


def test_what_is_wrong_with_most_rows_is_refused_before_training(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"long\.jsonl \(the first 3 rows\).*truncates"):
        prepare(tokenizer, train=str(write(tmp_path / "long.jsonl", [f"{n} {' '.join(sentences(30))}" for n in range(50)])))
    few = write(tmp_path / "few.jsonl", texts(3))
    with pytest.raises(UserError, match="no row is left to train on"):
        prepare(tokenizer, train=str(few))


def test_a_row_is_a_conversation_with_its_mask(tokenizer: Any, tmp_path: Path) -> None:
    """Masks are those of data that are read completely."""
    from hfstrat.data.prepare import prepare as prepare_completely

    pairs = [{"prompt": row, "completion": f"answer {row}"} for row in texts(12)]
    write_jsonl(tmp_path / "train.jsonl", pairs[4:])
    write_jsonl(tmp_path / "eval.jsonl", pairs[:4])
    settings: dict[str, Any] = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    plain = prepare_completely(Data.model_validate(settings), tokenizer, 1, samples=2)
    streamed = prepare_streamed(Data.model_validate({**settings, "streaming": True, "shuffle_buffer": 1}), tokenizer, 1, 2)
    for row, expected in zip(streamed.stream.take(8), plain.train, strict=True):
        assert (row["input_ids"], row["labels"]) == (expected["input_ids"], expected["labels"])
    assert list(streamed.eval["labels"]) == list(plain.eval["labels"])
    assert streamed.samples == plain.samples
    assert streamed.statistics["eval"] == plain.statistics["eval"]
    read, whole = streamed.stream.statistics(), plain.statistics["train"]
    assert (read.rows_read, read.tokens, read.supervised) == (whole.rows_read, whole.tokens, whole.supervised)


def test_other_data_have_another_identity(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", texts(20))
    first = prepare(tokenizer, train=str(file)).fingerprint()
    assert prepare(tokenizer, train=str(file)).fingerprint() == first
    assert prepare(tokenizer, train=str(file), shuffle_buffer=2).fingerprint() != first
    write(file, [*texts(19), "changed at the end"])
    assert prepare(tokenizer, train=str(file)).fingerprint() != first


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[list[str]]], None]:
    """Lets `me/set` be a Hub data set of these Parquet files."""
    import datasets

    def make(files: list[list[str]]) -> None:
        names = [str(write(tmp_path / f"hub{number}.parquet", rows)) for number, rows in enumerate(files)]
        more = str(write(tmp_path / "hub-validation.parquet", texts(5, "validation")))

        def builder(path: str, config: str | None, revision: str | None) -> Any:
            assert (path, config, revision) == ("me/set", None, None)
            given = {"train": names, "validation": [more]}
            return datasets.load_dataset_builder("parquet", data_files=given, cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(streams, "hub_builder", builder)

    return make


def test_a_hub_dataset_is_streamed(tokenizer: Any, hub: Any) -> None:
    files = [texts(12, "one"), texts(5, "two")]
    hub(files)
    data = prepare(tokenizer, train="me/set")
    assert taken(data, 14) == [ids for row in [*files[0][3:], *files[1]] for ids in ids_of(tokenizer, row)]
    for buffer in (1, 6):
        settings = {"train": "me/set", "shuffle_buffer": buffer, "eval_split": "validation", "eval_size": 0.05}
        assert len(prepare(tokenizer, **settings).eval) == 5
        assert_resumes(tokenizer, settings, steps=range(1, 8), size=4)
    with pytest.raises(UserError, match=r"data\.train: me/set is neither a local file nor .*nothing"):
        prepare(tokenizer, train="me/set", split="nothing")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tokenizer: Any, tmp_path: Path) -> None:
    """After the first rows, four times as many take no more memory."""
    file = tmp_path / "rows.jsonl"
    with file.open("w") as opened:
        opened.writelines(json.dumps({"text": f"{number} {'a cat sat ' * 4}"}) + "\n" for number in range(6_000))
    steps = StreamedSteps(prepare(tokenizer, train=str(file), shuffle_buffer=200).stream, 50, 300)
    for step in range(20):
        steps.step(step)
    tracemalloc.start()
    try:
        peaks = []
        for stop in (40, 118):
            tracemalloc.reset_peak()
            for step in range(stop - (20 if stop == 40 else 78), stop):
                steps.step(step)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, peaks


def test_nothing_is_written_to_the_disk(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    data = prepare(tokenizer, train=str(write(tmp_path / "rows.jsonl", texts(300))))
    taken(data, 500)
    assert not list((tmp_path / "cache").rglob("*"))


def test_the_words_of_the_lines(tokenizer: Any, tmp_path: Path) -> None:
    lines = prepare(tokenizer, train=str(write(tmp_path / "rows.jsonl", texts(20))), shuffle_buffer=5).lines()
    text = "\n".join(lines)
    assert "(the first 17 rows)" in text
    assert "shuffled in blocks of 5" in text
    assert "the first 3 rows of the data are held out" in text
    assert Counter(line.split()[0] for line in lines)["train"] >= 1
