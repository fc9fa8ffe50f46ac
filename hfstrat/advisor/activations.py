"""Compiled kernels: on a CPU oneDNN compiles each product in 16 bits anew for each of its shapes, and keeps them.

Seen in torch 2.13 (`ONEDNN_VERBOSE=profile_create`): a kernel takes half a MiB whatever its shape, 1,024 are kept, and the
shapes are the products of a pass times the widths that batches come in. Nothing of this holds in float32, or on a GPU.


What autograd keeps of a forward pass, in bytes a token: added up from the operations of transformers' own blocks.

Three block plans: Llama's (RMSNorm, rotary positions, gated MLP), GPT-2's and BERT's (LayerNorm, dropout, GELU). They are
held by a test against what autograd really saves. In 16 bits autocast casts the input of each linear layer for itself, so that
q, k and v keep three copies of one tensor; in float32 they share one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hfstrat.advisor.shapes import Model
from hfstrat.models.parameter_names import BLOCK, EMBEDDING
from hfstrat.strategies.description import Description
from hfstrat.trainer.plan import CPU_MULTIPLE

MOST = 1024  # oneDNN's cache of primitives


OF_A_PRODUCT = 3  # forward, and the gradients of its input and of its weight


HEAD = 2  # forward, and the gradient of its input


ATTENTION, ATTENTION_FORWARD = 3, 1  # products of a row's attention, with and without its backward pass


EVALUATED = 128  # rows: how many there are to evaluate on is not known, and more add few widths


def widths(lengths: np.ndarray, micro: int, share: int, steps: int | None = None) -> int:
    """How many widths batches of `micro` rows have, in steps of `share` rows that are sorted in themselves.

    Args:
        steps: how many; None: those of an epoch.
    """
    rounded = -(-np.asarray(lengths, dtype=np.int64) // CPU_MULTIPLE)
    drawn = np.random.default_rng(0).permutation(rounded)
    drawn = np.resize(drawn, (steps or max(1, -(-len(drawn) // share))) * share)  # the last step is filled from the beginning
    steps_of = np.sort(drawn.reshape(-1, share), axis=1).ravel()
    batches = np.resize(steps_of, -(-len(steps_of) // micro) * micro).reshape(-1, micro)
    return len(np.unique(batches.max(axis=1)))


def of_batches(
    lengths: np.ndarray, micro: int, share: int, eval_rows: int, once: bool = False, steps: int | None = None
) -> tuple[int, int]:
    """Widths in training, and in evaluation where they are others; rows to evaluate on are taken to be like the others.

    Args:
        once: the body runs once over all rows, sorted, so that each width comes.
    """
    training = widths(lengths, 1, 1) if once else widths(lengths, micro, share, steps)
    drawn = np.random.default_rng(1).permutation(lengths)[:EVALUATED]
    return training, 0 if eval_rows == micro else widths(drawn, eval_rows, eval_rows)


def compiled(model: Model, learning: Description, training: int, evaluating: int, whole_head: bool) -> int:
    """Kernels of a run whose batches come in so many widths; `whole_head`: the head's product is as wide as the batch."""
    products = {name: shape for name, shape in learning.shapes.items() if BLOCK.search(name) and len(shape) == 2}
    adapted = {learning.shapes[name] for name in learning.adapted if len(learning.shapes[name]) == 2}
    adapters = len({shape[0] for shape in adapted}) + len({shape[1] for shape in adapted})
    forward = len(set(products.values()))
    backward = forward if live_blocks(model, learning) else 0
    weights = len({shape for name, shape in products.items() if name in learning.names})
    attention = ATTENTION if backward else ATTENTION_FORWARD
    head = HEAD if whole_head else 0
    of_a_pass = forward + backward + weights + OF_A_PRODUCT * adapters + head + attention
    return min(MOST, training * of_a_pass + evaluating * (forward + adapters + ATTENTION_FORWARD))


class Block(NamedTuple):
    """How a block takes part: `learns` (its own weights), `adapted` (by adapters), or only `passes` gradients on."""

    learns: bool
    adapted: bool

    @property
    def state(self) -> str:
        return "learns" if self.learns else "adapted" if self.adapted else "passes"


def live_blocks(model: Model, learning: Description) -> list[Block]:
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


def block_bytes(model: Model, learning: Description, block: Block, compute: int, length: int, masked: bool) -> float:
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
    learns, kept, narrow = state == "learns", state != "passes", a == 2
    norms = 2 * (4 * m.width + 4) + (2 * wide * m.width if learns else 0)  # the normalised, for the weight's gradient
    copies = 5 if narrow else 2  # q, k, v; gate, up
    inputs = copies * a * m.width if kept else 0
    shared = queries if masked else keys  # with a mask keys and values are repeated, and it is cast for each block
    attention = a * (2 * queries + 2 * shared) + 4 * m.heads + (a * length if masked else 0)
    inner = a * m.inner * (4 if kept else 3)
    adapters = 7 * a * rank + (a * queries if narrow else 0) if state == "adapted" else 0
    return norms + inputs + attention + inner + adapters


def _bert(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    copies = 5 if a == 2 and (wide == 4 or state == "adapted") else 3  # q, k, v; both dense layers
    inputs = copies * a * m.width if state != "passes" else 0
    inner = a * m.inner * (2 if state != "passes" else 1)
    return _norms(m, state, wide) + inputs + _attention(m, state, a, length) + inner + _around(m, state, a, 6 * rank)


def _gpt2(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    inputs = 3 * a * m.width if state != "passes" else 0
    inner = a * m.inner * (5 if state != "passes" else 4)  # its GELU is made of four operations
    return _norms(m, state, wide) + inputs + _attention(m, state, a, length) + inner + _around(m, state, a, 4 * rank)


def _norms(m: Model, state: str, wide: int) -> float:
    """Inputs of two LayerNorms, with a mean and a spread of each token."""
    return 2 * wide * m.width + 4 * (4 if state == "learns" else wide)


def _attention(m: Model, state: str, a: int, length: int) -> float:
    """Queries, keys and values; with dropout in float32, and with the matrix of all pairs three times."""
    if m.attention_dropout:
        return 3 * 4 * m.width + 3 * 4 * m.heads * length
    out = a * m.width if a == 2 and state == "adapted" else 0  # else it is what the dense layer keeps
    return 3 * a * m.width + 4 * m.heads + out


def _around(m: Model, state: str, a: int, ranks: int) -> float:
    """The noise of two dropouts, and what adapters put between their matrices."""
    return (2 * a * m.width if m.dropout else 0) + (a * ranks if state == "adapted" else 0)


PLANS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2}
