"""How deep a parameter sits, told from its name alone: blocks are numbered, embeddings are below, norm and head above."""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|final_norm|norm_f)\.(?:weight|bias)$")
BELOW = re.compile(r"(?:^|\.)(?:embed\w*|\w*embeddings?|wte|wpe)\.")


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
