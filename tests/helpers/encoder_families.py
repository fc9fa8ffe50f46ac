"""Tiny models of many families of encoders, from their configuration classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
AFTER = {"type_vocab_size": 1}  # positions begin after the padding token
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": AFTER,
    "xlm-roberta": AFTER,
    "camembert": AFTER,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "mpnet": {},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "nomic_bert": {},
    "eurobert": {},
    "gte": {},
    "ernie": {},
    "convbert": {"embedding_size": 32},
    "roformer": {"embedding_size": 32},
    "data2vec-text": AFTER,
    "megatron-bert": {},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "squeezebert": {"embedding_size": 32},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "fnet": {},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None},
    "ibert": AFTER,
    "nystromformer": {"segment_means_seq_len": 64, "num_landmarks": 64},
    "longformer": {"attention_window": 8, **AFTER},
    "big_bird": {"attention_type": "original_full"},
    "xmod": {**AFTER, "languages": ["en_XX"], "default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 400, "shape_vocab_size": 400},
    "jina_embeddings_v3": {},
}


def make_encoder_family(folder: Path, family: str) -> Path:
    """Save the random body of an encoder, with a tokenizer that writes [CLS] a [SEP] b [SEP]."""
    import torch
    from transformers import AutoConfig, AutoModel

    from helpers.classifiers import encoder_tokenizer

    tokenizer = encoder_tokenizer(types=False)
    pad = tokenizer.pad_token_id
    sizes = {**WIDE, "max_position_embeddings": 64 + pad + 1, **ENCODERS[family]}
    own = {key: value for key, value in sizes.items() if value is not None}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=pad, **own)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder
