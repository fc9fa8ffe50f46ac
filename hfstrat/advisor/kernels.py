"""Compiled kernels: on a CPU oneDNN compiles each product in 16 bits anew for each of its shapes, and keeps them.

Seen in torch 2.13 (`ONEDNN_VERBOSE=profile_create`): a kernel takes half a MiB whatever its shape, 1,024 are kept, and the
shapes are the products of a pass times the widths that batches come in. Nothing of this holds in float32, or on a GPU.
"""

from __future__ import annotations

import numpy as np

from hfstrat.advisor.activations import live_blocks
from hfstrat.advisor.shapes import Model
from hfstrat.depth import BLOCK
from hfstrat.plan import CPU_MULTIPLE
from hfstrat.strategies import Learning

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


def compiled(model: Model, learning: Learning, training: int, evaluating: int, whole_head: bool) -> int:
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
