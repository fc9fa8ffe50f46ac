"""Several sources, weights, duplicates, split rows, and memory that does not grow with the data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer, sentences, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data import sources
from hfstrat.data.formats import hash_text
from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED
from hfstrat.data.splits import apply_weights, describe_duplicates
from hfstrat.data.tokenize import split
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

TOKENIZER = make_tokenizer()


def pairs(count: int, word: str = "one") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}", "completion": "two three"} for n in range(count)]


def texts(rows: Any) -> list[str]:
    return [" ".join(TOKENIZER.decode(ids, skip_special_tokens=True).split()) for ids in rows["input_ids"]]


def test_several_sources_of_several_kinds(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", pairs(10))
    talk = [{"from": "human", "value": "where"}, {"from": "gpt", "value": "under the mat"}]
    second = write_jsonl(
        tmp_path / "b.jsonl", [{"conversations": [*talk, {"from": "human", "value": str(n)}]} for n in range(5)]
    )
    third = write_jsonl(tmp_path / "c.jsonl", [{"question": f"red {n}", "answer": "blue"} for n in range(5)])
    given = [str(first), {"path": str(second)}, {"path": str(third), "columns": {"question": "prompt", "answer": "completion"}}]
    made = prepare(Data.model_validate({"train": given, "eval_size": 3}), TOKENIZER, seed=0, samples=3)
    stats = made.statistics["train"]
    assert [(a.format, a.rows_read) for a in stats.sources] == [
        ("prompt-completion", 10),
        ("conversations", 5),
        ("prompt-completion", 5),
    ]
    assert stats.rows_read == stats.rows_kept == 20
    assert stats.tokens == sum(a.tokens for a in stats.sources)
    assert len(stats.lines()) == 4
    everything = [*made.train, *made.eval]
    assert sorted(row["row"] for row in everything) == list(range(20))
    by_row = {row["row"]: " ".join(TOKENIZER.decode(row["input_ids"], skip_special_tokens=True).split()) for row in everything}
    assert "one 7" in by_row[7]
    assert "under the mat" in by_row[12]
    assert "red 4" in by_row[19]
    held = sorted(made.eval["row"])
    assert all(sample["prompt"][-1]["content"] in by_row[row] for sample, row in zip(made.samples, held, strict=True))


def test_a_row_is_seen_as_often_as_its_weight(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", pairs(40)), write_jsonl(tmp_path / "b.jsonl", pairs(40, "red"))
    given = [{"path": str(first), "weight": 2.25}, {"path": str(second), "weight": 0.5}]
    data = Data.model_validate({"train": given, "eval": str(first)})
    made = prepare(data, TOKENIZER, seed=0)
    times = Counter(made.train["row"])
    assert Counter(times[row] for row in range(40)) == {2: 30, 3: 10}
    assert Counter(times[row] for row in range(40, 80)) == {0: 20, 1: 20}
    assert made.train["row"][:] == prepare(data, TOKENIZER, seed=0).train["row"][:]
    assert made.train["row"][:] != prepare(data, TOKENIZER, seed=1).train["row"][:]
    assert "2.25 times per epoch" in made.statistics["train"].lines()[1]


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 5)), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_weights_hold_within_half_a_row(given: list[tuple[int, float]], seed: int) -> None:
    origin = np.repeat(np.arange(len(given)), [count for count, _ in given])
    chosen = apply_weights(origin, [weight for _, weight in given], seed)
    for number, (count, weight) in enumerate(given):
        mine = chosen[origin[chosen] == number]
        assert abs(len(mine) - weight * count) <= 0.5 + 1e-6
        times = np.bincount(mine, minlength=len(origin))[origin == number]
        assert count == 0 or times.max() - times.min() <= 1


def test_held_out_rows_are_not_weighted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", pairs(40))
    made = prepare(Data.model_validate({"train": [{"path": str(file), "weight": 3}], "eval_size": 10}), TOKENIZER, seed=0)
    assert (len(made.train), len(made.eval)) == (90, 10)
    assert not set(made.train["row"]) & set(made.eval["row"])


def test_folders_and_globs(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("my-train-2.jsonl", "my-train-1.jsonl", "my-test.jsonl", "my_valid.jsonl"):
        write_jsonl(folder / name, [{"text": name}])
    (folder / "README.md").write_text("no rows")

    def names(source: str, *splits: str) -> list[str]:
        return [path.name for path in sources.local_files(source, "data.train", splits or ("train",)) or []]

    assert names(str(folder)) == ["my-train-1.jsonl", "my-train-2.jsonl"]
    assert names(str(folder), "test") == ["my-test.jsonl"]
    assert names(str(folder), *sources.EVALUATION_SPLITS) == ["my_valid.jsonl"]
    assert names(f"{folder}/*t*.jsonl") == ["my-test.jsonl", "my-train-1.jsonl", "my-train-2.jsonl"]
    made = prepare(Data(train=str(folder), eval_split="test"), TOKENIZER, seed=0)
    assert (made.statistics["train"].rows_read, made.statistics["eval"].rows_read) == (2, 1)
    assert prepare(Data(train=str(folder), eval=str(folder)), TOKENIZER, seed=0).duplicates["eval_rows_in_train"] == 0
    with pytest.raises(UserError, match="no file matches"):
        names(f"{folder}/*.csv")


def test_a_saved_dataset_is_a_folder_of_arrow_files(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(pairs(20)).save_to_disk(tmp_path / "saved")
    assert prepare(Data(train=str(tmp_path / "saved")), TOKENIZER, seed=0).statistics["train"].rows_kept == 20


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_arguments_of_one_tool_are_not_given_to_another(suffix: str, tmp_path: Path) -> None:
    """A table adds the arguments of any call to every call, as nulls."""
    from datasets import Dataset

    def talk(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        asked = {"role": "user", "content": name}
        return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    rows = [talk("red", {"a": 1}), talk("blue", {"b": 2})] * 2 + [talk("hat", {"c": 3})]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, rows)
    else:
        Dataset.from_list(rows).to_parquet(file)
    made = prepare(Data(train=str(file), eval_size=1), TOKENIZER, seed=0)
    said = " ".join(texts(made.train) + texts(made.eval))
    assert '{"name": "red", "arguments": {"a": 1}}' in said
    assert "null" not in said


@given(st.integers(2, 60), st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_split_rows_lose_nothing(length: int, limit: int) -> None:
    ids = list(range(length))
    labels = [IGNORED] + [token if token % 3 else IGNORED for token in ids[1:]]
    pieces = split(ids, labels, limit)
    assert all(len(part) == len(label) <= limit for part, label in pieces)
    assert all(label[0] == IGNORED for _, label in pieces)
    assert [token for part, _ in pieces for token in part[1:]] == ids[1:]
    supervised = [label for _, labels in pieces for label in labels if label != IGNORED]
    assert supervised == [label for label in labels if label != IGNORED]
    assert all(part[at] == label for part, labels in pieces for at, label in enumerate(labels) if label != IGNORED)


def test_long_rows_become_several(tmp_path: Path) -> None:
    rows = [*pairs(30), {"prompt": "one", "completion": "cat " * 200}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    whole = prepare(Data(train=str(file), eval_size=1), TOKENIZER, seed=0).statistics["train"]
    made = prepare(Data(train=str(file), eval_size=1, max_length=40, overflow="split"), TOKENIZER, seed=0)
    stats = made.statistics["train"]
    assert (stats.rows_split, stats.rows_kept, stats.supervised_lost) == (1, 31, 0)
    assert stats.supervised == whole.supervised
    assert max(made.train["length"]) <= 40
    assert len(made.train) + len(made.eval) > 35
    assert made.duplicates["train_duplicates"] == 0  # parts of one row are no duplicates


def test_parts_of_a_row_stay_on_one_side(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{n} " + "cat dog " * 60} for n in range(20)])
    made = prepare(Data(train=str(file), max_length=32, overflow="split", eval_size=0.3), TOKENIZER, seed=0)
    assert len(made.eval) > 10
    assert not set(made.train["row"]) & set(made.eval["row"])


def test_duplicates_are_counted_and_shown(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*pairs(10), {"prompt": "ONE  3", "completion": "two three\n"}, pairs(5)[4]])
    other = write_jsonl(tmp_path / "b.jsonl", [*pairs(2, "blue"), {"prompt": "One 5", "completion": "two three"}])
    made = prepare(Data(train=str(file), eval=str(other)), TOKENIZER, seed=0)
    assert made.duplicates["train_duplicates"] == 2
    assert len(made.duplicates["train_duplicate_examples"]) == 2
    assert made.duplicates["eval_rows_in_train"] == 1
    lines = describe_duplicates(made.duplicates)
    assert lines[0].startswith("2 duplicates among the training rows")
    assert "One 5" in lines[1]
    assert made.report()["overlap"] == made.duplicates
    held = prepare(Data(train=str(file), eval_size=4), TOKENIZER, seed=0)
    assert held.duplicates["eval_rows_in_train"] == 0


def test_texts_are_compared_without_case_and_white_space() -> None:
    assert hash_text("The  CAT\n sat ") == hash_text("the cat sat") != hash_text("the cats at")


MEASURE = """
import re, sys
import numpy as np
sys.path.insert(0, {tests!r})
from conftest import make_tokenizer
from hfstrat.recipe.data import Data
from hfstrat.data.prepare import prepare
from hfstrat.data.splits import column
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
tokenizer = make_tokenizer()
prepare(Data(train={small!r}), tokenizer, seed=0)
before = peak()
made = prepare(Data(train={file!r}), tokenizer, seed=0, samples=3)
column(made.train, "length")
kept = [made.train, made.eval] if {hold} else []
held = [np.array(rows[place]["input_ids"], np.int32) for rows in kept for place in range(len(rows))]
print(len(made.train) + len(made.eval), peak() - before)
"""


def grown(folder: Path, count: int, hold: bool = False) -> tuple[float, float]:
    """MiB by which the peak memory of a process grows when it prepares this many rows after a few; and their size on the
    disk in MiB.

    Args:
        hold: whether the process then keeps the tokens of all rows in memory, for comparison.
    """
    folder.mkdir()
    said = sentences(1000)
    small = write_jsonl(folder / "small.jsonl", [{"text": f"{n} {said[n]}"} for n in range(1000)])
    texts = (f"{n} {said[n % 1000]} " + " ".join(said[(n + 7 * k) % 1000] for k in range(8)) for n in range(count))
    file = write_jsonl(folder / "rows.jsonl", [{"text": text} for text in texts])
    program = MEASURE.format(tests=str(Path(__file__).parents[1]), small=str(small), file=str(file), hold=hold)
    environment = os.environ | {"HFSTRAT_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == count
    return kilobytes / 1024, max(kept.stat().st_size for kept in (folder / "cache").glob("*.arrow")) / 2**20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Eight times the rows add a few numbers per row, far less than their tokens."""
    (little, few), (much, many) = grown(tmp_path / "few", 5_000), grown(tmp_path / "many", 40_000)
    held, _ = grown(tmp_path / "held", 40_000, hold=True)
    print(
        f"peak memory grows by {little:.1f} MiB for 5,000 rows ({few:.1f} MiB on the disk), {much:.1f} MiB for 40,000 "
        f"({many:.1f} MiB), {held:.1f} MiB where they are held"
    )
    bound = (many - few) / 2
    assert much - little < bound
    assert held - little > bound  # the test can fail
