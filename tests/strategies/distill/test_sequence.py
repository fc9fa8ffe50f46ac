"""Answers that a teacher generates: those to each prompt alone, cached block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, write_jsonl
from helpers.tokenizer_kinds import KINDS, THINKING, TOKENIZERS
from rich.console import Console

from hfstrat.data.segments import SegmentTokenizer
from hfstrat.errors import UserError
from hfstrat.strategies.distill import sequence
from hfstrat.strategies.distill.sequence import (
    OtherTokenizer,
    prompt_ids,
    replace_answers,
    retokenize_answers,
    retokenize_prompt,
)


@dataclass
class Rowed:
    train: Any
    lengths: Any = None
    order: str = ""


def some_data(count: int = 10) -> Rowed:
    from datasets import Dataset

    source, rows = torch.Generator().manual_seed(0), []
    for number in range(count):
        ids = torch.randint(5, 300, (6 + number % 5,), generator=source).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:], "length": len(ids), "row": number})
    return Rowed(Dataset.from_list(rows))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def test_each_answer_is_what_the_teacher_says_to_this_prompt_alone(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "BLOCK", 4)
    teacher, tokenizer, data = load(models(tied=True)), make_tokenizer(), some_data()
    made = replace_answers(data, teacher, tokenizer, 5, 64, Console(quiet=True)).train  # type: ignore[arg-type]
    assert made["row"][:] == data.train["row"][:]
    for old, new in zip(data.train, made, strict=True):
        prompt = old["input_ids"][:-2]
        with torch.no_grad():
            alone = teacher.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=2)
        answer = alone[0, len(prompt) :].tolist()
        assert new["input_ids"] == prompt + answer
        assert new["labels"] == [-100] * len(prompt) + answer
        assert new["length"] == len(new["input_ids"])


def test_an_interrupted_teacher_continues_with_the_next_block(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "BLOCK", 3)
    teacher, tokenizer, data, calls = load(models()), make_tokenizer(), some_data(), list[int]()
    write = sequence.write_answers

    def counted(*args: Any) -> Any:
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(sequence, "write_answers", counted)
    with pytest.raises(KeyboardInterrupt):
        replace_answers(data, teacher, tokenizer, 4, 64, Console(quiet=True))  # type: ignore[arg-type]
    replace_answers(data, teacher, tokenizer, 4, 64, Console(quiet=True))  # type: ignore[arg-type]
    assert calls == [3, 3, 3, 3, 1]


def test_a_row_without_a_prompt_is_refused() -> None:
    assert prompt_ids({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5]}) == [1, 2, 3]
    for labels in ([1, 2, 3], [-100, 2, 3], [-100] * 3):
        with pytest.raises(UserError, match="no prompt"):
            prompt_ids({"input_ids": [1, 2, 3], "labels": labels})


SAID = [" the cat", "the cat", "\non (red)", "(the", ""]


@pytest.mark.parametrize("theirs", [*KINDS, "bare"])
@pytest.mark.parametrize("ours", [*KINDS, "bare"])
@pytest.mark.parametrize("asks", ["<|user|>who sat</s><|answer|>", "who sat\n\n"], ids=["marked", "plain"])
def test_what_another_tokenizer_wrote_has_the_ids_of_the_whole(ours: str, theirs: str, asks: str) -> None:
    """Tokenizers that put a space before every text, and one that does not, on both sides: no space is lost or made."""
    tokenizers = {**TOKENIZERS, "bare": make_tokenizer(chat=False)}
    own, other = tokenizers[ours], tokenizers[theirs]
    prompt = own(asks, add_special_tokens=False)["input_ids"]
    asked = retokenize_prompt(prompt, own, other)
    begin = str(other.decode(asked, skip_special_tokens=True))
    wrote = SegmentTokenizer(other).ids(SAID, [begin] * len(SAID))
    ended = [[*ids, other.eos_token_id] for ids in wrote]
    found = retokenize_answers(
        [*wrote, *ended], [asked] * 2 * len(SAID), [prompt] * 2 * len(SAID), SegmentTokenizer(own), other
    )
    for number, text in enumerate(SAID):
        assert other.decode(asked + wrote[number], skip_special_tokens=True) == begin + text  # so it was said
        whole = own(asks + text, add_special_tokens=False)["input_ids"]
        assert found[number + len(SAID)] == [*whole[len(prompt) :], own.eos_token_id]
        assert found[number] == (whole[len(prompt) :] or [own.eos_token_id])
        assert whole[: len(prompt)] == prompt


TALKS = [  # of one and of two answers, and with a system turn
    [("user", "who sat"), ("assistant", "the cat")],
    [("user", "who sat"), ("assistant", "the cat"), ("user", "where"), ("assistant", "on the mat")],
    [("system", "be kind"), ("user", "one cat and two dogs"), ("assistant", "ran")],
]
HEADED = (  # Llama 3's kind of marks
    "{{ bos_token or '' }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)


@pytest.mark.parametrize("student", ["own", "thinking", "plain"])
@pytest.mark.parametrize("teacher", ["headed", "plain"])
def test_a_teacher_is_asked_in_its_own_form(student: str, teacher: str, tmp_path: Path) -> None:
    """The ids are those of its prompts had it been trained on these conversations."""
    from hfstrat.data.prepare import prepare
    from hfstrat.data.render import Renderer
    from hfstrat.recipe.data import Data

    talks = [[{"role": role, "content": text} for role, text in talk] for talk in (*TALKS, TALKS[0])]
    file = str(write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks]))
    section = Data(train=file, eval=file)  # type: ignore[arg-type]
    ours, theirs = make_tokenizer(), make_tokenizer()
    ours.chat_template = {"own": ours.chat_template, "thinking": THINKING, "plain": None}[student]
    theirs.chat_template = {"headed": HEADED, "plain": None}[teacher]
    data = prepare(section, ours, 0)
    foreign = OtherTokenizer.detect(ours, theirs, 320, data.renderer, section, 64)
    if student == teacher == "plain":
        assert foreign is None
        return
    assert foreign is not None
    assert "its prompts use " + ("its own chat" if teacher == "headed" else "the plain") in foreign.line
    first = np.arange(len(data.train))
    assert len(first) == len(talks) + (student == "thinking")  # whose template makes a row of each answer
    prompts = [prompt_ids(row) for row in data.train]
    asked, form = foreign.prompts(data.train, first, prompts), Renderer(theirs, "auto")
    afters = [(0, 1), *([(1, 1)] if student == "thinking" else []), (1, 3), (2, 2), (3, 1)]  # row, and turns before the answer
    assert asked == [form.prompt_ids({"messages": talks[row][:after]}) for row, after in afters]
    foreign.context = max(map(len, asked))
    with pytest.raises(UserError, match=r"its context is \d+ tokens, and a prompt has \d+"):
        foreign.prompts(data.train, first, prompts)
    theirs.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(
        UserError, match=r"^strategy.teacher: the data cannot be rendered in the format of the teacher: .*no system turns"
    ):
        foreign.prompts(data.train, first, prompts)


def test_a_run_is_plain_fine_tuning_on_what_the_teacher_wrote(
    recipe: Any, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.runs import run

    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    strategy = f"strategy={{name: distill, teacher: {models(tied=True)}, student: full, seq_kd: true, max_new_tokens: 6}}"
    monkeypatch.setattr("hfstrat.strategies.distill.report.speed_of", lambda *args: 1.0)
    monkeypatch.setattr("hfstrat.strategies.distill.report._baseline", lambda *args: (None, "a test"))
    report = run(recipe(strategy))
    assert report is not None
    assert "generated 48 answers" in capsys.readouterr().out
    assert "teacher_kl" not in report["result"]["metrics_after"]
    found = report["result"]["comparison"]
    assert found["teacher"]["loss"] > 0
    assert found["teacher"]["parameters"] < found["student"]["parameters"]
    assert any(line.startswith("distilled") for line in found["lines"])
