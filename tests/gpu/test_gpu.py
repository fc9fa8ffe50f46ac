"""What a CPU cannot test: NCCL, FSDP2 and ZeRO on real devices, bitsandbytes' kernels, measured memory, packing with flash.

    python -m pytest -m gpu tests/gpu          # one GPU; with two or more also the tests of several processes

Every test says what it needs and skips without it. Models are made on the spot.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SETTINGS = ["model.dtype=float32", "training.per_device_train_batch_size=2", "data.eval_size=13"]


def hfstrat(*words: str, **environment: str) -> dict[str, Any]:
    """Run the command; return the report's result."""
    folder = next(word.removeprefix("output_dir=") for word in words if word.startswith("output_dir="))
    done = subprocess.run(
        [sys.executable, "-m", "hfstrat", "train", *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())["result"]
    return result


def test_one_gpu_trains_and_its_artifact_reloads(recipe: Any, tmp_path: Path) -> None:
    result = hfstrat(recipe().source, f"output_dir={tmp_path / 'run'}")
    assert result["verified"]["max_difference"] <= 0.02 * result["verified"]["max_logit"]
    assert result["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "strategy",
    [
        "full",
        "{name: lora, r: 4}",
        "{name: partial, last_n_layers: 2, precompute: true}",
        "{name: head, untie: true}",
        "{name: distill, student: full, shrink: {layers: 2}, baseline: false, teacher_cache: {form: 'off'}}",
        "{name: distill, student: lora, baseline: false, teacher_cache: {form: hidden}}",
    ],
)
def test_gpu_and_cpu_losses_are_equal(recipe: Any, tmp_path: Path, strategy: str) -> None:
    """In float32, without TF32: the same losses."""
    words = [recipe().source, *SETTINGS, f"strategy={strategy}"]
    there = hfstrat(*words, f"output_dir={tmp_path / 'gpu'}")
    here = hfstrat(*words, f"output_dir={tmp_path / 'cpu'}", CUDA_VISIBLE_DEVICES="")
    assert [e["loss"] for e in there["losses"]] == pytest.approx([e["loss"] for e in here["losses"]], rel=1e-3)
    assert there["metrics_after"]["loss"] == pytest.approx(here["metrics_after"]["loss"], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_adapters_train_on_a_quantized_base(recipe: Any, tmp_path: Path, base: str) -> None:
    """With an evaluation during training, reloaded as it was trained."""
    words = [recipe().source, "strategy={name: lora, r: 8}", f"model.quantization={base}", "training.learning_rate=1e-2"]
    result = hfstrat(*words, "training.eval_steps=2", f"output_dir={tmp_path / 'run'}")
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert result["verified"]["max_difference"] <= 0.02 * result["verified"]["max_logit"]


@SEVERAL
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2_offload", "deepspeed_zero2", "deepspeed_zero3"])
@pytest.mark.parametrize("strategy", ["full", "{name: lora, r: 4}", "{name: partial, last_n_layers: 2}"])
def test_two_gpus_equal_one_gpu(recipe: Any, tmp_path: Path, config: str, strategy: str) -> None:
    if config.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    words = [recipe().source, *SETTINGS, f"strategy={strategy}"]
    one = hfstrat(*words, f"output_dir={tmp_path / 'one'}")
    two = hfstrat(*words, f"output_dir={tmp_path / 'two'}", "--num-processes", "2", "--accelerate-config", config)
    assert [e["loss"] for e in two["losses"]] == pytest.approx([e["loss"] for e in one["losses"]], rel=1e-3)
    assert two["metrics_after"]["loss"] == pytest.approx(one["metrics_after"]["loss"], rel=1e-3)


@SEVERAL
def test_fsdp2_takes_less_memory_than_ddp(tmp_path: Path) -> None:
    """A model whose float32 weights, gradients and moments take about 1.6 GB; sharded they take less."""
    from conftest import make_tokenizer, sentences, write_jsonl
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, bos_token_id=1)
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "completion": s} for n, s in enumerate(sentences(200))])
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {tmp_path / 'model'}\nstrategy: full\ndata: {{train: {rows}, eval_size: 12, max_length: 128}}\n"
        "training: {max_steps: 3, global_batch_size: 8, per_device_train_batch_size: 2}\noutput_dir: x\n"
    )
    peaks = {}
    for config in ("ddp", "fsdp2"):
        words = [str(file), f"output_dir={tmp_path / config}", "--num-processes", "2", "--accelerate-config", config]
        peaks[config] = hfstrat(*words)["peak_memory_bytes"]
    assert peaks["fsdp2"] < 0.8 * peaks["ddp"], peaks


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes_layers_have_the_gradients_of_their_weights(kind: str) -> None:
    """Forward and input gradient of a quantized layer against its own weight, dequantized."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    options = {"quant_type": "nf4", "compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}
    layer = getattr(bnb.nn, kind)(256, 512, bias=False, **options).cuda()
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16 if kind != "Linear4bit" else torch.float32, requires_grad=True)
    said = layer(x)
    said.float().square().sum().backward()
    if kind == "Linear4bit":
        whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        state = layer.state
        whole = state.CB.float() * state.SCB.float()[:, None] / 127
    again = x.detach().float().requires_grad_(True)
    expected = again @ whole.T
    expected.square().sum().backward()
    for ours, theirs in ((said.float(), expected), (x.grad.float(), again.grad)):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit"])
def test_bitsandbytes_optimizers_run(recipe: Any, tmp_path: Path, optim: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    result = hfstrat(recipe().source, f"training.optim={optim}", f"output_dir={tmp_path / 'run'}")
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]


def test_the_micro_batch_is_measured_on_the_worst_step(recipe: Any, tmp_path: Path) -> None:
    """With little free memory the micro-batch is smaller, and the peak of the run stays below that of the measured step."""
    words = [recipe().source, "training.per_device_train_batch_size=auto", "training.global_batch_size=32"]
    whole = hfstrat(*words, f"output_dir={tmp_path / 'whole'}")
    assert whole["plan"]["micro_batch"] == 32, "a tiny model fits with all rows"
    assert whole["peak_memory_bytes"] < 0.92 * torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("attention", ["auto", "sdpa", "flash_attention_2", "flex_attention"])
def test_packed_steps_equal_plain_steps(recipe: Any, tmp_path: Path, attention: str) -> None:
    """Packing keeps examples apart on this device's kernels, and trains the same weights."""
    if attention.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs flash_attn")
    words = [recipe().source, f"model.attn_implementation={attention}", "model.dtype=bfloat16", "training.max_steps=8"]
    words.append("training.train_sampling_strategy=random")
    plain = hfstrat(*words, "training.packing=false", f"output_dir={tmp_path / 'plain'}")
    packed = hfstrat(*words, "training.packing=true", f"output_dir={tmp_path / 'packed'}")
    assert packed["plan"]["bins"]
    if attention == "auto":
        assert packed["plan"]["attention"] == "sdpa_varlen", packed["plan"]["attention_because"]
    assert packed["metrics_after"]["loss"] == pytest.approx(plain["metrics_after"]["loss"], rel=0.02)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("size", [64, 80, 256])
def test_the_kernel_for_variable_lengths_is_the_loop_over_examples(window: int, size: int) -> None:
    """Attention and its gradients in bfloat16 against the loop over the examples in float64, with grouped heads."""
    from hfstrat.models.attention import Segments, varlen_attention

    torch.manual_seed(0)
    exact = [torch.randn(1, heads, 90, size, device="cuda").double().requires_grad_() for heads in (4, 2, 2)]
    given = [one.detach().bfloat16().requires_grad_() for one in exact]
    segments = Segments(torch.tensor([0, 33, 34, 90], dtype=torch.int32, device="cuda"), 56, window)
    mask = segments.as_mask(1)
    whole = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    found, _ = varlen_attention(torch.nn.Module(), *given, segments)  # type: ignore[misc]
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double(), whole, rtol=0.05, atol=0.05)
    for ours, theirs in zip(given, exact, strict=True):
        assert float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 0.02


@pytest.mark.parametrize("kernel", ["hfstrat", "trl", "liger"])
def test_the_chunked_loss_on_this_device(kernel: str) -> None:
    """Each kernel against float64, in float32 and bfloat16, with the gradients of hidden states and weight."""
    from hfstrat.models.chunked_loss import Head
    from hfstrat.models.loss_kernels import installed

    if kernel not in installed():
        pytest.skip(f"needs {kernel}")
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device="cuda"), torch.randn(1000, 64, device="cuda") / 8
    targets = torch.randint(0, 1000, (300,), device="cuda")
    exact = [t.double().requires_grad_(True) for t in (hidden, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum").backward()
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        ours = [t.to(dtype).requires_grad_(True) for t in (hidden, weight)]
        installed()[kernel](ours[0], Head(ours[1]), targets).backward()
        for mine, theirs in zip(ours, exact, strict=True):
            assert float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < allowed


def test_a_run_reports_its_loss_kernel(recipe: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hfstrat", "train", recipe().source, f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "head: loss kernel " in done.stdout


def test_a_model_larger_than_the_gpu_is_split(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers on the GPU, the others on the CPU: equal output."""
    from hfstrat.tasks import artifact
    from hfstrat.tasks.generation import How, renderer_of, stream

    monkeypatch.setattr(artifact, "placed", lambda model, *_: model)
    model, tokenizer, _ = artifact.load(str(tiny), dtype="float32")
    monkeypatch.undo()
    renderer = renderer_of(tokenizer, {}, plain=False)
    said = stream(model, renderer, "the cat", How(8))
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (needed, needed))
    assert stream(artifact.placed(model, spreads=True), renderer, "the cat", How(8)) == said
