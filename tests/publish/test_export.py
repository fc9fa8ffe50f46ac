"""Answers in batches and streams, conversations, and exported results: each agrees with the model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.classifiers import labeled
from helpers.runs import run

from hfstrat.cli import inference
from hfstrat.errors import UserError
from hfstrat.publish import export
from hfstrat.tasks import artifact, generation
from hfstrat.tasks.generation import How

PROMPTS = ["the cat", "a dog ran under the red mat and the blue hat", "one", "two dogs sat on the mat"]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    model, tokenizer, _ = artifact.load(str(tiny), dtype="checkpoint")
    return model, tokenizer


def test_batches_equal_single_prompts(loaded: tuple[Any, Any]) -> None:
    """A float32 model of random weights: left padding changes its logits by 1e-6, but not its tokens."""
    from hfstrat.tasks.generation import answer

    model, tokenizer = loaded
    renderer = generation.renderer_of(tokenizer, None, plain=False)
    alone = [answer(model, renderer, prompt, 8, torch.float32) for prompt in PROMPTS]
    for size in (1, 3, 8):
        assert list(generation.in_batches(model, renderer, PROMPTS, How(8, batch_size=size))) == alone


def test_sampling_is_a_function_of_its_seed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    renderer = generation.renderer_of(tokenizer, None, plain=True)

    def sample(seed: int) -> list[str]:
        return list(generation.in_batches(model, renderer, PROMPTS, How(8, temperature=1.0, top_p=0.95, seed=seed)))

    assert sample(1) == sample(1) != sample(2)


def test_a_stream_equals_the_complete_answer(loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded
    renderer = generation.renderer_of(tokenizer, None, plain=False)
    text = generation.stream(model, renderer, PROMPTS[1], How(12))
    assert capsys.readouterr().out.strip() == text
    assert [text] == list(generation.in_batches(model, renderer, PROMPTS[1:2], How(12)))


def test_files_in_and_out_keep_their_order(tiny: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(PROMPTS * 5))
    inference.generate(str(tiny), [], prompts, output, How(4, batch_size=2, system="be short"))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS * 5
    assert all(isinstance(row["completion"], str) for row in rows)


def chat_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: Path, typed: str, length: int = 4
) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    inference.chat(str(target), How(length))
    return capsys.readouterr().out.splitlines()


def test_a_conversation_from_a_pipe(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = "the cat sat", "and the dog?"
    whole = chat_lines(monkeypatch, capsys, tiny, f"{first}\n{second}\n/reset\n{first}\n/what\n/quit\nnever read\n")
    alone = chat_lines(monkeypatch, capsys, tiny, f"{first}\n")
    begun = whole.index("(a new conversation)")
    assert whole[begun + 1 : begun + 1 + len(alone)] == alone == whole[: len(alone)]
    assert "(/what: no such command; /reset starts over, /quit exits)" in whole


def test_a_long_conversation_forgets_its_beginning(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "\n".join(["the cat sat on the red mat and the dog ran under the blue hat " * 3] * 8)
    assert any("no longer fit" in line for line in chat_lines(monkeypatch, capsys, tiny, typed))
    with pytest.raises(UserError, match="exceeds the model's context"):
        chat_lines(monkeypatch, capsys, tiny, "the cat " * 300)


@pytest.mark.parametrize(("kind", "form"), [({}, "F16"), ({"dtype": "bfloat16", "tied": True}, "BF16")])
def test_a_gguf_computes_what_the_model_computes(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: dict[str, Any], form: str
) -> None:
    """Loaded by transformers, independently of our writer: the same token ids, logits equal within 16 bits."""
    gguf = pytest.importorskip("gguf")
    export.export(str(models(**kind)), tmp_path / "x.gguf", "gguf")
    assert "loaded again: logits differ" in capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == form
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert ("output.weight" in kinds) is not kind.get("tied", False)
    assert "tokenizer.chat_template" in reader.fields


@pytest.mark.parametrize(
    ("family", "name", "form", "words"),
    [
        ("gpt2", "x.gguf", "gguf", "a GPT2LMHeadModel is not supported"),
        ("llama", "x", "gguf", "ends in .gguf"),
        ("llama", "x", "mlx", "expected one of safetensors, gguf, onnx"),
        ("llama", ".", "safetensors", "is in use"),
    ],
)
def test_what_cannot_be_exported(
    models: Callable[..., Path], tmp_path: Path, family: str, name: str, form: str, words: str
) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match=words):
        export.export(str(models(family=family)), tmp_path / name, form)


def test_safetensors_load_plainly(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export.export(str(tiny), tmp_path / "x", "safetensors")
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, tmp_path / "x"))
    ids = torch.arange(12)[None]
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)


def test_a_pooled_classifier_is_exported_as_it_was_verified(recipe: Any, tmp_path: Path) -> None:
    """A result of `head`: plain sentence-transformers computes the same from the exported folder, which names the labels."""
    library = pytest.importorskip("sentence_transformers")
    rows = labeled(tmp_path, 40)
    assert run(recipe("task=text-classification", "strategy=head", "data.max_length=64", f"data.train={rows}"))
    export.export(str(tmp_path / "run"), tmp_path / "x", "safetensors")
    one, two = (library.SentenceTransformer(str(folder), device="cpu") for folder in (tmp_path / "run/final", tmp_path / "x"))
    assert (one.encode(PROMPTS) == two.encode(PROMPTS)).all()
    assert one[0].auto_model.config.id2label == two[0].auto_model.config.id2label


def test_onnx_computes_what_the_model_computes(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    export.export(str(tiny), tmp_path / "x", "onnx")
    assert "loaded again" in capsys.readouterr().out


def test_no_telemetry() -> None:
    code = "import hfstrat; from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    known = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    subprocess.run([sys.executable, "-c", code], env=known, check=True)
