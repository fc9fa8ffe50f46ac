"""`hfstrat check`: the most important lines come first, and a few lines show where the loss of an example begins and ends."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hfstrat.cli import check
from hfstrat.cli.check import show_row
from hfstrat.data.render import IGNORED
from hfstrat.data.shown import LEAST, SHOWN_TOKENS, elided, pieces


def row_of(lengths: list[int], learnt: bool = False) -> tuple[list[int], list[int]]:
    """Stretches of these lengths, with and without loss in turn; a token's number is its place."""
    labels = [place if (number % 2 == 0) is learnt else IGNORED for number, n in enumerate(lengths) for place in range(n)]
    return list(range(len(labels))), labels


@given(st.lists(st.integers(1, 3) | st.integers(1, 900), min_size=1, max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_place_is_shown_or_counted(lengths: list[int], learnt: bool) -> None:
    ids, labels = row_of(lengths, learnt)
    shown = elided(ids, labels)
    seen = [one for part, _, _ in shown for one in part]
    assert len(seen) <= SHOWN_TOKENS
    many = len(lengths) > SHOWN_TOKENS // LEAST and len(ids) > SHOWN_TOKENS
    assert len(seen) > 170 or len(seen) == len(ids) or many
    left_out = sum(int(words.split()[0].replace(",", "")) for _, _, words in shown if words)
    assert len(seen) + left_out == len(ids)
    assert seen == sorted(set(seen))
    assert all((labels[one] != IGNORED) is learns for part, learns, _ in shown for one in part)
    if not many:
        ends = list(itertools.accumulate(lengths))
        assert {0, ids[-1], *ends[:-1], *(end - 1 for end in ends)} <= set(seen)  # each beginning and each end


def shown(text: str, answer: str, terminal: bool = False) -> str:
    tokenizer, out = make_tokenizer(), io.StringIO()
    prompt, completion = (tokenizer(each)["input_ids"] for each in (text, answer))
    row = {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion, "length": len(prompt + completion)}
    show_row(
        Console(file=out, force_terminal=terminal, soft_wrap=True, highlight=False, width=160), tokenizer, row, "example 0"
    )
    return out.getvalue()


def test_a_long_prompt_does_not_hide_the_answer() -> None:
    printed = shown("begin " + "x" * 1000 + " ask:", "the cat<|im_end|>")
    assert "begin x" in printed
    assert "x ask:[[the cat<|im_end|>]]" in printed
    assert "more tokens without loss" in printed


def test_a_long_answer_shows_where_it_ends() -> None:
    printed = shown("who sat?", "the cat " + "x" * 2000 + " so<|im_end|>")
    assert "who sat?[[the cat x" in printed
    assert "x so<|im_end|>]]" in printed
    assert "]] ... 1,8" in printed
    assert "more tokens with loss ... [[" in printed


def test_a_short_row_is_shown_whole() -> None:
    assert shown("who sat?", "the cat").endswith("who sat?[[the cat]]\n")


def test_color_replaces_the_marks_on_a_terminal() -> None:
    printed = shown("y" * 500, "the cat", terminal=True)
    assert "[[" not in printed
    assert "\x1b[1;32mthe cat" in printed


def test_many_turns_lose_those_in_the_middle() -> None:
    parts = elided(*row_of([5, 7] * 40))
    assert [words for _, _, words in parts if words] == ["336 more tokens, 196 with loss"]


def test_the_share_is_never_nothing() -> None:
    assert len(elided(*row_of([900] * 25))) == 75
    assert elided([], []) == []


def test_what_matters_comes_first(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The model, then the data, then examples with a legend, then the settings that were set."""
    check.show(recipe("training={max_time: 10min}"), rows=1)
    printed = capsys.readouterr().out
    parts = ("trainable params: ", "self_attn.q_proj: LoRA", "train ", "contribute to the loss", "example 0", "strategy.r ")
    places = [printed.index(part) for part in parts]
    assert places == sorted(places)
    assert "at most 10m 00s" in printed
    assert "10,000,000" not in printed
    assert "evaluation.max_rows" not in printed  # a default
    assert "embed_tokens" not in printed  # frozen


def test_defaults_and_frozen_modules_are_shown_on_request(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check.show(recipe(), rows=0, every=True)
    printed = capsys.readouterr().out
    assert "evaluation.max_rows" in printed
    assert "embed_tokens" in printed
    assert "4 steps (" in printed
    assert "example" not in printed


def test_pieces_have_the_text_and_the_mask() -> None:
    tokenizer = make_tokenizer()
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("who sat, é?", "the cat<|im_end|>\n"))
    labels = [IGNORED] * len(prompt) + answer
    assert pieces(tokenizer, prompt + answer, labels) == [
        {"text": "who sat, é?", "trained": False},
        {"text": "the cat<|im_end|>\n", "trained": True},
    ]


def test_json_has_the_data_and_the_examples(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hfstrat.recipe.load import load_recipe

    template = tmp_path / "t.jinja"
    template.write_text("{% if brief %}Be brief. {% endif %}" + TEMPLATE)
    rows = [{"prompt": f"who sat {n}", "completion": "the cat"} for n in range(9)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "template": str(template), "eval_size": 1}
    recipe = {"model": str(models()), "strategy": "lora", "data": data, "output_dir": str(tmp_path / "out")}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    check.show_json(load_recipe(file, ["data.chat_template_kwargs={brief: true}"]), 2)
    found = json.loads(capsys.readouterr().out)
    train = found["data"]["train"]
    assert (train["rows_read"], train["rows_kept"], train["rows_dropped"], train["left_out"]) == (9, 9, 0, {})
    assert any("9 rows" in line for line in found["lines"])
    assert len(found["rows"]) == 2
    context, answer = found["rows"][0]
    assert context["text"].startswith("Be brief. <|im_start|>user\nwho sat")
    assert answer == {"text": "the cat<|im_end|>\n", "trained": True}
