"""How deep a parameter sits, told from its name alone: blocks are numbered, embeddings are below, norm and head above."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|final_norm|norm_f)\.(?:weight|bias)$")
CONFIG_KEYS = {  # a size: its keys in config.json, over the model families
    "width": ("hidden_size", "n_embd", "dim", "d_model"),
    "inner": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "context": ("max_position_embeddings", "n_positions", "max_sequence_length"),
    "vocabulary": ("vocab_size",),
}
BELOW = re.compile(r"(?:^|\.)(?:embed\w*|\w*embeddings?|wte|wpe)\.")


def config_size(config: dict[str, Any], size: str) -> int:
    """A size of `CONFIG_KEYS` in a config.json; 0 if the config does not have it."""
    return next((config[key] for key in CONFIG_KEYS[size] if isinstance(config.get(key), int)), 0)


def height(name: str, blocks: int) -> int:
    """0 for embeddings, 1 + its number for a block, `blocks` + 1 for what comes after the last block."""
    if match := BLOCK.search(name):
        return int(match.group(1)) + 1
    return 0 if BELOW.search(name) and not HEAD.search(name) else blocks + 1


def count_blocks(names: Iterable[str]) -> int:
    return max((int(match.group(1)) + 1 for name in names if (match := BLOCK.search(name))), default=0)


def stages(shapes: dict[str, tuple[int, ...]], blocks: int) -> list[set[str]]:
    """What learns, from the top down: first what is above the blocks, then block by block, embeddings last.

    Norms and biases above the blocks are no stage of their own: with them the highest block begins.
    """
    heights = {name: height(name, blocks) for name in shapes}
    found = [{name for name in shapes if heights[name] == at} for at in sorted(set(heights.values()), reverse=True)]
    if len(found) > 1 and all(len(shapes[name]) < 2 for name in found[0]):
        found[:2] = [found[0] | found[1]]
    return found
