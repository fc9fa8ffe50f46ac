"""Tokenizers that put a space before every text: a continuation gets none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from helpers.tokenizer_kinds import KINDS, MARKED, TOKENIZERS, make
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data.formats import Example
from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.segments import SegmentTokenizer
from hfstrat.recipe.data import Data

SPOKEN = (  # roles are words, as in Llama 2: what follows a prompt follows a letter or white space
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }} "
    "[/INST]{% endif %}{% endfor %}"
)
LINES = (
    "{{ bos_token }}{% for m in messages %}<|{{ 'answer' if m.role == 'assistant' else 'user' }}|>\n{{ m.content }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "who sat"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "where (red)"},
    {"role": "assistant", "content": "on the mat"},
]


def renderer(kind: str, template: str | None) -> Renderer:
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = template
    return Renderer(tokenizer, "chat" if template else "plain")


def written(rows: Renderer, talk: list[dict[str, Any]]) -> str:
    if rows.template == "chat":
        return str(rows.tokenizer.apply_chat_template(talk, tokenize=False))
    return "".join(m["content"] + ("</s>" if m["role"] == "assistant" else "\n\n") for m in talk)


def check(rows: Renderer, talk: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The laws: the ids and the text of the complete rendering, and the prompt of generation."""
    tokenizer, example, text = rows.tokenizer, Example(messages=talk), written(rows, talk)
    (rendered,) = rows.render(example)
    ids, labels = rows.encode([rendered])[0]
    own = ids[0 if rendered.framed else len(rows.bos) :]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert own == whole
    assert tokenizer.decode(own) == tokenizer.decode(whole)
    assert rows.decoding_difference(rendered, ids) is None
    prompt = rows.prompt_ids(example.prompt)
    assert ids[: len(prompt)] == prompt
    assert all((label != IGNORED) == bool(talk[-1]["content"].strip()) for label in labels[len(prompt) :])
    return ids, labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [MARKED, LINES, SPOKEN, None], ids=["marked", "lines", "spoken", "plain"])
def test_segments_have_the_ids_of_the_complete_text(kind: str, template: str | None) -> None:
    rows = renderer(kind, template)
    assert rows.segments.prepends
    ids, _ = check(rows, TALK)
    if template is None and kind != "prefixed":
        assert "\n\nthe cat</s>" in rows.tokenizer.decode(ids)  # and no space before the answer


@given(st.lists(st.text(alphabet="acht 0(é世\n", min_size=1, max_size=9), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", ["first", "always", "bytes", "prefixed"])
def test_next_to_special_tokens_any_text_has_the_ids_of_the_complete_text(kind: str, texts: list[str]) -> None:
    talk = [{"role": ["user", "assistant"][index % 2], "content": text} for index, text in enumerate(texts)]
    check(renderer(kind, MARKED), talk[: len(talk) // 2 * 2])


@given(st.lists(st.text(alphabet="acht 0(é世\n", max_size=9), min_size=2, max_size=6), st.sampled_from([SPOKEN, LINES, None]))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_keeps_its_ids_where_texts_could_merge(kind: str, texts: list[str], template: str | None) -> None:
    talk = [{"role": ["user", "assistant"][index % 2], "content": text} for index, text in enumerate(texts)]
    rows, example = renderer(kind, template), Example(messages=talk[: len(talk) // 2 * 2])
    (rendered,) = rows.render(example)
    ids, _ = rows.encode([rendered])[0]
    prompt = rows.prompt_ids(example.prompt)
    assert ids[: len(prompt)] == prompt
    assert rows.decoding_difference(rendered, ids) is None


def test_unknown_characters_after_an_unknown_token_are_not_lost() -> None:
    """The unknown token stands for any number of consecutive characters: here for one in each text."""
    pieces, unknown = SegmentTokenizer(TOKENIZERS["prepend"]), TOKENIZERS["prepend"].unk_token_id
    assert pieces.ids(["é", "世"], ["", "é"])[1] == [unknown]


@pytest.mark.parametrize("kind", KINDS[:4])  # the words of the last one are too short
def test_texts_that_would_merge_stay_separate(kind: str) -> None:
    """`cat` is one token: a prompt that ends within it keeps its ids, and nothing of the answer is lost."""
    tokenizer = TOKENIZERS[kind]
    head, rest = SegmentTokenizer(tokenizer).ids(["the c", "at on"], ["", "the c"])
    assert head == tokenizer("the c", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(head + rest) == tokenizer.decode(tokenizer("the cat on", add_special_tokens=False)["input_ids"])
    assert head + rest != tokenizer("the cat on", add_special_tokens=False)["input_ids"]


def test_other_tokenizers_are_called_once() -> None:
    tokenizer = make_tokenizer()
    pieces, texts = SegmentTokenizer(tokenizer), ["the cat", "\n\n sat", "on"]
    assert not pieces.prepends
    calls = []

    class Counted:
        unk_token_id = None

        def __call__(self, *given: Any, **options: Any) -> Any:
            calls.append(given)
            return tokenizer(*given, **options)

    pieces.tokenizer = Counted()  # type: ignore[assignment]
    assert pieces.ids(texts, ["", "the cat", "sat"]) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert calls == [(texts,)]


def test_stories(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    rows = Renderer(tokenizer, "auto")
    ids, labels = rows.encode(rows.render(Example(messages=[{"role": "user", "content": "Once upon a time"}, TALK[1]])))[0]
    assert tokenizer.decode(ids) == "<s> Once upon a time\n\nthe cat</s>"
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "the cat</s>"
    assert ids == tokenizer("Once upon a time\n\nthe cat</s>")["input_ids"]


def test_ids_that_decode_differently_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remark, not an error; none if the tokenizer loses the same in the complete text."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"who sat {n}", "completion": "the cat"} for n in range(20)])
    tokenizer = make("always", None)
    data = Data(train=str(file), eval_size=2)
    assert not any("reproduce" in line for line in prepare(data, tokenizer, seed=0).lines())
    monkeypatch.setattr(SegmentTokenizer, "ids", lambda self, texts, before: self._ids_of_each(texts))  # without context
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    said = [line for line in prepare(data, tokenizer, seed=0).lines() if "reproduce" in line]
    assert len(said) == 1
    assert said[0].startswith("train     the tokenizer does not reproduce its input: ")
    assert said[0].endswith(r'"who sat 0\n\nthe cat</s>" decodes to "who sat 0\n\n the cat</s>"')


def test_a_lowercasing_tokenizer_causes_no_false_alarm() -> None:
    from tokenizers import normalizers

    tokenizer = make("always", None)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    rows = Renderer(tokenizer, "auto")
    (rendered,) = rows.render(
        Example(messages=[{"role": "user", "content": "WHO sat"}, {"role": "assistant", "content": "The"}])
    )
    ids, _ = rows.encode([rendered])[0]
    assert "who sat\n\nthe" in tokenizer.decode(ids)
    assert rows.decoding_difference(rendered, ids) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # other ids than those of the whole
    rows = Renderer(tokenizer, "auto")
    (rendered,) = rows.render(Example(messages=[{"role": "user", "content": "WHO c"}, {"role": "assistant", "content": "at"}]))
    ids, _ = rows.encode([rendered])[0]
    assert ids != tokenizer("WHO cat", add_special_tokens=False)["input_ids"]
    assert rows.decoding_difference(rendered, ids) is None
