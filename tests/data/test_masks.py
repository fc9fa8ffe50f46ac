"""Which tokens have loss, what a template writes, and the prompt that the model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data.formats import FORMATS, Example
from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

CHAT, PLAIN = make_tokenizer(), make_tokenizer(chat=False)
TALK = [
    {"role": "user", "content": "who sat"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "where"},
    {"role": "assistant", "content": "on the mat"},
]
TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(kind: str, row: dict[str, Any]) -> Example:
    return FORMATS[kind].parse(row)


def trained_text(example: Example, train_on: str = "auto", tokenizer: Any = CHAT) -> str:
    renderer = Renderer(tokenizer, "auto", train_on)
    _, labels = renderer.encode(renderer.render(example))[0]
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


CONVERSATION, PROMPTED = Example(messages=TALK), Example(messages=TALK, prompt_turns=3)
BOTH, LAST = "the cat<|im_end|>\non the mat<|im_end|>\n", "on the mat<|im_end|>\n"


@pytest.mark.parametrize(
    ("example", "train_on", "wanted"),
    [
        (CONVERSATION, "auto", BOTH),
        (CONVERSATION, "assistant", BOTH),
        (CONVERSATION, "completions", LAST),
        (PROMPTED, "auto", LAST),
        (PROMPTED, "assistant", BOTH),
        (PROMPTED, "completions", LAST),
    ],
)
def test_which_turns_have_loss(example: Example, train_on: str, wanted: str) -> None:
    assert trained_text(example, train_on) == wanted
    assert trained_text(example, train_on, PLAIN) == wanted.replace("\n", "")
    assert "who sat" in trained_text(example, "all")


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_a_turn_of_weight_zero_has_no_loss(key: str) -> None:
    talk = [TALK[0], {**TALK[1], key: 0}, *TALK[2:]]
    assert trained_text(read("messages", {"messages": talk})) == LAST
    assert trained_text(read("messages", {"messages": [{**turn, key: 1} for turn in TALK]})) == BOTH


@given(st.lists(st.text(max_size=20), min_size=2, max_size=7), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_prompt_has_the_ids_of_training(texts: list[str], chat: bool) -> None:
    """Every conversation up to its last answer, with both templates."""
    talk = [{"role": ["user", "assistant"][index % 2], "content": text} for index, text in enumerate(texts)]
    example, renderer = Example(messages=talk), Renderer(CHAT if chat else PLAIN, "auto")
    ids, _ = renderer.encode(renderer.render(example))[0]
    prompt = renderer.prompt_ids(example.prompt)
    assert ids[: len(prompt)] == prompt


def test_plain_conversations() -> None:
    renderer = Renderer(PLAIN, "auto")
    talk = [{"role": "system", "content": "be"}, *TALK]
    ids, _ = renderer.encode(renderer.render(Example(messages=talk)))[0]
    assert PLAIN.decode(ids) == "be\n\nwho sat\n\nthe cat<|im_end|>where\n\non the mat<|im_end|>"


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "find it"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "it"}}'},
        {"from": "observation", "value": "[1]"},
        {"from": "gpt", "value": "one"},
    ],
    "tools": '[{"name": "find", "description": "finds", "parameters": {}}]',
    "system": "be",
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "find it"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"what": "it"}'}}],
        },
        {"role": "tool", "content": "[1]"},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
    ],
    "tools": [TOOL],
}


def test_sharegpt_and_openai_parse_to_the_same_example() -> None:
    assert read("conversations", SHAREGPT) == read("messages", OPENAI)


def test_a_template_that_supports_tools_writes_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    renderer, example = Renderer(tokenizer, "auto"), read("messages", OPENAI)
    text = tokenizer.decode(renderer.encode(renderer.render(example))[0][0])
    assert text == tokenizer.apply_chat_template(example.messages, tools=example.tools, tokenize=False)
    assert (
        trained_text(example, tokenizer=tokenizer) == '{"name": "find", "arguments": {"what": "it"}}<|im_end|>\none<|im_end|>\n'
    )


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_tools_are_never_lost(tokenizer: Any) -> None:
    renderer, example = Renderer(tokenizer, "auto"), read("messages", OPENAI)
    ids, _ = renderer.encode(renderer.render(example))[0]
    text = tokenizer.decode(ids)
    assert '"description": "finds"' in text
    assert "<tool_response>\n[1]\n</tool_response>" in text
    said = trained_text(example, tokenizer=tokenizer)
    assert '<tool_call>\n{"name": "find", "arguments": {"what": "it"}}\n</tool_call>' in said
    assert "finds" not in said
    prompt = renderer.prompt_ids(example.prompt)
    assert ids[: len(prompt)] == prompt
    assert example.answer == "one"


def test_reasoning_is_kept() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "one"}]
    example = read("messages", {"messages": [TALK[0], {"role": "assistant", "content": parts}]})
    assert trained_text(example) == "<think>\nhm\n</think>\n\none<|im_end|>\n"


def test_invalid_messages_are_refused() -> None:
    for row, words in (
        ({"messages": [{"role": "assistant", "content": None}]}, "content is not text"),
        ({"messages": ["a"]}, "not a message"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "without a function name"),
        ({"messages": TALK, "tools": "[3]"}, "not a list of tool definitions"),
    ):
        with pytest.raises(BadRow, match=words):
            read("messages", row)


def test_a_history_is_part_of_the_prompt() -> None:
    row = {"instruction": "where", "input": "", "output": "on the mat", "history": [["who sat", "the cat"]]}
    assert read("alpaca", row) == PROMPTED


def test_a_template_file(tmp_path: Path) -> None:
    tokenizer, file = make_tokenizer(chat=False), tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"one {n}", "completion": "two"} for n in range(8)])
    made = prepare(Data(train=str(rows), eval_size=1, template=str(file)), tokenizer, seed=0)
    assert tokenizer.decode(made.eval[0]["input_ids"]).startswith("[user]one")
    tokenizer.save_pretrained(tmp_path / "saved")  # the saved tokenizer has the template of training
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == file.read_text()


def test_blank_answers_are_counted_and_refused(tmp_path: Path) -> None:
    good = [{"prompt": f"one {n}", "completion": "two"} for n in range(97)]
    file = write_jsonl(tmp_path / "rows.jsonl", [*good, *[{"prompt": "a", "completion": " "}] * 3])
    stats = prepare(Data(train=str(file)), CHAT, seed=0).statistics["train"]
    assert (stats.rows_blank, stats.rows_dropped, stats.rows_kept) == (3, 3, 97)
    write_jsonl(file, [*good, *[{"prompt": "a", "completion": ""}] * 10])
    with pytest.raises(UserError, match=r"10 of 107 rows \(9\.3%\) have no token .* in 10 of them the answer is blank"):
        prepare(Data(train=str(file)), CHAT, seed=0)


def test_prompts_that_fill_max_length_are_refused(tmp_path: Path) -> None:
    long = [{"prompt": "cat " * 60, "completion": "two"}] * 10
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"one {n}", "completion": "two " * 9} for n in range(90)] + long)
    with pytest.raises(UserError, match=r"10 of 100 rows \(10\.0%\).* the prompt alone fills data.max_length = 48"):
        prepare(Data(train=str(file), max_length=48), CHAT, seed=0)
    split = prepare(Data(train=str(file), max_length=48, overflow="split"), CHAT, seed=0).statistics["train"]
    assert (split.rows_kept, split.supervised_lost) == (100, 0)
