"""What autograd keeps of a forward pass, in bytes a token: added up from the operations of transformers' own blocks.

Three block plans: Llama's (RMSNorm, rotary positions, gated MLP), GPT-2's and BERT's (LayerNorm, dropout, GELU). They are
held by a test against what autograd really saves. In 16 bits autocast casts the input of each linear layer for itself, so that
q, k and v keep three copies of one tensor; in float32 they share one.
"""

from __future__ import annotations

from typing import NamedTuple

from hfstrat.advisor.shapes import Model
from hfstrat.depth import BLOCK, EMBEDDING
from hfstrat.strategies import Learning


class Block(NamedTuple):
    """How a block takes part: `learns` (its own weights), `adapted` (by adapters), or only `passes` gradients on."""

    learns: bool
    adapted: bool

    @property
    def state(self) -> str:
        return "learns" if self.learns else "adapted" if self.adapted else "passes"


def live_blocks(model: Model, learning: Learning) -> list[Block]:
    """The blocks that gradients go through, from the lowest one that has something to learn in or below it."""
    numbers = {name: int(match.group(1)) for name in learning.shapes if (match := BLOCK.search(name))}
    depth = max(numbers.values(), default=-1) + 1
    learns = {number for name, number in numbers.items() if name in learning.names}
    adapted = {number for name, number in numbers.items() if name in learning.adapted}
    below = any(is_input(name) for name in learning.names)
    lowest = 0 if below else min(learns | adapted, default=depth)
    return [Block(number in learns, number in adapted) for number in range(lowest, depth)]


def is_input(name: str) -> bool:
    """Whether a parameter stands below the blocks."""
    return bool(EMBEDDING.search(name)) or ".embeddings." in name or ".wpe." in name


def block_bytes(model: Model, learning: Learning, block: Block, compute: int, length: int, masked: bool) -> float:
    """Bytes a token that a block keeps.

    Args:
        compute: bytes of a number in the forward pass, 2 or 4.
        length: of a row, with padding; attention with dropout keeps its square.
        masked: rows of a batch differ in length, so that a mask is given.
    """
    wide = 4 if compute == 4 or any(is_input(name) for name in learning.names) else 2
    return PLANS[model.plan](model, learning.rank, block.state, compute, wide, length, masked)


def _llama(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    queries, keys = m.heads * m.head_width, m.kv_heads * m.head_width
    learns, adapted, narrow = state == "learns", state == "adapted", a == 2
    norms = 2 * (4 * m.width + 4)
    inputs = mlp_in = 0.0
    if learns:
        norms += 2 * wide * m.width  # the normalised, for the weight's gradient
    if narrow and (learns or adapted):
        inputs, mlp_in = 3 * 2 * m.width, 2 * 2 * m.width
    elif learns or adapted:
        inputs, mlp_in = 4 * m.width, 4 * m.width  # one for all
    shared = queries if masked and keys < queries else keys
    attention = a * (2 * queries + 2 * shared) + 4 * m.heads
    inner = a * 3 * m.inner + (a * m.inner if learns or adapted else 0)
    if adapted:
        inputs += a * queries if narrow else 0
        inputs += 7 * a * rank
    return norms + inputs + mlp_in + attention + inner


def _bert(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    learns, adapted, narrow = state == "learns", state == "adapted", a == 2
    kept = learns or adapted
    inputs = (3 * 2 + 2) * m.width if narrow and kept else 8 * m.width if kept else 0
    attention = _attention(m, a, length)
    dropped = 2 * a * m.width if m.dropout else 0
    norms = 2 * (4 * m.width + 8)
    inner = a * m.inner * 2 if kept else a * m.inner
    output = a * m.width if kept else 0
    return inputs + attention + dropped + norms + inner + output + (6 * a * rank if adapted else 0)


def _gpt2(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    learns, adapted = state == "learns", state == "adapted"
    kept = learns or adapted
    norms = 2 * (4 * m.width + 8)
    inputs = 2 * a * m.width if kept else 0
    dropped = 2 * a * m.width if m.dropout else 0
    gelu = 4 * a * m.inner + (a * m.inner if kept else 0)
    return norms + inputs + dropped + _attention(m, a, length) + gelu + (a * m.width if kept else 0)


def _attention(m: Model, a: int, length: int) -> float:
    """Queries, keys, values and what comes out; with dropout the matrix of all pairs is kept, several times."""
    plain = a * 4 * m.width + 4 * m.heads
    return plain + (3 * a * m.heads * length if m.attention_dropout else 0)


PLANS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2}
