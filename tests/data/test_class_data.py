"""Labeled rows: which are read, how labels are found, what is held out, and the errors for unusable data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer, write_jsonl
from datasets import ClassLabel, Dataset, Features, Value
from helpers.classifiers import encoder_tokenizer

from hfstrat.data.classes import Classes, prepare
from hfstrat.data.labeled import LabeledText, Texts
from hfstrat.data.labels import label_of, sort_labels
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

TOKENIZER = make_tokenizer(chat=False)
ENCODER = encoder_tokenizer(types=True)
Rows = list[dict[str, Any]]


def texts_with(labels: list[Any], name: str = "label") -> Rows:
    return [{"text": f"the cat sat {number}", name: label} for number, label in enumerate(labels)]


@pytest.fixture
def made(tmp_path: Path) -> Any:
    def make(rows: Rows, evaluation: Rows | None = None, tokenizer: Any = TOKENIZER, **settings: Any) -> Classes:
        train = write_jsonl(tmp_path / "train.jsonl", rows)
        if evaluation is not None:
            settings["eval"] = str(write_jsonl(tmp_path / "eval.jsonl", evaluation))
        return prepare(Data(train=str(train), **settings), tokenizer, seed=0, samples=2)

    return make


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "a"] * 3, ("a", "b")),
        ([10, 9, 2] * 4, ("2", "9", "10")),
        ([1.0, 0.0] * 5, ("0", "1")),
        ([True, False] * 5, ("false", "true")),
        (["grade 10", "grade 9", "Grade 2"] * 4, ("Grade 2", "grade 9", "grade 10")),
    ],
    ids=["texts", "numbers", "whole floats", "booleans", "natural order"],
)
def test_labels_are_found_and_sorted_naturally(made: Any, labels: list[Any], names: tuple[str, ...]) -> None:
    data = made(texts_with(labels), eval_size=2)
    assert data.label_names == names
    expected = Counter(str(label_of(label, "label")) for label in labels)
    held = Counter(data.label_names[label] for label in data.eval["label"])
    assert {name: int(count) for name, count in zip(names, data.counts, strict=True)} == dict(expected - held)


def test_several_labels_per_row(made: Any) -> None:
    data = made(texts_with([["b", "a"], [], ["a"], ["c"]] * 5, "labels"), eval_size=4)
    assert data.many
    assert data.label_names == ("a", "b", "c")
    found = sorted(map(sorted, [*data.train["label"], *data.eval["label"]]))
    assert found == sorted([[0, 1], [], [0], [2]] * 5)
    assert data.report()["labels"]["problem_type"] == "multi_label_classification"


def test_class_labels_of_a_hub_set_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["worst", "never", "best"])})
    rows = Dataset.from_dict({"sentence": [f"a cat {n}" for n in range(12)], "label": [0, 2] * 6}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    data = prepare(Data(train="me/set", eval_size=2), TOKENIZER, seed=0)
    assert data.label_names == ("worst", "best")  # a label without rows is left out


def test_pairs_are_encoded_as_the_tokenizer_does(made: Any) -> None:
    rows = [{"premise": f"a cat {n}", "hypothesis": "two dogs ran", "label": n % 2} for n in range(8)]
    data = made(rows, eval_size=2, tokenizer=ENCODER)
    row = data.train[0]
    number = row["row"]
    expected = ENCODER(f"a cat {number}", "two dogs ran")
    assert row["input_ids"] == expected["input_ids"]
    assert row["token_type_ids"] == expected["token_type_ids"]
    assert "premise + hypothesis + label" in data.lines()[0]


def test_a_tokenizer_that_marks_no_boundary_gets_a_blank_line() -> None:
    texts = Texts(TOKENIZER, 64)
    ids = texts.encode([LabeledText("a cat", "a dog", [])])[0].input_ids
    assert TOKENIZER.decode(ids) == "a cat\n\na dog"


def test_long_texts_keep_their_special_tokens(made: Any) -> None:
    rows = [{"text": "the cat sat on the mat " * (1 + n), "label": n % 2} for n in range(12)]
    data = made(rows, eval_size=2, tokenizer=ENCODER, max_length=512)  # the tokenizer's own limit is 64
    longest = max([*data.train, *data.eval], key=lambda row: row["row"])
    assert longest["length"] == len(longest["input_ids"]) == 64
    assert longest["input_ids"][0] == ENCODER.cls_token_id
    assert longest["input_ids"][-1] == ENCODER.sep_token_id
    stats = data.statistics["train"]
    assert stats.rows_cut > 0
    assert stats.tokens_lost == sum(max(0, len(ENCODER(row["text"])["input_ids"]) - 64) for row in rows)
    assert any("64 tokens; special tokens are kept" in line for line in data.lines())
    assert made(rows, eval_size=2, tokenizer=ENCODER, overflow="drop").statistics["train"].rows_dropped == stats.rows_cut
    with pytest.raises(UserError, match="overflow: error"):
        made(rows, eval_size=2, tokenizer=ENCODER, overflow="error")


def test_the_held_out_rows_have_the_same_proportions_and_share_no_text(made: Any) -> None:
    rows = texts_with(["a"] * 100 + ["b"] * 40 + ["c"] * 20 + ["rare"])
    rows += [dict(row) for row in rows[:30]]  # copies
    data = made(rows, eval_size=40)
    held = Counter(data.label_names[label] for label in data.eval["label"])
    assert {name: abs(held[name] - share) <= 2 for name, share in (("a", 27), ("b", 8), ("c", 4))} == dict.fromkeys("abc", True)
    assert held["rare"] == 0
    assert data.duplicates["eval_rows_in_train"] == 0
    assert not {tuple(row) for row in data.train["input_ids"]} & {tuple(row) for row in data.eval["input_ids"]}
    again = made(rows, eval_size=40)
    assert again.eval["row"] == data.eval["row"]


def test_copies_and_texts_with_several_labels_are_reported(made: Any) -> None:
    rows = [*texts_with(["a", "b"] * 6), {"text": "The  CAT sat 0", "label": "b"}, {"text": "the cat sat 3", "label": "b"}]
    data = made(rows, [{"text": "the cat sat 4", "label": "a"}])
    assert data.duplicates["train_duplicates"] == 2
    assert data.duplicates["conflicting_texts"] == 1
    assert "cat sat 0" in data.duplicates["conflicting_text_examples"][0].lower()
    assert data.duplicates["eval_rows_in_train"] == 1
    assert any("different labels" in line for line in data.lines())


def test_class_imbalance_is_reported(made: Any) -> None:
    data = made(texts_with(["a"] * 30 + ["b"] * 10), texts_with(["a", "b"]))
    assert "10 of b (fewest), 30 of a (most) = 75.0%" in data.lines()[-1]
    assert data.report()["labels"]["training_rows"] == {"a": 30, "b": 10}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a"] * 8, "every row has the label 'a'; a classifier needs at least two"),
        (["a", None, "b", "a"], r"row 2: 'label' is null; expected a label"),
        (["a", " ", "b", "a"], r"row 2: 'label' is empty"),
        ([0.5, 1.25, 2.0], r"row 1: 'label' is 0.5; .* For numbers set task: regression"),
        (["0.5", "1.25", "2", "0.5"], r"numbers with fractions, such as 0.5 and 2"),
        ([["a"], "b"], r"row 2: 'label' is 'b', but other rows have a list"),
        ([[0, 1, 0], [1, 0, 0]], r"row 1: 'label' is a vector of 0 and 1: .*vectors of 0 and 1 are not supported"),
        ([{"a": 1}, {"b": 1}], r"row 1: 'label' is dict"),
        ([f"id {n}" for n in range(9)], "each of 9 rows has a different label"),
    ],
    ids=["one label", "null", "blank", "scores", "scores as text", "mixed", "vector", "object", "ids"],
)
def test_unusable_labels_are_refused(made: Any, labels: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(texts_with(labels), eval_size=1)


def test_a_label_that_training_does_not_have_is_refused(made: Any) -> None:
    with pytest.raises(UserError, match=r"data.eval: .*2 rows have the label 'c', which no training row has; .* a, b"):
        made(texts_with(["a", "b"] * 4), texts_with(["a", "c", "c"]))


def test_empty_texts_are_counted_and_too_many_are_refused(made: Any) -> None:
    rows = texts_with(["a", "b"] * 20)
    rows[3]["text"] = "  "
    stats = made(rows, eval_size=4).statistics["train"]
    assert (stats.rows_blank, stats.rows_kept, stats.rows_dropped) == (1, 39, 1)
    for row in rows[:10]:
        row["text"] = ""
    with pytest.raises(UserError, match="10 have an empty text"):
        made(rows, eval_size=4)


def test_ten_thousand_labels(made: Any) -> None:
    data = made(texts_with([n % 10_000 for n in range(20_000)]), texts_with(list(range(50))))
    assert len(data.label_names) == 10_000
    assert data.label_names[:3] == ("0", "1", "2")
    assert np.array_equal(data.counts, np.full(10_000, 2))


def test_the_fingerprint_covers_labels(made: Any) -> None:
    rows = texts_with(["a", "b"] * 6)
    first = made(rows, eval_size=2)
    assert made(rows, eval_size=2).fingerprint() == first.fingerprint()
    rows[0]["label"] = "b"
    assert made(rows, eval_size=2).fingerprint() != first.fingerprint()


def test_names_of_numbers_and_rows_without_a_label() -> None:
    assert label_of(1, "label", ["x", "y"]) == "y"
    with pytest.raises(BadRow, match="this row has no label"):
        label_of(-1, "label", ["x", "y"])
    assert label_of(-1, "label") == "-1"
    assert sort_labels(["1", "-1", "0"]) == ["-1", "0", "1"]
