"""All chat templates that TRL ships, against the masks of their training variants.

TRL's masks begin where the text of the assistant does, also within the generation prompt (`<|start|>assistant`, `<think>`),
which is no part of what a model generates: what hfstrat trains is the rest of it. A text that a template does not render
(calls, a system message, reasoning) is given to both as hfstrat writes it.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers.trl_templates import NAMES, PAIRED, TALKS, answers_of_ours, answers_of_trl, tokenizer_named

from hfstrat.data.coverage import Notes
from hfstrat.data.formats import FORMATS
from hfstrat.data.render import Renderer
from hfstrat.data.values import BadRow

DIFFERENT = {  # what TRL's variants change, by the first part of the name
    "gptoss": ("<|end|>", "<|return|>"),  # each answer is the last of its row, and ends as generation does
    "phi3": ("<|end|>\n", "<|end|>\n</s>"),  # likewise
    "diffusion": ("<tool_call|>", "<tool_call|><|tool_response>"),  # the end of a call is trained too
    "llava": ("</s>", "</s> "),  # the space that follows the end token
}


def renderer_of(name: str) -> Renderer:
    return Renderer(tokenizer_named(name), "chat", "assistant")


def test_there_are_pairs() -> None:
    assert len(PAIRED) >= 31


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_text_is_trained_as_by_trl(name: str, talk: str) -> None:
    given, renderer = TALKS[talk], renderer_of(name)
    example = FORMATS["messages"].parse(given)
    ours = answers_of_ours(renderer, example)  # what TRL trains is not refused
    assert renderer.chat
    assert renderer.notes.left_out == {}
    assert all(renderer.chat.mark.search(text[-30:].strip()[-22:]) for text in ours)  # an end is trained
    turns, tools, _ = renderer.chat.fit(example.messages or [], example.tools)
    theirs = answers_of_trl(renderer.tokenizer, turns, tools)
    assert theirs is not None or name not in PAIRED
    if theirs is None:
        return
    old, new = next((pair for key, pair in DIFFERENT.items() if name.startswith(key)), ("", ""))
    text = "".join(segment.text for row in renderer.render(example) for segment in row.segments)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        wanted = other if other.endswith(one) or not other.endswith(old) else other.removesuffix(old) + new
        one = one.removeprefix("<|turn>model\n")  # after the result of a tool it is generated, not prompted
        assert wanted.endswith(one)
        opening = wanted.removesuffix(one)
        assert opening.strip() in text


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_has_the_ids_of_training(name: str, talk: str) -> None:
    """Unless the run reports that the generation prompt begins the answer in another way."""
    renderer = renderer_of(name)
    example = FORMATS["messages"].parse(TALKS[talk])
    messages = example.messages or []
    rows = renderer.encode(renderer.render(example))
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if renderer.notes.unopened:
        assert renderer.notes.unopened_by.strip() in ("<think>", "</think>", "<think></think>", "<think>\n\n</think>")
        return
    for number, index in enumerate(answers):
        ids, labels = rows[min(number, len(rows) - 1)]
        prompt = renderer.prompt_ids({"messages": messages[:index], "tools": example.tools})
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_reasoning_that_the_template_removes_is_joined_to_the_prompt(name: str) -> None:
    answer = {"role": "assistant", "content": "<think>\nlook here\n</think>\n\nseven"}
    talk = [{"role": "user", "content": "find"}, answer, {"role": "user", "content": "and"}, answer]
    for train_on in ("assistant", "completions", "all"):
        renderer = Renderer(tokenizer_named(name), "chat", train_on)
        rows = renderer.render(FORMATS["messages"].parse({"messages": talk}))
        texts = [row.text for row in rows]
        assert all("<think>\nlook here\n</think>\n\nseven" in text for text in texts)
        prompt = renderer.prompt_ids(talk[:3])
        assert renderer.encode(rows)[-1][0][: len(prompt)] == prompt
        assert renderer.notes.unopened == 0
        lost: Any = {} if train_on == "assistant" else {"reasoning": 1}  # that of the first answer, as at generation
        assert renderer.notes.left_out == lost


def test_the_generation_prompt_of_nemotron_is_continued() -> None:
    renderer = renderer_of("nemotron_3_nano")
    (row,) = renderer.render(FORMATS["messages"].parse(TALKS["plain"]))
    assert row.segments[-2].text.endswith("assistant\n<think>\n")
    assert row.segments[-1].text == "</think>the cat<|im_end|>\n"


def test_options_decide_how_an_answer_begins() -> None:
    """Qwen3.5 without thinking: its generation prompt closes the thought, which reasoning does not begin with."""
    example = FORMATS["messages"].parse({"messages": [TALKS["plain"]["messages"][0], TALKS["tools"]["messages"][-1]]})
    closed = renderer_of("qwen3_5_nothink")
    closed.render(example)
    assert closed.notes.unopened == 1
    opened = Renderer(tokenizer_named("qwen3_5_nothink"), "chat", "assistant", {"enable_thinking": True})
    (row,) = opened.render(example)
    assert opened.notes == Notes()
    assert row.segments[-1].text == "look here\n</think>\n\nseven<|im_end|>\n"


def test_a_conversation_that_the_template_refuses_is_a_bad_row() -> None:
    talk = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "so"},
    ]
    with pytest.raises(BadRow, match=r"begins with the assistant\): .* alternate"):
        renderer_of("gemma").render(FORMATS["messages"].parse({"messages": talk}))
