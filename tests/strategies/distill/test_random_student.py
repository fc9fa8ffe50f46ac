"""A student with random weights: it begins as strategy scratch begins, has its teacher's tokens, and imitates it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.runs import run
from safetensors.torch import load_file

from hfstrat.data.segments import SegmentTokenizer
from hfstrat.errors import UserError
from hfstrat.strategies.distill.sequence import retokenize_answers, retokenize_prompt

CONFIG = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"


@pytest.fixture
def distil(recipe: Any, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`distil("temperature: 2.0", "a=b", name=...)` runs a small recipe without `model:`; returns the report's result."""
    monkeypatch.setattr("hfstrat.strategies.distill.report.speed_of", lambda *args: 1.0)

    def start(
        more: str = "teacher_weight: 0.5", *settings: str, name: str = "run", student: str = "", quick: bool = True
    ) -> Any:
        if quick:
            monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
        section = f"{{name: scratch, config: {CONFIG}{student}}}"
        words = [f"strategy={{name: distill, teacher: {models(tied=True)}, student: {section}, baseline: false, {more}}}"]
        words += ["model={dtype: float32}", f"output_dir={tmp_path / name}"]
        report = run(recipe(*words, *settings))
        assert report is not None
        return report["result"]

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def test_a_random_student_reads_its_teacher_s_tokens_and_reloads(
    distil: Any, models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = distil(quick=False)
    assert result["verified"]["bit_equal"]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "run" / "final", models(tied=True)))
    assert ours.get_vocab() == theirs.get_vocab()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (16, 2)
    assert result["trainable_parameters"] == result["total_parameters"] == sum(p.numel() for p in student.parameters())
    assert not any("teacher" in name for name in weights(tmp_path / "run"))
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert result["metrics_before"]["teacher_kl"] > 0
    assert result["baselines"]["parameters"] == result["total_parameters"]
    assert "baselines uniform (ln V)" in capsys.readouterr().out
    assert any(line.startswith("distilled") for line in result["comparison"]["lines"])


def test_it_begins_as_strategy_scratch_begins(distil: Any, recipe: Any, models: Callable[..., Path], tmp_path: Path) -> None:
    """Also if the teacher is not used (the baseline), so that both are compared from the same start."""
    one, without = distil(name="one"), distil("teacher_weight: 0.0", name="without")
    words = [f"strategy={{name: scratch, config: {CONFIG}}}", f"model={{tokenizer: {models(tied=True)}, dtype: float32}}"]
    alone = run(recipe(*words, f"output_dir={tmp_path / 'alone'}"))["result"]
    assert one["metrics_before"]["loss"] == without["metrics_before"]["loss"] == alone["metrics_before"]["loss"]
    ours, theirs = weights(tmp_path / "without"), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_equal_splits_give_the_same_run(distil: Any) -> None:
    runs = [distil("temperature: 2.0", f"training.per_device_train_batch_size={n}", name=f"by-{n}") for n in (8, 1)]
    for losses in zip(*([e["loss"] for e in result["losses"]] for result in runs), strict=True):
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs[0]["metrics_after"] == pytest.approx(runs[1]["metrics_after"], rel=1e-4)


@pytest.mark.slow
def test_resumed_is_uninterrupted(distil: Any, tmp_path: Path) -> None:
    keep = "training.save_total_limit=5"
    distil("hidden_states: {loss: mse}", keep, name="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "half" / name)
    (tmp_path / "half" / "report.json").unlink()
    again = distil("hidden_states: {loss: mse}", keep, name="half")
    assert again["resumed_from"].endswith("checkpoint-2")
    ours, theirs = weights(tmp_path / "half"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_student_with_new_tokens_learns_what_the_teacher_wrote(distil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    new = ", tokenizer: {vocab_size: 290, chat_template: none}"
    distil("seq_kd: true, max_new_tokens: 5", student=new)
    said = capsys.readouterr().out
    assert "has another tokenizer" in said
    assert "generated 48 answers" in said
    with pytest.raises(UserError, match=r"student: with a new tokenizer.*seq_kd: true"):
        distil(student=new, name="token")


def test_texts_are_handed_over_where_tokenizers_differ() -> None:
    from hfstrat.strategies.new_tokenizer import _train_bpe

    ours, theirs = make_tokenizer(), make_tokenizer()
    theirs._tokenizer = _train_bpe(["the cat sat under the red hat"] * 9, 280, ["<|endoftext|>", "<|im_end|>"])
    text = "one cat and two dogs"
    prompt = ours(text)["input_ids"]
    asked = retokenize_prompt(prompt, ours, theirs)
    assert theirs.decode(asked) == text
    end = theirs.eos_token_id
    ended, cut, empty = (theirs(said)["input_ids"] + end for said, end in ((" ran", [end]), (" ran", []), ("", [end])))
    found = retokenize_answers([ended, cut, empty], [asked] * 3, [prompt] * 3, SegmentTokenizer(ours), theirs)
    ran, ours_end = ours(" ran")["input_ids"], ours.eos_token_id
    assert found == [[*ran, ours_end], ran, [ours_end]]
