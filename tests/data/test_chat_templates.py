"""Templates that render earlier turns differently once more follow: one row per answer, as at generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, sentences, write_jsonl
from helpers.tokenizer_kinds import HEAD, TAIL, THINKING
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data.formats import Example, Message
from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED, RENDER_VERSION, Renderer
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

END, START = "<|im_end|>\n", "<|im_start|>"
# thoughts of earlier answers are left out, and there is no empty block
STRIPPING = HEAD + (
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ said }}{% else %}{{ m.content }}{% endif %}" + TAIL
)
TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "it"}}}


def talk_of(texts: list[str], thoughts: list[bool], system: bool = False) -> list[Message]:
    talk: list[Message] = [{"role": "system", "content": "be"}] if system else []
    for index, text in enumerate(texts):
        thought = "<think>\nhm\n</think>\n\n" if index % 2 and thoughts[index % len(thoughts)] else ""
        talk.append({"role": ["user", "assistant"][index % 2], "content": thought + text})
    return talk


TALK = talk_of(["who sat", "the cat", "where", "on the mat", "why", "not"], [False])
THOUGHT = talk_of(["who sat", "the cat", "where", "on the mat"], [True])


def renderer_of(template: str, train_on: str = "auto") -> Renderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, "auto", train_on)


def rows_of(renderer: Renderer, example: Example) -> list[tuple[list[int], list[int]]]:
    return renderer.encode(renderer.render(example))


def trained_text(renderer: Renderer, row: tuple[list[int], list[int]]) -> str:
    return str(renderer.tokenizer.decode([label for label in row[1] if label != IGNORED]))


def check(renderer: Renderer, example: Example, answers: list[int]) -> list[tuple[list[int], list[int]]]:
    """The law: each row is the prompt, with the ids of generation, then what the template adds for the answer, with loss."""
    rows = rows_of(renderer, example)
    assert len(rows) == len(answers)
    for index, row in zip(answers, rows, strict=True):
        ids, labels = row
        assert example.messages
        prompt = renderer.prompt_ids({"messages": example.messages[:index], "tools": example.tools})
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
        chat = renderer.tokenizer.apply_chat_template
        text = chat(example.messages[: index + 1], tools=example.tools, tokenize=False)
        before = chat(example.messages[:index], tools=example.tools, tokenize=False, add_generation_prompt=True)
        assert renderer.tokenizer.decode(ids) == text
        assert trained_text(renderer, row) == text[len(before) :]
        assert text.endswith(END)
    return rows


@pytest.mark.parametrize("template", [THINKING, STRIPPING], ids=["thinking", "stripping"])
def test_one_row_per_answer(template: str) -> None:
    renderer = renderer_of(template)
    first, last = check(renderer, Example(messages=THOUGHT), [1, 3])
    assert trained_text(renderer, first) == f"<think>\nhm\n</think>\n\nthe cat{END}"
    assert renderer.tokenizer.decode(last[0]).count("<think>") == 1  # the earlier reasoning is removed, as at generation


def test_the_empty_reasoning_of_each_answer_is_trained() -> None:
    renderer = renderer_of(THINKING)
    rows = check(renderer, Example(messages=TALK), [1, 3, 5])
    wanted = [f"<think>\n\n</think>\n\n{answer}{END}" for answer in ("the cat", "on the mat", "not")]
    assert [trained_text(renderer, row) for row in rows] == wanted


@given(
    st.lists(st.text(alphabet="acht \n<>", max_size=9), min_size=2, max_size=8),
    st.lists(st.booleans(), min_size=1, max_size=8),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("template", [THINKING, STRIPPING], ids=["thinking", "stripping"])
def test_the_law_holds_for_any_conversation(template: str, texts: list[str], thoughts: list[bool], system: bool) -> None:
    """In one row or several: each answer follows the prompt of generation, and the same tokens have loss."""
    talk, renderer = talk_of(texts[: len(texts) // 2 * 2], thoughts, system), renderer_of(template)
    rows = rows_of(renderer, Example(messages=talk))
    answers = [index for index, message in enumerate(talk) if message["role"] == "assistant" and message["content"].strip()]
    if len(rows) > 1:
        check(renderer, Example(messages=talk), answers)
        return
    ids, labels = rows[0]
    for index in answers:
        prompt = renderer.prompt_ids(talk[:index])
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)]


def test_a_conversation_that_is_not_rewritten_stays_one_row() -> None:
    """A template that renders every turn alike, a single answer, and calls after one question."""
    for talk in (TALK[:2], THOUGHT[:2], [*THOUGHT[:2], {"role": "tool", "content": "[1]"}, THOUGHT[3]]):
        assert len(rows_of(renderer_of(THINKING), Example(messages=talk))) == 1
    stable, talk = renderer_of(STRIPPING), TALK
    (row,) = rows_of(stable, Example(messages=talk))
    assert trained_text(stable, row) == "".join(f"{m['content']}{END}" for m in talk if m["role"] == "assistant")
    ids = []  # and equal to the ids of the text cut at the assistant turns
    for index in (1, 3, 5):
        ids += stable.tokenizer(f"{START}user\n{talk[index - 1]['content']}{END}{START}assistant\n")["input_ids"]
        ids += stable.tokenizer(f"{talk[index]['content']}{END}")["input_ids"]
    assert row[0] == ids


@pytest.mark.parametrize("template", [THINKING, STRIPPING], ids=["thinking", "stripping"])
def test_only_trained_turns_need_a_position(template: str) -> None:
    renderer = renderer_of(template, "completions")
    check(renderer, Example(messages=THOUGHT), [3])
    check(renderer_of(template), Example(messages=THOUGHT, prompt_turns=3), [3])
    check(renderer_of(template), Example(messages=[THOUGHT[0], {**THOUGHT[1], "weight": 0}, *THOUGHT[2:]]), [3])
    one = [*THOUGHT[:3], {**THOUGHT[3], "weight": 0}]  # the untrained turn after the answer rewrites it
    (row,) = rows_of(renderer_of(template), Example(messages=one))
    assert trained_text(renderer, row) == f"<think>\nhm\n</think>\n\nthe cat{END}"
    none = [{**m, "weight": 0} for m in THOUGHT]
    (row,) = rows_of(renderer_of(template), Example(messages=none))
    assert trained_text(renderer, row) == ""


def test_several_completions_of_one_prompt() -> None:
    check(renderer_of(THINKING), Example(messages=TALK, prompt_turns=3), [3, 5])


def test_train_on_all_needs_no_positions() -> None:
    renderer = renderer_of(THINKING, "all")
    ((ids, labels),) = rows_of(renderer, Example(messages=TALK))
    assert renderer.tokenizer.decode(ids) == renderer.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert labels == [IGNORED, *ids[1:]]


@pytest.mark.parametrize("known", [True, False], ids=["known", "as text"])
def test_tools(known: bool) -> None:
    """Tools of the template, and tools in a system message, which shifts the indices of all turns."""
    template = THINKING if known else THINKING.replace("tools", "nothing").replace("tool_calls", "nothing")
    renderer = renderer_of(template)
    assert renderer.supports_tools is known
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    talk = [TALK[0], call, {"role": "tool", "content": "[1]"}, TALK[1], *TALK[2:4]]
    rows = rows_of(renderer, Example(messages=talk, tools=[TOOL]))
    assert len(rows) == 3
    for index, (ids, labels) in zip((1, 3, 5), rows, strict=True):
        prompt = renderer.prompt_ids({"messages": talk[:index], "tools": [TOOL]})
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    assert '"arguments": {"what": "it"}' in trained_text(renderer, rows[0])
    assert trained_text(renderer, rows[2]).endswith(f"on the mat{END}")


def test_a_template_that_rewrites_the_prompt_of_an_answer_is_refused(tmp_path: Path) -> None:
    file, template = tmp_path / "rows.jsonl", tmp_path / "t.jinja"
    write_jsonl(file, [{"messages": THOUGHT[:2]}] * 20)
    text = THINKING.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }}{{ '!' if loop.last }}")
    template.write_text(text.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant?\n{% endif %}"))
    with pytest.raises(UserError, match=r"rows.jsonl: row 1: .* before message 2 differently .* or data.train_on: all"):
        prepare(Data(train=str(file), template=str(template)), make_tokenizer(), seed=0)
    with pytest.raises(BadRow):
        renderer_of(template.read_text()).render(Example(messages=THOUGHT))


def test_prompts_are_cut_at_the_same_positions() -> None:
    """Without separators tokens could merge across turns; answers after the first end in '!' only while they are last."""
    renderer = renderer_of(
        "{% for m in messages %}{{ m.content }}{{ '!' if loop.last and loop.index > 2 and m.role == 'assistant' }}{% endfor %}"
    )
    talk = talk_of(["who c", "at", " c", "at", " c", "at"], [False])
    rows = rows_of(renderer, Example(messages=talk))
    assert [renderer.tokenizer.decode(ids) for ids, _ in rows] == ["who cat", "who cat cat!", "who cat cat cat!"]
    for index, (ids, labels) in zip((1, 3, 5), rows, strict=True):
        prompt = renderer.prompt_ids(talk[:index])
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]


def conversations(count: int) -> list[dict[str, Any]]:
    said = iter(sentences(count * 6, seed=3))
    return [{"messages": talk_of([f"{n} {next(said)}", *(next(said) for _ in range(5))], [False])} for n in range(count)]


def prepared(folder: Path, rows: list[dict[str, Any]], template: str, **options: Any) -> Any:
    file, jinja = write_jsonl(folder / "rows.jsonl", rows), folder / "t.jinja"
    jinja.write_text(template)
    return prepare(Data(train=str(file), template=str(jinja), **{"eval_size": 4, **options}), make_tokenizer(), seed=0)


def test_the_statistics_report_unrolled_conversations(tmp_path: Path) -> None:
    rows = [*conversations(16), *({"messages": row["messages"][:2]} for row in conversations(20)[16:])]
    made = prepared(tmp_path, rows, THINKING)
    stats = made.statistics["train"]
    assert (stats.rows_read, stats.rows_kept, stats.rows_dropped) == (20, 20, 0)
    assert (stats.rows_unrolled, stats.unrolled_into) == (16, 48)
    assert len(made.train) + len(made.eval) == 48 + 4
    line = "train     the chat template renders earlier turns differently: 16 conversations became 48 rows, one per answer"
    assert [said for said in made.lines() if "differently" in said] == [line]
    assert stats.tokens == sum(made.lengths) + sum(made.eval_lengths)
    carry = sum(label != IGNORED for part in (made.train, made.eval) for row in part for label in row["labels"])
    assert stats.supervised == carry
    assert not set(made.train["row"]) & set(made.eval["row"])  # a conversation stays on one side
    stable = prepared(tmp_path, rows, STRIPPING).statistics["train"]  # another template: cached rows are not reused
    assert (stable.rows_unrolled, stable.unrolled_into) == (0, 0)


@pytest.mark.parametrize("overflow", ["truncate", "split", "drop"])
def test_long_conversations_count_once(tmp_path: Path, overflow: str) -> None:
    """The second and third answers are too long; tokens add up to those of all rows."""
    rows = conversations(100)
    long = conversations(101)[100]["messages"]
    long[2] = {"role": "user", "content": "where " * 100}
    stats = prepared(tmp_path, [*rows, {"messages": long}], THINKING, max_length=200, overflow=overflow).statistics["train"]
    assert (stats.rows_kept, stats.rows_dropped, stats.rows_unrolled, stats.unrolled_into) == (101, 0, 101, 303)
    assert (stats.rows_cut, stats.rows_split) == ((0, 1) if overflow == "split" else (1, 0))
    renderer = renderer_of(THINKING)
    every = [row for talk in [*rows, {"messages": long}] for row in rows_of(renderer, Example(messages=talk["messages"]))]
    carry = sum(label != IGNORED for _, labels in every for label in labels)
    assert stats.supervised + stats.supervised_lost == carry
    if overflow != "split":  # parts begin with the last token of the part before
        assert stats.tokens + stats.tokens_lost == sum(len(ids) for ids, _ in every)


def test_a_prompt_of_several_turns_is_rendered_as_in_training() -> None:
    """`hfstrat chat`: earlier answers are rewritten, and nothing is refused."""
    renderer = renderer_of(THINKING)
    ids = renderer.prompt_ids(TALK[:5])
    wanted = renderer.tokenizer.apply_chat_template(TALK[:5], tokenize=False, add_generation_prompt=True)
    assert renderer.tokenizer.decode(ids) == wanted


def test_cached_rows_of_an_older_render_version_are_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hfstrat.data.prepare as preparing
    from hfstrat.data import cache

    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    for form, count in ((RENDER_VERSION, 1), (RENDER_VERSION, 1), (RENDER_VERSION + 1, 2)):
        monkeypatch.setattr(preparing, "RENDER_VERSION", form)
        prepared(tmp_path, conversations(20), STRIPPING)
        assert len(list(cache.folder().glob("rows-*.arrow"))) == count
