"""Rewards by name score what they say they do, and rows of prompts are read in every form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl

from hfstrat.data.prompts import EMPTY, NO_ANSWER, PromptFormat
from hfstrat.errors import UserError
from hfstrat.objectives.reinforcement.rewards import Scorer
from hfstrat.objectives.reinforcement.task import RewardTask
from hfstrat.recipe.data import Data
from hfstrat.recipe.schema import OBJECTIVES

TOKENIZER = make_tokenizer()


def scorer(*rewards: Any) -> Scorer:
    return Scorer(OBJECTIVES["grpo"].model_validate({"name": "grpo", "rewards": list(rewards)}), TOKENIZER)  # type: ignore[arg-type]


def score(reward: Any, answer: str, reference: str | None = None, prompt: Any = "a", **columns: Any) -> float | None:
    given = {"prompt": prompt, "answer": reference, "columns": columns}
    return scorer(reward).score(0, [given], [TOKENIZER(answer, add_special_tokens=False)["input_ids"]])[0]


SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "array", "items": {"type": "number"}}}}
LAST = {"name": "exact_match", "pattern": r"answer: (\w+)"}
LENGTH = {"name": "length", "min_length": 4, "max_length": 10, "unit": "characters"}


@pytest.mark.parametrize(
    ("reward", "answer", "reference", "wanted"),
    [
        ("exact_match", " cat\n", "cat", 1.0),
        ("exact_match", "Cat", "cat", 0.0),
        ("exact_match", "", "cat", 0.0),
        ({"name": "exact_match", "ignore_case": True}, "Straße", "STRASSE", 1.0),
        (LAST, "answer: dog, no, answer: cat", "the answer: cat", 1.0),
        (LAST, "cat", "answer: cat", 0.0),
        (LAST, "cat", "cat", 0.0),  # the pattern does not occur in the answer
        (LAST, "answer: cat", "cat", 1.0),  # nor in that of the row, which is then compared as it is
        ({"name": "regex", "pattern": "^<think>.*</think>"}, "<think>so</think> cat", None, 1.0),
        ({"name": "regex", "pattern": "cat"}, "CAT", None, 0.0),
        ("json_valid", '{"a": [1, 2]}', None, 1.0),
        ("json_valid", "[]\n", None, 1.0),
        ("json_valid", "12", None, 0.0),  # JSON, but no object or list
        ("json_valid", '```json\n{"a": 1}\n```', None, 0.0),
        ("json_valid", '{"a": 1} and more', None, 0.0),
        ("json_valid", "[" * 3000, None, 0.0),
        ({"name": "json_schema", "json_schema": SCHEMA}, '{"a": [1, 2.5]}', None, 1.0),
        ({"name": "json_schema", "json_schema": SCHEMA}, '{"a": ["b"]}', None, 0.0),
        ({"name": "json_schema", "json_schema": SCHEMA}, "{}", None, 0.0),
        (LENGTH, "abcd", None, 1.0),
        (LENGTH, "ab", None, 0.5),
        (LENGTH, "a" * 15, None, 0.5),
        (LENGTH, "a" * 40, None, 0.0),
        ({"name": "length", "max_length": 2, "unit": "words"}, "a b c", None, 0.5),
        ("numeric", "so 3 + 4 is 7.", "#### 7", 1.0),
        ("numeric", "$1,234.50", "1234.5", 1.0),
        ("numeric", "-3", "3", 0.0),
        ("numeric", "1e3", "1000", 1.0),
        ("numeric", "seven", "7", 0.0),
        ("numeric", "7", "it is seven", 0.0),
        ("numeric", "#### 8\nno 7", "7", 1.0),
    ],
)
def test_rewards_by_name(reward: Any, answer: str, reference: str | None, wanted: float) -> None:
    assert score(reward, answer, reference) == pytest.approx(wanted)


def test_functions_are_called_as_by_trl(tmp_path: Path) -> None:
    """Texts for a prompt that is text, messages for messages; columns as lists; only what the function takes."""
    file = tmp_path / "mine.py"
    file.write_text(
        "seen = []\n"
        "def all_of_it(prompts, completions, **rest):\n    seen.append((prompts, completions, rest))\n    return [None]\n"
        "def few(completions, level):\n    return [level[0] * len(completions[0])]\n"
        "async def later(completions, **rest):\n    return [2]\n"
    )
    mine = f"{file}:all_of_it"
    assert score(mine, "cat", "ref", level=3) is None
    messages = [{"role": "user", "content": "a"}]
    assert score(mine, "cat", None, messages) is None
    from hfstrat.objectives.reinforcement.rewards import _load

    (one, two) = _load(file, "all_of_it").__globals__["seen"]
    assert one[:2] == (["a"], ["cat"])
    assert one[2]["level"] == [3]
    assert one[2]["answer"] == ["ref"]
    assert two[:2] == ([messages], [[{"role": "assistant", "content": "cat"}]])
    assert score(f"{file}:few", "cat", level=2) == 6.0
    assert score(f"{file}:later", "cat") == 2.0


def test_a_repeated_reward_has_a_number() -> None:
    assert scorer("json_valid", {"name": "regex", "pattern": "a"}, {"name": "regex", "pattern": "b"}).names == [
        "json_valid",
        "regex",
        "regex_2",
    ]


USER, REPLY = {"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}
FORMS: dict[str, dict[str, Any]] = {
    "text and answer": {"prompt": "a cat", "answer": "sat"},
    "messages and answer": {"prompt": [USER], "answer": "sat"},
    "a completion": {"prompt": "a cat", "completion": "sat"},
    "a completion of messages": {"prompt": [USER], "completion": [REPLY]},
    "a conversation": {"messages": [USER, REPLY]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a cat"}, {"from": "gpt", "value": "sat"}]},
    "Alpaca": {"instruction": "a cat", "output": "sat"},
    "a solution": {"prompt": "a cat", "solution": "sat"},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_has_the_same_prompt_and_answer(row: dict[str, Any]) -> None:
    found = PromptFormat.detect([row], "rows", "auto", {}).example(row)
    assert [(turn["role"], turn["content"]) for turn in found.messages] == [("user", "a cat")]
    assert found.answer == "sat"
    assert json.loads(found.given())["columns"] == row


def test_answers_that_are_no_text() -> None:
    reading = PromptFormat.detect([{"prompt": "a", "answer": 3}], "rows", "auto", {})
    assert reading.example({"prompt": "a", "answer": 3}).answer == "3"
    assert reading.example({"prompt": "a", "answer": {"b": [1]}}).answer == '{"b": [1]}'
    assert reading.example({"prompt": "a", "answer": None}).answer is None
    assert reading.example({"prompt": " "}).problem == EMPTY


def prepare(folder: Path, rows: list[dict[str, Any]], reward: Any = "json_valid", **data: Any) -> Any:
    section = OBJECTIVES["grpo"].model_validate({"name": "grpo", "rewards": [reward]})
    folder.mkdir(exist_ok=True)
    file = write_jsonl(folder / "rows.jsonl", rows)
    given = {"train": str(file), "eval_size": 4, "max_length": 64, **data}
    return RewardTask(section).rows.prepare(Data.model_validate(given), TOKENIZER, 0)  # type: ignore[arg-type]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {n}", "answer": "sat"} for n in range(60)]
    rows[3] = {"prompt": "a 3", "answer": None}
    rows[5] = {"prompt": "cat " * 90, "answer": "sat"}
    found = prepare(tmp_path / "needed", rows, "exact_match").statistics["train"]
    assert (found.rows_read, found.rows_kept, found.rows_dropped) == (60, 58, 2)
    assert found.unusable == {NO_ANSWER: 1, "a prompt of more than data.max_length = 64 tokens": 1}
    assert prepare(tmp_path / "not", rows).statistics["train"].rows_kept == 59
    with pytest.raises(UserError, match=r"row 6: its prompt has \d+ tokens, more than data\.max_length = 64"):
        prepare(tmp_path / "error", rows, overflow="error")
    with pytest.raises(UserError, match="cannot be trained on: 60 with no answer to compare with"):
        prepare(tmp_path / "none", [{"prompt": row["prompt"]} for row in rows], "exact_match")
    with pytest.raises(UserError, match="cannot be trained on: 60 with a prompt without text"):
        prepare(tmp_path / "blank", [{"prompt": ""} for _ in rows])


def test_the_ids_are_those_of_generation(tmp_path: Path) -> None:
    """A prompt is what `Renderer.prompt_ids` gives the model before it answers, and has no loss."""
    found = prepare(tmp_path, [{"prompt": f"a {n}", "system": "be brief"} for n in range(20)])
    row = found.train[0]
    given = json.loads(row["given"])
    assert row["input_ids"] == found.renderer.prompt_ids({"messages": given["prompt"]})
    assert TOKENIZER.decode(row["input_ids"]).endswith("<|im_start|>assistant\n")
    assert set(row["labels"]) == {-100}
    assert math.isclose(sum(found.lengths), sum(len(ids) for ids in found.train["input_ids"]))


def test_files_with_dataclasses_and_sparse_columns(tmp_path: Path) -> None:
    """A column that a row lacks is null, and a function may ask for what TRL gives it."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    b: int = 1\n"
        "def mine(completions, hint, log_metric, trainer_state):\n"
        "    log_metric('m', 1.0)\n    return [float(each is None) + trainer_state.global_step for each in hint]\n"
    )
    reading = PromptFormat.detect([{"prompt": "a", "hint": None}, {"prompt": "b", "hint": "c"}], "rows", "auto", {})
    given = [json.loads(reading.example(row).given()) for row in ({"prompt": "a"}, {"prompt": "b", "hint": "c"})]
    assert scorer(f"{file}:mine").score(0, given, [[1], [2]]) == [1.0, 0.0]


def test_a_schema_that_refers_to_nothing_is_named() -> None:
    reward = {"name": "json_schema", "json_schema": {"$ref": "#/missing"}}
    with pytest.raises(UserError, match=r"objective\.rewards: json_schema, for the prompt \"a\""):
        score(reward, "{}")


def test_prompts_of_a_source_have_one_form() -> None:
    reading = PromptFormat.detect([{"prompt": "a", "system": "s"}], "rows", "auto", {})
    forms = [json.loads(reading.example({"prompt": "a", "system": system}).given())["prompt"] for system in ("s", None)]
    assert all(isinstance(form, list) for form in forms)
