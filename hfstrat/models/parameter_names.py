"""Facts from the names of parameters and of config keys, without torch: block, embedding or head; sizes; quantized bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from math import prod
from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe.section import Quantization, Shapes

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer|stages)\.(\d+)\.")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")
CLASS_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|pre_classifier|pooler|sequence_summary)\.|^head\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|layernorm|final_layer_norm|final_layernorm|final_norm|norm_f)\.(?:weight|bias)$")
CONFIG_KEYS = {  # a size: its keys in config.json, over the model families
    "width": ("hidden_size", "n_embd", "dim", "d_model", "emb_dim"),
    "inner": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "context": ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "model_max_length"),
    "vocabulary": ("vocab_size",),
}
BELOW = re.compile(r"(?:^|\.)(?:embed\w*|\w*embeddings?|wte|wpe)\.")


def config_size(config: dict[str, Any], size: str) -> int:
    """A size of `CONFIG_KEYS` in a config.json; 0 if the config does not have it."""
    return next((config[key] for key in CONFIG_KEYS[size] if isinstance(config.get(key), int)), 0)


def height(name: str, blocks: int) -> int:
    """The depth of a parameter: 0 for embeddings, 1 + index for a block, `blocks` + 1 after the last block."""
    if match := BLOCK.search(name):
        return int(match.group(1)) + 1
    return 0 if BELOW.search(name) and not HEAD.search(name) else blocks + 1


def count_blocks(names: Iterable[str]) -> int:
    return max((int(match.group(1)) + 1 for name in names if (match := BLOCK.search(name))), default=0)


def stages(shapes: dict[str, tuple[int, ...]], blocks: int) -> list[set[str]]:
    """The stages of gradual unfreezing, from the top down: parameters after the blocks, block by block, embeddings last.

    Norms and biases after the blocks are not a separate stage: they belong to that of the last block.
    """
    heights = {name: height(name, blocks) for name in shapes}
    found = [{name for name in shapes if heights[name] == at} for at in sorted(set(heights.values()), reverse=True)]
    if len(found) > 1 and all(len(shapes[name]) < 2 for name in found[0]):
        found[:2] = [found[0] | found[1]]
    return found


POSITIONS = re.compile(r"\.(?:wpe|pos_embed|\w*embeddings?)\.|(?:^|\.)embed_positions\.|(?:^|\.)shared\.")


def embeddings_of(shapes: Shapes) -> str:
    """The name of the input embeddings: by its name, else the longest matrix outside of the blocks with `embed` in its name."""
    named = [name for name in shapes if EMBEDDING.search(name)]
    others = [name for name, shape in shapes.items() if "embed" in name and len(shape) == 2 and not BLOCK.search(name)]
    return max(named or others, key=lambda name: shapes[name][0])


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether the path of a module, or of a module that contains it, is or ends with one of these names."""
    around = module.split(".")
    paths = [".".join(around[: depth + 1]) for depth in range(len(around))]
    return any(path == name or path.endswith(f".{name}") for path in paths for name in names)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer, but not of a head, judged by its name."""
    other = (HEAD, CLASS_HEAD, EMBEDDING, POSITIONS)
    return name.endswith(".weight") and len(shape) == 2 and not any(pattern.search(name) for pattern in other)


def weight_bytes(shapes: Shapes, section: Quantization | None, trained: Iterable[str] = (), each: float = 2) -> int:
    """Bytes of a frozen model's weights in memory.

    Args:
        shapes: its parameters.
        trained: names of the trainable ones, which are not quantized.
        each: bytes per weight that is not quantized.
    """
    trained, total = set(trained), 0.0
    for name, shape in shapes.items():
        quantized = section is not None and is_linear(name, shape) and name not in trained
        if section is None or not quantized or is_named(name.removesuffix(".weight"), section.skip_modules):
            total += prod(shape) * each
        else:
            total += prod(shape) * section.bits / 8 + (4 * shape[0] if section.name == "int8" else 0)
    return int(total)


def check_modules(key: str, names: Iterable[str], modules: Iterable[str]) -> None:
    """Refuse names that match no module. Raises UserError with the key and the nearest name."""
    modules = list(modules)
    known = sorted({last for module in modules if not (last := module.rsplit(".", 1)[-1]).isdigit()})
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"{key}: '{name}' matches no module of this model; {hint}")
