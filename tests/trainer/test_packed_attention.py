"""Packed rows get the first attention that computes them as unpacked ones, forward and backward; a wrong one is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfstrat.errors import UserError
from hfstrat.models import attention
from hfstrat.models.attention import VARLEN, varlen_reference
from hfstrat.trainer import packed_attention
from hfstrat.trainer.packed_attention import Refused, choose, difference, is_flat

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the weights are on the CPU in either case
SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(family: str = "llama", implementation: str | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, num_key_value_heads=2, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def on_cpu(model: Any, wanted: str = "auto", **options: Any) -> packed_attention.Attention:
    return choose(wanted, [model], CPU, torch.float32, 64, **options)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "gemma3_text"])
def test_the_kernel_for_variable_lengths_is_chosen_where_the_model_takes_it(family: str) -> None:
    settings = {"head_dim": 8, "sliding_window": 6} if family in ("mistral", "gemma3_text") else {"head_dim": 8}
    model = make(family, **settings)
    found = on_cpu(model)
    assert (found.name, found.flatten, model.config._attn_implementation) == (VARLEN, True, VARLEN)
    assert found.because.startswith("a loop over the packed examples")
    half = make(family, **settings)
    assert choose("auto", [half], CUDA, torch.bfloat16, 64) == (VARLEN, "torch's kernel for variable lengths", True)  # autocast


def test_a_set_implementation_is_used_and_is_tested_too() -> None:
    found = on_cpu(make(implementation="eager"), "eager")
    assert (found.name, found.flatten) == ("eager", False)
    assert "model.attn_implementation" in found.because


@pytest.mark.parametrize(
    ("family", "settings", "dtype", "reason"),
    [
        ("gemma2", {"head_dim": 8}, torch.bfloat16, "does not support"),  # soft-capping
        ("llama", {"head_dim": 264}, torch.bfloat16, "at most 256 numbers, the model's 264"),
        ("llama", {"attention_dropout": 0.1}, torch.bfloat16, "no dropout, the model's attention 0.1"),
        ("llama", {}, torch.float32, "computes in 16 bits"),
    ],
)
def test_models_that_the_kernel_does_not_fit_are_not_packed_on_a_gpu(
    family: str, settings: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    model = make(family, **settings)
    own = model.config._attn_implementation
    with pytest.raises(Refused, match=reason):
        choose("auto", [model], CUDA, dtype, 64)
    assert model.config._attn_implementation == own
    forced = choose("auto", [model], CUDA, dtype, 64, must_pack=True)
    assert (forced.name, forced.flatten) == (own, False)
    assert f"not {VARLEN}: " in forced.because


def ignores_the_ends(query: Any, key: Any, value: Any, ends: Any, *args: Any, **options: Any) -> torch.Tensor:
    """One example in place of several."""
    whole = torch.tensor([0, int(ends[-1])], dtype=torch.int32)
    return varlen_reference(query, key, value, whole, whole, len(query), len(query), **options)


def window_off_by_one(*args: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
    left = window_size[0] + 1 if window_size[0] >= 0 else -1
    return varlen_reference(*args, window_size=(left, 0), **options)


def no_gradient_of_keys(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> torch.Tensor:
    return varlen_reference(query, key.detach(), value, *args, **options)


def wrong_scale(*args: Any, scale: float, **options: Any) -> torch.Tensor:
    return varlen_reference(*args, scale=scale * 1.5, **options)


def fails(*args: Any, **options: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\non this device")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (ignores_the_ends, "a packed example"),
        (window_off_by_one, "the hidden states that they have unpacked under sdpa"),
        (no_gradient_of_keys, "the gradients that they have unpacked under sdpa"),
        (wrong_scale, "the hidden states that it has alone"),
        (fails, "does not accept packed rows (RuntimeError: no kernel image is available"),
    ],
)
def test_a_kernel_with_other_results_is_refused(kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mistral", sliding_window=9)
    for p in model.parameters():
        p.data *= 3  # attention that depends on its inputs
    monkeypatch.setattr(attention, "varlen_reference", kernel)
    found = on_cpu(model)
    assert (found.name, found.flatten, model.config._attn_implementation) == ("sdpa", False, "sdpa")
    assert reason in found.because


def test_a_model_that_ignores_its_window_differs() -> None:
    model = make("mistral", sliding_window=9)
    model.set_attn_implementation(VARLEN)
    assert difference(model, "sdpa", torch.float32, longest=64) is None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # the mask has it, as under SDPA
    assert difference(model, "sdpa", torch.float32, longest=64) is None
    assert model.config._attn_implementation == VARLEN


def test_a_resumed_run_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cpu(make(), before="sdpa").name == "sdpa"
    assert on_cpu(make(), before=VARLEN) == (VARLEN, "as when the run was started", True)
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*attention flash_attention_2.*--overwrite"):
        on_cpu(make(), before="flash_attention_2")
    monkeypatch.setattr(attention, "varlen_reference", fails)
    with pytest.raises(UserError, match="cannot be used here"):
        on_cpu(make(), before=VARLEN)


def test_all_models_of_a_run_have_the_same_attention() -> None:
    student, teacher = make(), make("gemma2", head_dim=8)
    with pytest.raises(Refused, match="the teacher: "):
        choose("auto", [student, teacher], CUDA, torch.bfloat16, 64)
    assert student.config._attn_implementation == "sdpa"
    twin = make("mistral", sliding_window=6)
    choose("auto", [student, twin], CPU, torch.float32, 64)
    assert [one.config._attn_implementation for one in (student, twin)] == [VARLEN, VARLEN]


def test_kernels_flatten_and_masks_do_not() -> None:
    flat = (VARLEN, "flash_attention_2", "flash_attention_4", "flex_attention", "kernels-community/flash-attn2")
    assert [is_flat(name) for name in flat] == [True] * len(flat)
    assert not is_flat("sdpa")
    assert not is_flat("eager")
