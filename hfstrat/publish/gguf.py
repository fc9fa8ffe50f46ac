"""A GGUF file of a Llama model with a byte-level BPE, for llama.cpp and Ollama, written with the `gguf` package.

Other models are refused, since llama.cpp's own converter supports more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.data.chat_template import with_options
from hfstrat.errors import UserError

INSTEAD = "llama.cpp's convert_hf_to_gguf.py supports more models (run it on a merged folder)"
LAYER = {  # modules of a block: transformers' name, GGUF's name
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, tokenizer: Any, output: Path, options: dict[str, Any] | None = None) -> None:
    """Write weights (matrices in 16 bits), config, tokenizer and chat template.

    Args:
        options: arguments of the chat template, which become its defaults.

    Raises:
        UserError: the model or the tokenizer is not supported.
    """
    import gguf

    _check(model)
    words = _tokenizer(tokenizer)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_words(writer, gguf, tokenizer, words, config.vocab_size)
    if tokenizer.chat_template:
        writer.add_chat_template(with_options(tokenizer.chat_template, options or {}))
    for name, weight in _tensors(model, heads, kv_heads):
        writer.add_tensor(name, *_stored(gguf, weight, model.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _check(model: Any) -> None:
    name = type(model).__name__
    kind = _rope(model.config).get("rope_type", "default")
    if name != "LlamaForCausalLM" or kind != "default" or model.config.attention_bias or model.config.mlp_bias:
        what = name if name != "LlamaForCausalLM" else f"Llama model with {kind} positions or biases"
        raise UserError(f"--format gguf: a {what} is not supported; expected a plain Llama model. {INSTEAD}")


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's JSON with llama.cpp's name of its pre-tokenizer as `pre`."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    split = content.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    kinds = [step.get("type") for step in steps]
    if content["model"]["type"] == "BPE" and not content["model"].get("byte_fallback") and not content.get("normalizer"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return content | {"pre": "gpt-2"}
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return content | {"pre": "smollm"}
    by = " and ".join(filter(None, kinds))
    how = f"split by {by}" if by else "without a pre-tokenizer"
    raise UserError(
        f"--format gguf: this tokenizer ({content['model']['type']}, {how}) is not supported; "
        f"expected a byte-level BPE like that of GPT-2 or SmolLM. {INSTEAD}"
    )


def _add_words(writer: Any, gguf: Any, tokenizer: Any, words: dict[str, Any], size: int) -> None:
    by_id = {index: word for word, index in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in words.get("added_tokens") or []}
    names = [by_id.get(index, f"[PAD{index}]") for index in range(size)]  # a padded embedding has rows without a token
    kinds = [gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED for index in range(size)]
    for index, control in special.items():
        kinds[index] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in words["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(starts)


def _tensors(model: Any, heads: int, kv_heads: int) -> Any:
    """Names and weights in GGUF's order of rows: the two halves of each head's rotation are interleaved."""
    state = model.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in LAYER.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                rows, count = weight.shape[0], heads if theirs == "attn_q" else kv_heads
                weight = weight.reshape(count, 2, rows // count // 2, -1).transpose(1, 2).reshape(weight.shape)
            yield f"blk.{layer}.{theirs}.weight", weight
    yield "output_norm.weight", state["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]


def _stored(gguf: Any, weight: Any, dtype: Any) -> tuple[Any, None, Any]:
    """Vectors in float32, matrices in the model's own 16 bits or float16."""
    import torch

    weight = weight.detach().cpu()
    if weight.ndim == 1:
        return weight.float().numpy(), None, gguf.GGMLQuantizationType.F32
    if dtype == torch.bfloat16:
        bits = weight.to(torch.bfloat16).contiguous().view(torch.uint8).reshape(weight.shape[0], -1)
        return bits.numpy(), None, gguf.GGMLQuantizationType.BF16
    return weight.to(torch.float16).contiguous().numpy(), None, gguf.GGMLQuantizationType.F16
