"""Packed rows without a block mask are computed as rows that stand alone; everything else is SDPA."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import (
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hfstrat.models import attention
from hfstrat.models.attention import VARLEN, Segments, find_segments, varlen_attention, varlen_reference

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = SHAPE | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 4},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 12},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma3_text": GROUPED
    | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_hidden_layers": 4},
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}
LENGTHS = [9, 7, 12, 1, 3]


def make(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


def examples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 320, (length,), generator=generator) for length in LENGTHS]


def gradient(model: Any, logits: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (logits.softmax(-1) * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_are_computed_as_rows_alone(family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = make(family), examples()
    alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in texts])
    expected = gradient(model, alone)
    windows = set[int]()

    def counted(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        windows.add(window_size[0] + 1)
        return varlen_reference(*args, window_size=window_size, **kwargs)

    monkeypatch.setattr(attention, "varlen_reference", counted)
    model.set_attn_implementation(VARLEN)
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    for rows in (1, 2):  # one row, or two of the same width
        ids, place = (one.reshape(rows, -1) for one in (torch.cat(texts), positions))
        if rows == 2 and family == "gpt2" and checkpointed:
            continue
        packed = model(input_ids=ids, position_ids=place, use_cache=False).logits.flatten(0, 1)
        if rows == 1:
            torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
            rounding = 1e-8 if family.startswith("gemma") else 1e-12  # its norms compute in float32
            torch.testing.assert_close(gradient(model, packed), expected, rtol=0, atol=rounding)
        else:
            torch.testing.assert_close(packed[: sum(LENGTHS[:2])], alone[: sum(LENGTHS[:2])], rtol=0, atol=1e-12)
    assert windows >= {model.config.get_text_config().to_dict().get("sliding_window") or 0} - {None}


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_and_generation_are_those_of_sdpa(family: str) -> None:
    model, texts = make(family), examples()
    right = pad_sequence(texts, batch_first=True), pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
    left = [one.flip(1) for one in right]
    found = {}
    for name in ("sdpa", VARLEN):
        model.set_attn_implementation(name)
        with torch.no_grad():
            padded = model(input_ids=right[0], attention_mask=right[1]).logits
            whole = model(input_ids=torch.stack([ids[:3] for ids in texts if len(ids) > 2])).logits
            answers = model.generate(
                input_ids=left[0], attention_mask=left[1], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        found[name] = padded, whole, answers
    for here, there in zip(found["sdpa"], found[VARLEN], strict=True):
        assert torch.equal(here, there)


def packed_mask(lengths: list[int], inner: Any) -> tuple[Any, int]:
    """The mask function that transformers makes for packed rows, and their width."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return packed_sequence_compatibility_function(inner, positions, number), sum(lengths)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 10))
def test_segments_say_what_the_mask_says(lengths: list[int], window: int) -> None:
    inner = sliding_window_causal_mask_function(window) if window else causal_mask_function
    visible, width = packed_mask(lengths, inner)
    found = find_segments(visible, 1, width, "cpu")
    if window == 1:
        assert found is None or torch.equal(found.as_mask(1), dense(visible, width))
        return
    assert found is not None
    assert found.ends.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert torch.equal(found.as_mask(1), dense(visible, width))


def dense(visible: Any, width: int) -> torch.Tensor:
    mask: torch.Tensor = sdpa_mask(1, width, width, mask_function=visible, allow_is_causal_skip=False)
    return mask


def test_masks_of_another_form_stay_masks() -> None:
    lengths, blocks = [6, 9, 5], torch.tensor([[-1, -1, 0, 0, 0, *[-1] * 15]])
    images = or_masks(causal_mask_function, blockwise_overlay(blocks))
    for inner in (images, bidirectional_mask_function):
        visible, width = packed_mask(lengths, inner)
        given = {"batch_size": 1, "q_length": width, "kv_length": width, "mask_function": visible, "dtype": torch.float32}
        mask = attention.varlen_mask(**given, allow_is_causal_skip=False)  # type: ignore[arg-type]
        assert isinstance(mask, torch.Tensor)
        assert torch.equal(mask, dense(visible, width))
    visible, width = packed_mask(lengths, chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)))
    chunks = find_segments(visible, 1, width, "cpu")  # each chunk is an example of its own
    assert chunks is not None
    assert torch.equal(chunks.as_mask(1), dense(visible, width))
    assert find_segments(causal_mask_function, 1, 9, "cpu") is None  # one example in each row


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int], window: int, scale: float) -> Any:
    """Attention token by token."""
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    for start, end in itertools.pairwise(ends):
        for place in range(start, end):
            first = max(start, place - window + 1) if window else start
            for head in range(query.shape[1]):
                keys, values = (one[first : place + 1, head // group] for one in (key, value))
                out[place, head] = ((keys @ query[place, head]) * scale).softmax(0) @ values
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 5])
def test_the_loop_over_examples_is_attention_in_float64(window: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    found = varlen_reference(query, key, value, ends, ends, 6, 6, scale=0.3, window_size=(window - 1, 0), enable_gqa=True)
    torch.testing.assert_close(found, naive(query, key, value, ends.tolist(), window, 0.3), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="expected"):
        varlen_reference(query, key, value, ends, ends, 6, 6, window_size=(-1, -1))


def test_dropout_and_what_the_kernel_lacks_use_the_mask_of_sdpa() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
    segments, module = Segments(torch.tensor([0, 3, 7], dtype=torch.int32), 4, 2), torch.nn.Module()
    kernel, _ = varlen_attention(module, query, key, value, segments)
    biased, _ = varlen_attention(module, query, key, value, segments, position_bias=torch.zeros(1, 2, 7, 7))
    torch.testing.assert_close(kernel, biased)
    torch.manual_seed(3)
    dropped, _ = varlen_attention(module, query, key, value, segments, dropout=0.5)
    torch.manual_seed(3)
    expected, _ = varlen_attention(module, query, key, value, segments.as_mask(1), dropout=0.5)
    assert torch.equal(dropped, expected)
    with pytest.raises(ValueError, match="softcap"):
        varlen_attention(module, query, key, value, segments, softcap=30.0)


def test_the_loop_has_the_arguments_of_the_kernel() -> None:
    ours, theirs = inspect.signature(varlen_reference).parameters, inspect.signature(varlen_attn).parameters
    for name, parameter in ours.items():
        assert parameter.kind == theirs[name].kind
        assert parameter.default == theirs[name].default


@pytest.mark.parametrize(("size", "width"), [(64, 64), (12, 12), (24, 16)])
def test_the_kernel_is_given_what_it_takes(size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory: shapes, types and the backward pass of torch's own kernel."""
    seen = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((query.shape, key.shape, value.shape, query.dtype, key.dtype, kwargs))
        return varlen_attn(query, key, value, *args, **kwargs)  # type: ignore[return-value]

    monkeypatch.setattr(attention, "_kernel", lambda device: kernel)
    with torch.device("meta"):
        query = torch.randn(2, 4, 10, size, requires_grad=True)  # a norm in float32 before it
        key = torch.randn(2, 2, 10, size, dtype=torch.bfloat16, requires_grad=True)
        value = torch.randn(2, 2, 10, width, dtype=torch.bfloat16, requires_grad=True)
        segments = Segments(torch.zeros(5, dtype=torch.int32), 6, 3)
        out, _ = varlen_attention(torch.nn.Module(), query, key, value, segments, scaling=0.5)
        assert (out.shape, out.dtype, out.device.type) == ((2, 10, 4, width), torch.bfloat16, "meta")
        out.sum().backward()
        assert query.grad is not None
        assert query.grad.shape == query.shape
        assert value.grad is not None
        assert value.grad.shape == value.shape
    padded = size + -size % 8
    ((queries, keys, values, *types, options),) = seen
    assert (queries, keys, values) == ((20, 4, padded), (20, 2, padded), (20, 2, padded))
    assert types == [torch.bfloat16] * 2
    assert options == {"scale": 0.5, "window_size": (2, 0), "enable_gqa": True}
