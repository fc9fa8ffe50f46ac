"""Every text of a conversation is rendered, or counted and named; the end of each answer has loss, or the run says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, make_tokenizer, write_jsonl

from hfstrat.data.chat_template import check_options, options_of
from hfstrat.data.formats import FORMATS
from hfstrat.data.prepare import options_for, prepare
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import RESERVED, Data

USER, ANSWER = {"role": "user", "content": "who sat"}, {"role": "assistant", "content": "the cat"}
# roles other than these two are left out without a word
TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TWO_ROLES
SYSTEM_ONLY = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}" + TWO_ROLES
)
FIELD = TEMPLATE.replace(
    "{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
)
R1 = (  # as DeepSeek-R1-Distill: the generation prompt opens a thought, and reasoning is cut
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
OPENS = "{% if add_generation_prompt %}assistant\n{% endif %}"
NO_END = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}" + OPENS.replace(
    "assistant", "### assistant:"
)
NEXT_MARK = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}" + OPENS.replace("assistant", "<|assistant|>")
TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {}}}


def tokenizer_of(template: str, *marks: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks]})
    tokenizer.chat_template = template
    return tokenizer


def renderer_of(template: str, train_on: str = "auto", **options: Any) -> Renderer:
    return Renderer(tokenizer_of(template), "chat", train_on, options)


def texts(renderer: Renderer, row: dict[str, Any], kind: str = "messages") -> tuple[str, list[str]]:
    """The text of all rows of an example, and what is trained of each answer."""
    rows = renderer.render(FORMATS[kind].parse(row))
    return "".join(row.text for row in rows), [part.text for row in rows for part in row.segments if part.trained]


def lines(folder: Path, rows: list[dict[str, Any]], template: str, **options: Any) -> list[str]:
    file = folder / "t.jinja"
    file.write_text(template)
    given = {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "template": str(file), **options}
    return prepare(Data(**given), make_tokenizer(), seed=0).lines()


SYSTEM = {"role": "system", "content": "Be brief"}


@pytest.mark.parametrize("template", [TWO_ROLES, STRICT], ids=["left out", "refused"])
def test_a_system_message_without_a_place_begins_the_user_turn(template: str, tmp_path: Path) -> None:
    renderer = renderer_of(template)
    text, trained = texts(renderer, {"messages": [SYSTEM, USER, ANSWER]})
    assert text.startswith("<|im_start|>user\nBe brief\n\nwho sat<|im_end|>\n")
    assert trained == ["the cat<|im_end|>\n"]
    ids = renderer.encode(renderer.render(FORMATS["messages"].parse({"messages": [SYSTEM, USER, ANSWER]})))[0][0]
    prompt = renderer.prompt_ids([SYSTEM, USER])
    assert ids[: len(prompt)] == prompt
    rows = [{"messages": [SYSTEM, {**USER, "content": f"{n}"}, ANSWER]} for n in range(8)]
    assert any(
        "8 system messages are written at the beginning of a user turn" in line for line in lines(tmp_path, rows, template)
    )


def test_a_second_system_message() -> None:
    talk = [
        SYSTEM,
        USER,
        ANSWER,
        {"role": "system", "content": "In French"},
        USER,
        ANSWER,
        {**SYSTEM, "content": "Now"},
        ANSWER,
    ]
    text, trained = texts(renderer_of(SYSTEM_ONLY), {"messages": talk})
    assert text.startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nwho sat")
    assert "<|im_start|>user\nIn French\n\nwho sat<|im_end|>" in text
    assert "<|im_start|>user\nNow<|im_end|>\n<|im_start|>assistant" in text
    assert trained == ["the cat<|im_end|>\n"] * 3


def test_a_developer_message_is_a_system_message() -> None:
    text, _ = texts(renderer_of(SYSTEM_ONLY), {"messages": [{"role": "developer", "content": "Be brief"}, USER, ANSWER]})
    assert text.startswith("<|im_start|>system\nBe brief")
    assert (
        "<|im_start|>developer\nBe brief"
        in texts(renderer_of(TEMPLATE), {"messages": [{"role": "developer", "content": "Be brief"}, USER, ANSWER]})[0]
    )


@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("User", "Assistant"), ("user", "model")])
def test_names_of_roles(user: str, assistant: str) -> None:
    talk = [{**USER, "role": user}, {**ANSWER, "role": assistant}]
    assert texts(renderer_of(TWO_ROLES), {"messages": talk})[1] == ["the cat<|im_end|>\n"]


def test_an_unknown_role_is_named(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {"role": "critic", "content": f"no, {n}"}, ANSWER]} for n in range(8)]
    wanted = 'the chat template leaves out 8 messages of role critic (the first: "no, 0"): the model does not see them'
    assert any(line.endswith(wanted) for line in lines(tmp_path, rows, TWO_ROLES))


@pytest.mark.parametrize("template", [TWO_ROLES, STRICT, SYSTEM_ONLY])
def test_tools_stand_in_the_text(template: str, tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": f"{n}"}, ANSWER], "tools": [TOOL]} for n in range(8)]
    text, _ = texts(renderer_of(template), rows[0])
    assert '"name": "find"' in text
    shown = lines(tmp_path, rows, template)
    assert "8 with tools as text" in shown[0]
    assert not any("system messages" in line or "leaves out" in line for line in shown)


def test_tools_that_are_left_out_are_not_reported_as_text(tmp_path: Path) -> None:
    """A template that writes definitions only where the probe of tools sees them."""
    picky = "{% if tools and tools | length == 1 %}{{ tools | tojson }}{% endif %}" + TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    )
    rows = [{"messages": [{**USER, "content": f"{n}"}, ANSWER], "tools": [TOOL, TOOL]} for n in range(8)]
    shown = lines(tmp_path, rows, picky)
    assert "with tools" not in shown[0]
    assert any('leaves out 16 tool definitions (the first: "find")' in line for line in shown)


def test_the_older_form_of_calls() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"what": "it"}'}}
    old = {
        "messages": [USER, call, {"role": "function", "name": "find", "content": "[1]"}, ANSWER],
        "functions": [TOOL["function"]],
    }
    new_call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": {"what": "it"}}}]}
    new = {"messages": [USER, new_call, {"role": "tool", "name": "find", "content": "[1]"}, ANSWER], "tools": [TOOL]}
    assert FORMATS["messages"].parse(old) == FORMATS["messages"].parse(new)
    with pytest.raises(BadRow, match=r"not text but null \(it also has audio"):
        FORMATS["messages"].parse({"messages": [USER, {"role": "assistant", "content": None, "audio": "x"}]})


def test_calls_that_are_no_calls() -> None:
    written = {"role": "assistant", "content": None, "tool_calls": '[{"name": "find", "arguments": {}}]'}
    assert FORMATS["messages"].parse({"messages": [USER, written]}).messages[-1]["tool_calls"][0]["function"]["name"] == "find"
    for calls in (3, "find it", {"name": "find"}, "[]x"):
        with pytest.raises(BadRow, match=r"not a list of calls|without a function name"):
            FORMATS["messages"].parse({"messages": [USER, {**written, "tool_calls": calls}]})


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "so", "reasoning_content": "hm"},
        {"content": "so", "reasoning": "hm"},
        {"content": "so", "thinking": "hm", "reasoning": None},
        {"content": "so", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so"}]},
        {"content": [{"type": "reasoning", "reasoning": "hm"}, "so"]},
    ],
)
def test_reasoning_under_any_name(answer: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    assert texts(renderer_of(FIELD), row)[1] == ["<think>hm</think>so<|im_end|>\n"]
    assert texts(renderer_of(TEMPLATE), row)[1] == ["<think>\nhm\n</think>\n\nso<|im_end|>\n"]
    assert texts(renderer_of(R1), row)[1] == ["hm\n</think>\n\nso<|im_end|>\n"]
    plain = Renderer(make_tokenizer(chat=False), "plain")
    assert texts(plain, row)[1] == ["<think>\nhm\n</think>\n\nso"]


def test_reasoning_of_the_context_that_is_cut_is_counted(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso"}
    rows = [{"messages": [{**USER, "content": f"{n}"}, thought, USER, thought]} for n in range(8)]
    for train_on, counted in (("all", True), ("completions", True), ("assistant", False)):
        shown = lines(tmp_path, rows, R1, train_on=train_on)
        assert any("leaves out 8 reasoning" in line for line in shown) is counted


def test_answers_that_do_not_begin_as_the_generation_prompt_are_reported(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": f"{n}"}, ANSWER]} for n in range(8)]
    shown = lines(tmp_path, rows, R1)
    wanted = r'ends with "<think>\n", with which 8 answers do not begin: trained without it'
    assert any(wanted in line and "set data.template to a generation prompt" in line for line in shown)
    shown = lines(tmp_path, rows, "{% if deep %}{% endif %}" + R1)
    assert any("data.chat_template_kwargs (the template reads deep) or data.template" in line for line in shown)
    text, trained = texts(renderer_of(R1), rows[0])
    assert trained == ["the cat<|im_end|>\n"]
    assert "<think>" not in text


def test_the_end_of_answers_is_reported(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": f"{n}"}, ANSWER]} for n in range(8)]
    assert any("writes no end token" in line for line in lines(tmp_path, rows, NO_END))
    assert any('"<|user|>", which is not a token' in line for line in lines(tmp_path, rows, NEXT_MARK))
    assert not any(" end " in line for line in lines(tmp_path, rows, TEMPLATE))
    assert any("<|done|>" in line for line in lines(tmp_path, rows, TEMPLATE.replace("<|im_end|>", "<|done|>")))


def test_the_mark_of_the_next_turn_ends_an_answer() -> None:
    tokenizer = tokenizer_of(NEXT_MARK, "<|user|>", "<|assistant|>", "<|system|>")
    renderer, talk = Renderer(tokenizer, "chat"), [USER, ANSWER, SYSTEM, USER, ANSWER, USER, ANSWER]
    text, trained = texts(renderer, {"messages": talk})
    assert trained == ["the cat<|system|>", "the cat<|user|>", "the cat<|user|>"]
    assert text.endswith("the cat<|user|>")
    assert '"<|user|>", which begins the next turn, has loss' in renderer.end_remark
    ids, _ = renderer.encode(renderer.render(FORMATS["messages"].parse({"messages": talk})))[0]
    for index in (1, 4, 6):
        prompt = renderer.prompt_ids(talk[:index])
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("template", [TEMPLATE, TWO_ROLES, R1, NEXT_MARK, "<|im_start|>system\nhi<|im_end|>\n" + TEMPLATE])
@pytest.mark.parametrize("train_on", ["auto", "all"])
def test_the_assistant_speaks_first(template: str, train_on: str) -> None:
    renderer = renderer_of(template, train_on)
    row = {"messages": [{"role": "assistant", "content": "hello"}, USER, ANSWER]}
    text, trained = texts(renderer, row)
    assert "hello" in text
    if train_on == "auto":
        assert [part[:5] for part in trained] == ["hello", "the c"]
        silent = {"messages": [{"role": "assistant", "content": "hello", "weight": 0}, USER, ANSWER]}
        assert [part[:5] for part in texts(renderer, silent)[1]] == ["the c"]
    alone = {"messages": [{"role": "assistant", "content": "hello"}]}
    assert texts(renderer, alone)[1][-1].strip().removesuffix("<|im_end|>").endswith(("hello", "<|user|>"))


def test_a_greeting_that_the_template_does_not_render_alone_has_no_loss(tmp_path: Path) -> None:
    asks = (
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user') }}{% endif %}"
        + TEMPLATE
    )
    rows = [{"messages": [{"role": "assistant", "content": "hello"}, {**USER, "content": f"{n}"}, ANSWER]} for n in range(8)]
    text, trained = texts(renderer_of(asks), rows[0])
    assert "hello" in text
    assert trained == ["the cat<|im_end|>\n"]
    assert any("8 answers before the first user turn have no loss" in line for line in lines(tmp_path, rows, asks))


def test_empty_answers_have_no_loss(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "content": f"{n}"}, {**ANSWER, "content": " "}, USER, ANSWER]} for n in range(8)]
    for template in (TEMPLATE, R1):
        assert texts(renderer_of(template), rows[0])[1] == ["the cat<|im_end|>\n"]
    assert any("8 answers without text among others have no loss" in line for line in lines(tmp_path, rows, TEMPLATE))
    completion = {"prompt": [USER, ANSWER, USER], "completion": ""}
    assert texts(renderer_of(TEMPLATE), completion, "prompt-completion")[1] == []


OPTION = "{% if brief is defined and brief %}Be brief. {% endif %}" + TEMPLATE


def test_options_of_the_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(OPTION)
    assert options_of(OPTION) == ["brief"]
    for options, begins in (({}, False), ({"brief": True}, True), ({"brief": False}, False)):
        renderer = Renderer(tokenizer, "chat", options=options)
        assert texts(renderer, {"messages": [USER, ANSWER]})[0].startswith("Be brief") is begins
        assert tokenizer.decode(renderer.prompt_ids([USER])).startswith("Be brief") is begins
    own = {"messages": [USER, ANSWER], "chat_template_kwargs": '{"brief": true}'}
    assert texts(Renderer(tokenizer, "chat"), own)[0].startswith("Be brief")
    example = FORMATS["messages"].parse(own)
    assert tokenizer.decode(Renderer(tokenizer, "chat").prompt_ids(example.prompt)).startswith("Be brief")
    with pytest.raises(UserError, match=r"data.chat_template_kwargs: .* does not read 'breif'; did you mean brief\?"):
        Renderer(tokenizer, "chat", options={"breif": True})
    with pytest.raises(UserError, match="the plain template has no arguments"):
        Renderer(tokenizer, "plain", options={"brief": True})
    rows = [
        {"messages": [{**USER, "content": f"{n}"}, ANSWER], "chat_template_kwargs": {"deep": 1, "brief": None}}
        for n in range(8)
    ]
    assert any("leaves out 8 chat_template_kwargs named deep" in line for line in lines(tmp_path, rows, OPTION))
    with pytest.raises(BadRow, match="'chat_template_kwargs' is not valid JSON"):
        FORMATS["messages"].parse({**own, "chat_template_kwargs": "brief"})


def test_a_teacher_gets_the_options_that_its_template_reads(tmp_path: Path) -> None:
    data = Data(train="rows.jsonl", chat_template_kwargs={"brief": True})
    assert options_for(tokenizer_of(OPTION), data) == {"brief": True}
    assert options_for(tokenizer_of(TEMPLATE), data) == {}
    assert options_for(make_tokenizer(chat=False), data) == {}


def test_options_are_part_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [{**USER, "content": f"{n}"}, ANSWER]} for n in range(8)]
    for options, count in (({}, 1), ({"brief": True}, 2), ({"brief": True}, 2)):
        lines(tmp_path, rows, OPTION, chat_template_kwargs=options)
        assert len(list((tmp_path / "cache").rglob("rows-*.arrow"))) == count


def test_reserved_options() -> None:
    import inspect

    from transformers import PreTrainedTokenizerBase

    assert set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self"} <= set(RESERVED)
    for name in ("tokenize", "tools", "bos_token"):
        with pytest.raises(ValueError, match=f"{name}: hfstrat sets this itself"):
            Data(train="rows.jsonl", chat_template_kwargs={name: 1})


def test_options_of_several_templates() -> None:
    both = {"default": TEMPLATE, "tool_use": "{% set own = 1 %}{% generation %}{{ deep | default(own) }}{% endgeneration %}"}
    assert options_of(both) == ["deep"]
    check_options({"deep": 1}, both, "here")


def test_the_first_token_has_no_loss() -> None:
    renderer = renderer_of(TEMPLATE, "all")
    ids, labels = renderer.encode(renderer.render(FORMATS["messages"].parse({"messages": [USER, ANSWER]})))[0]
    assert labels == [IGNORED, *ids[1:]]
