"""Tokenizers that do not fit the model: larger than its embeddings, smaller, padded, or of another model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from helpers.runs import UNVERIFIED, run, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfstrat.errors import UserError
from hfstrat.publish import snippets

SHORT = ("training.max_steps=2", "training.eval_steps=1", "evaluation.samples=0", "training.load_best_model_at_end=false")


def with_tokens(folder: Path, to: Path, *tokens: str, pad: str | None = None) -> Path:
    """A copy of a model whose tokenizer was saved with more tokens, but whose embeddings were not resized."""
    copytree(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_tokens(list(tokens))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(to)
    return to


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *given: UNVERIFIED)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    rows = [{"prompt": f"<m> {n} cat", "completion": f"dog <m> {n}"} for n in range(40)]
    return write_jsonl(tmp_path / "marked.jsonl", rows)


@pytest.mark.slow
def test_tokens_beyond_the_embeddings_are_trained_by_lora(
    recipe: Any, tiny: Path, marked: Path, tmp_path: Path, unverified: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with model.add_tokens; the code that `hfstrat use` prints loads the result."""
    model = with_tokens(tiny, tmp_path / "model", "<m>", "<n>")
    run(recipe(f"model={model}", f"data.train={marked}", *SHORT))
    printed = " ".join(capsys.readouterr().out.split())
    rows = AutoModelForCausalLM.from_pretrained(tiny).get_input_embeddings().weight.shape[0]
    assert f"2 of its tokens are beyond the model's {rows:,} embeddings: <m>, <n>; the rows use 1 of them" in printed
    saved = [name for name in weights(tmp_path / "run") if "token_adapter" in name or "trainable_tokens" in name]
    assert saved
    lines = "\n".join(snippets.show(str(tmp_path / "run"))).splitlines()
    loading = lines[2 : next(i for i, line in enumerate(lines) if line.startswith("model = ")) + 1]
    subprocess.run([sys.executable, "-c", "\n".join(loading)], check=True)
    assert any("hfstrat merge" in line for line in lines[lines.index("# vLLM (after merging)") :])


@pytest.mark.slow
def test_only_a_padding_token_is_beyond_them(recipe: Any, tiny: Path, tmp_path: Path, unverified: None, capsys: Any) -> None:
    model = with_tokens(tiny, tmp_path / "model", pad="<pad>")
    for number, strategy in enumerate(("{name: partial, last_n_layers: 1}", "{name: head}", "full")):
        run(recipe(f"model={model}", f"strategy={strategy}", *SHORT, f"output_dir={tmp_path / str(number)}"))
        assert "embeddings: <pad>; the rows use 0 of them" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("strategy", ["{name: partial, last_n_layers: 1}", "{name: head}"])
def test_frozen_embeddings_of_used_tokens_are_refused(
    recipe: Any, tiny: Path, marked: Path, tmp_path: Path, strategy: str
) -> None:
    model = with_tokens(tiny, tmp_path / "model", "<m>")
    with pytest.raises(UserError, match=r"rows use tokens beyond.*as if model.add_tokens named them.*use lora or full"):
        run(recipe(f"model={model}", f"strategy={strategy}", f"data.train={marked}", *SHORT))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(recipe: Any, tiny: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(reversed([*AutoTokenizer.from_pretrained(tiny).get_vocab()]))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", unk_token="<|endoftext|>")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"model.tokenizer: .* gives only .* tokens the ids.*remove model.tokenizer"):
        run(recipe(f"model={{name_or_path: {tiny}, tokenizer: {tmp_path / 'other'}}}", *SHORT))


def test_embeddings_that_are_padded_are_no_mistake(
    recipe: Any, tiny: Path, tmp_path: Path, unverified: None, capsys: Any
) -> None:
    """A vocabulary padded to a multiple of 64, and tokens added within the padding."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(384)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    run(recipe(f"model={tmp_path / 'model'}", "model.add_tokens=['<a>']", *SHORT))
    assert "beyond" not in capsys.readouterr().out
    assert torch.is_tensor(next(iter(weights(tmp_path / "run").values())))
