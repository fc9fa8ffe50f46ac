"""Rows of preferences: every form of them has the same prompt and the same answers; what cannot be trained on is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from helpers.rows import of_commands

from hfstrat.data import preferences
from hfstrat.data.preference_rows import CUT_ALIKE, longest_sequence, two
from hfstrat.data.preferences import BLANK, EQUAL, NO_LABEL, OTHER_PROMPT, LabeledFormat, PreferenceFormat
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.objectives.preference.task import PreferenceTask
from hfstrat.recipe.data import Data
from hfstrat.recipe.schema import OBJECTIVES

TOKENIZER = make_tokenizer()
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "a cat"), ("assistant", "good"), ("assistant", "bad"))
)
HUMAN, GPT = {"from": "human", "value": "a cat"}, {"from": "gpt", "value": "good"}
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "a cat", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "a prompt as text": {"prompt": "a cat", "chosen": [GOOD], "rejected": [BAD]},
    "conversations without a prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversations with their prompt": {"prompt": "a cat", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversations and messages of the prompt": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "alpaca": {"instruction": "a cat", "input": "", "output": "good", "chosen": "good", "rejected": "bad"},
    "sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "bad"}},
    "messages and one message each": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "llama-factory 1": {"chosen_messages": [USER, {**GOOD, "loss_weight": 1.0}], "rejected_messages": [USER, BAD]},
    "half missing": {
        "prompt": "a cat",
        "chosen": None,
        "chosen_messages": [GOOD],
        "rejected": "bad",
        "rejected_messages": None,
    },
}


def read(row: dict[str, Any], kind: type[PreferenceFormat] = PreferenceFormat) -> preferences.Preference:
    return kind.detect([row], "rows", "auto", {}).example(row)


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_pair(row: dict[str, Any]) -> None:
    found = read(row)
    assert found.problem == ""
    assert found.messages == [USER]
    texts = [[(turn["role"], turn["content"]) for turn in answer] for answer in found.answers]
    assert texts == [[("assistant", "good")], [("assistant", "bad")]]
    assert found.answer == "good"


def test_turns_before_the_answers_are_the_prompt() -> None:
    before = [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": "so?"},
    ]
    found = read({"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert found.messages == before
    assert found.examples()[1].prompt_turns == 4


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": " b "}, EQUAL),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, EQUAL),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, BLANK),
        ({"prompt": "a", "chosen": "b", "rejected": []}, BLANK),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "a dog"}, BAD]}, OTHER_PROMPT),
        ({"prompt": "a dog", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, OTHER_PROMPT),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, OTHER_PROMPT),
    ],
)
def test_problems_of_pairs(row: dict[str, Any], problem: str) -> None:
    assert read(row).problem == problem


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (0, False), ("True", True), ("1", True), (1.0, True), ("good", None), (None, None), (2, None)],
)
def test_labels(value: Any, label: bool | None) -> None:
    found = read({"prompt": "a cat", "completion": "good", "label": value}, LabeledFormat)
    assert found.desirable is label
    assert found.problem == ("" if label is not None else NO_LABEL)


def test_the_last_turn_of_a_labeled_conversation_is_the_answer() -> None:
    found = read({"messages": [USER, BAD, USER, GOOD], "label": True}, LabeledFormat)
    assert found.messages == [USER, BAD, USER]
    assert found.answers == ([GOOD],)


def test_a_pair_without_a_prompt_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match="no prompt"):
        read({"prompt": None, "chosen": "a", "rejected": "b"})


def prepared(folder: Path, rows: list[dict[str, Any]], name: str = "dpo", **data: Any) -> Any:
    section = OBJECTIVES[name].model_validate({"name": name})
    folder.mkdir(exist_ok=True)
    file = write_jsonl(folder / "rows.jsonl", rows)
    return PreferenceTask(section).rows.prepare(Data(train=str(file), eval_size=2, **data), TOKENIZER, seed=0, samples=1)


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"the cat {number}", "chosen": f"a mat {number}", "rejected": "the dog", **more}


def test_what_cannot_be_trained_on_is_counted(tmp_path: Path) -> None:
    rows = [pair(n) for n in range(60)]
    rows[7]["rejected"], rows[9]["chosen"] = rows[7]["chosen"], ""
    found = prepared(tmp_path, rows)
    stats = found.statistics["train"]
    assert stats.unusable == {EQUAL: 1, BLANK: 1}
    assert stats.rows_kept == 58 == len(found.train) + len(found.eval)
    assert f"1 with {EQUAL}" in stats.line()
    assert found.samples[0]["reference"].startswith("a mat")


def test_too_many_are_refused(tmp_path: Path) -> None:
    rows = [pair(n, **({"rejected": f"a mat {n}"} if n % 10 == 0 else {})) for n in range(60)]
    with pytest.raises(UserError, match=rf"6 of 60 rows \(10\.0%\) cannot be trained on: 6 with {EQUAL}"):
        prepared(tmp_path, rows)


def test_answers_that_are_cut_to_the_same_tokens(tmp_path: Path) -> None:
    rows = [pair(n) for n in range(1200)]
    same = " ".join(["one two three"] * 20)
    rows[3] = pair(3, chosen=f"{same} red", rejected=f"{same} blue")
    found = prepared(tmp_path, rows, max_length=40, overflow="truncate")
    assert found.statistics["train"].unusable == {CUT_ALIKE: 1}


def test_both_sequences_are_masked_to_their_answers(tmp_path: Path) -> None:
    found = prepared(tmp_path, [pair(n) for n in range(20)])
    row = found.train[0]
    texts = []
    for part in two(row):
        trained = [token for token, label in zip(part["input_ids"], part["labels"], strict=True) if label >= 0]
        texts.append((TOKENIZER.decode(part["input_ids"]), TOKENIZER.decode(trained)))
    (chosen, of_chosen), (rejected, of_rejected) = texts
    assert of_chosen.startswith("a mat")
    assert of_rejected == "the dog<|im_end|>\n"
    assert chosen.removesuffix(of_chosen) == rejected.removesuffix(of_rejected)
    assert row["length"] == len(row["input_ids"]) == sum(len(part["input_ids"]) for part in two(row))
    assert longest_sequence(found.train) == max(len(part["input_ids"]) for each in found.train for part in two(each))


def test_a_pair_is_two_answers_for_kto(tmp_path: Path) -> None:
    found = prepared(tmp_path, [pair(n, rejected=f"the dog {n}") for n in range(20)], "kto")
    assert found.statistics["train"].rows_kept == 20
    assert len(found.train) + len(found.eval) == 40
    assert set(found.train["desirable"][:]) == {0, 1}
    for row in found.train:
        (prompt, answer), (same_prompt, other) = (TOKENIZER.decode(part["input_ids"]).split("assistant") for part in two(row))
        assert prompt == same_prompt
        assert answer.split("<")[0].split()[-1] != other.split("<")[0].split()[-1], "answers to the same prompt"


def both(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Prompt and answer of the two sequences of a token row."""
    return [tuple(TOKENIZER.decode(part["input_ids"]).split("<|im_start|>assistant\n")) for part in two(row)]  # type: ignore[misc]


def test_the_answer_to_another_prompt_is_one(tmp_path: Path) -> None:
    """Rows grouped by prompt, as of ratings: the answer from which the divergence is estimated is none to the same prompt."""
    given = [
        {"prompt": f"a mat {number // 4 + 1}", "completion": f"cat {number // 4 + 1} {number % 4}", "label": True}
        for number in range(40)
    ]
    found = prepared(tmp_path, given, "kto")
    for row in (*found.train, *found.eval):
        (prompt, _), (_, other) = both(row)
        assert prompt.split()[-1].removesuffix("<|im_end|>") != other.split()[1], (prompt, other)


def test_a_long_answer_costs_its_neighbor_nothing(tmp_path: Path) -> None:
    """Prompt of one row and answer of another are together beyond `max_length`: neither row is dropped, cut or refused."""
    words = " ".join(["one two three"] * 8)
    given = [
        {"prompt": f"{words} {n}" if n % 2 else f"a {n}", "completion": f"a {n}" if n % 2 else words, "label": True}
        for n in range(40)
    ]
    alone = prepared(tmp_path / "alone", given, "kto", max_length=200).statistics["train"]
    longest = max(len(two(row)[0]["input_ids"]) for row in prepared(tmp_path / "all", given, "kto", max_length=200).train)
    for overflow in ("truncate", "drop", "error"):
        found = prepared(tmp_path / overflow, given, "kto", max_length=longest, overflow=overflow)
        stats = found.statistics["train"]
        assert (stats.rows_kept, stats.rows_cut, stats.supervised_lost) == (40, 0, 0)
        assert stats.supervised == alone.supervised
        assert longest_sequence(found.train) <= longest
        assert all(any(label >= 0 for label in part["labels"]) for row in found.train for part in two(row))


def test_a_prompt_of_which_conversations_repeat_the_end_is_kept() -> None:
    system, earlier = {"role": "system", "content": "be kind"}, {"role": "assistant", "content": "hello"}
    for before in ([system], [system, {"role": "user", "content": "hi"}, earlier]):
        row = {"prompt": [*before, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
        found = preferences.pair(row)
        assert [turn["content"] for turn in found.messages] == [turn["content"] for turn in (*before, USER)]
        assert not found.problem


def test_a_completion_that_is_the_conversation(tmp_path: Path) -> None:
    for row in ({"prompt": [USER], "completion": [USER, GOOD]}, {"prompt": None, "completion": [USER, GOOD]}):
        found = preferences.labeled(row | {"label": True})
        assert [turn["content"] for turn in found.messages] == ["a cat"]
        assert found.answer == "good"


def test_the_reason_is_named_where_no_row_can_be_used(tmp_path: Path) -> None:
    given = [{"prompt": f"a {n}", "completion": "cat", "label": "good"} for n in range(20)]
    with pytest.raises(UserError, match=f"20 with {NO_LABEL}"):
        prepared(tmp_path, given, "kto")


@pytest.mark.parametrize("added", [{"label": None}, {"chosen": None, "rejected": None}], ids=["label", "pair"])
def test_columns_that_are_null_everywhere_do_not_identify_rows(tmp_path: Path, added: dict[str, Any]) -> None:
    rows = [{"prompt": f"a {n}", "completion": "cat"} | added for n in range(24)]
    assert of_commands(write_jsonl(tmp_path / "rows.jsonl", rows), "causal-lm") == dict.fromkeys(
        ("preflight", "train", "advise"), 24
    )
