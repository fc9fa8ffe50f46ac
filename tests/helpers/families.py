"""Tiny models of many families of causal language models, from their configuration classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
HEAD = {"head_dim": 8}
TOP2 = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
ROUTED |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "starcoder2": {},
    "stablelm": {},
    "phi": {},
    "phi3": {},
    "persimmon": {},
    "arcee": {},
    "nemotron": {},
    "apertus": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "bloom": {},
    "mpt": {},
    "biogpt": {},
    "exaone4": {},
    "smollm3": {},
    "seed_oss": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": HEAD,
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "cohere": HEAD,
    "cohere2": HEAD,
    "glm": HEAD,
    "glm4": HEAD,
    "helium": HEAD,
    "ministral": HEAD,
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "falcon": {"new_decoder_architecture": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "minicpm3": LATENT,
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {**HEAD, **TOP2, "moe_intermediate_size": 32},
    "olmoe": TOP2,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, **ROUTED},
    "deepseek_v3": {**LATENT, **ROUTED},
    "glm4_moe": {**HEAD, **ROUTED},
    "dots1": ROUTED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "minimax": {"num_local_experts": 4, **HEAD},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    "lfm2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "layer_types": ["conv", "full_attention"],
    },
}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "jamba": {"num_experts": 4, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {**SSM, "attn_layer_indices": [1]},
    "falcon_h1": SSM,
    "granitemoehybrid": {**SSM, "num_local_experts": 4, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "qwen3_next": {
        **HEAD,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
}
FAMILIES = {**DENSE, **MOE, **RECURRENT}


def make_family(folder: Path, family: str) -> Path:
    """Save a random model of a family, of some 50 thousand parameters, with the tests' tokenizer."""
    import torch
    from conftest import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    own = {key: value for key, value in COMMON.items() if not (family == "falcon" and key == "num_key_value_heads")}
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(family, **{**own, **ends, **FAMILIES[family]}, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # so that no two tokens get the same logits
            torch.nn.init.normal_(parameter, 0, 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
