"""The terms of a run's memory: what stays, what comes and goes. In bytes.

The terms follow what hfstrat does: what learns is in float32, what is frozen in 16 bits; autocast keeps 16-bit copies of
learning matrices during a pass; AdamW has two moments; the loss goes through the head in chunks; no row is longer
than `max_length`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from hfstrat.advisor import bands
from hfstrat.advisor.activations import block_bytes, is_input, live_blocks
from hfstrat.advisor.hardware import Sharing
from hfstrat.advisor.kernels import compiled
from hfstrat.advisor.shapes import Model
from hfstrat.depth import BLOCK, EMBEDDING, HEAD
from hfstrat.strategies import Learning

CHUNK_BYTES = {True: 16 * 2**20, False: 256 * 2**20}  # of a chunk's logits, on a CPU or not: as in hfstrat.head_loss
CHUNK_ROWS = 128
FEATURE_TOKENS = {True: 2048, False: 32_768}  # of a batch that pooled features are made of, as in hfstrat.probing
PROBE = (2, 128)  # rows and tokens whose logits are kept to compare the artefact with


@dataclass(frozen=True)
class Shape:
    """Of a pass: rows of `length` tokens, `micro` at a time, `passes` of them an optimiser step, `eval_rows` in an evaluation.

    `compute`: bytes of a number in the forward pass; `frozen`: bytes of a frozen weight of a linear layer, if it is quantized;
    `rows`: training rows in all; `widths`: how many batches come in, in training and in evaluation.
    """

    length: int
    micro: int
    passes: int = 1
    eval_rows: int = 0
    recompute: bool = False
    compute: int = 2
    on_cpu: bool = True
    frozen: float | None = None
    supervised: float = 1.0
    rows: int = 0
    classifies: bool = False
    widths: tuple[int, int] = (1, 1)

    @property
    def tokens(self) -> int:
        return self.length * self.micro


class Terms:
    """The terms, each made once."""

    def __init__(self, model: Model, learning: Learning, shape: Shape, sharing: Sharing) -> None:
        self.m, self.l, self.s, self.sharing = model, learning, shape, sharing
        self.k = bands.constants()["cpu" if shape.on_cpu else "cuda"]
        whole = {name: prod(found) for name, found in learning.shapes.items()}
        self.matrices = {n: whole[n] for n, s in learning.shapes.items() if BLOCK.search(n) and len(s) == 2}
        adapters = sum(learning.rank * sum(learning.shapes[name]) for name in learning.adapted)
        self.learning = adapters + sum(whole[name] for name in learning.names)
        self.frozen = sum(count for name, count in whole.items() if name not in learning.names)
        self.all = sum(whole.values())
        copied = sum(count for name, count in self.matrices.items() if name in learning.names) + adapters
        self.copies = 2.0 * copied if shape.compute == 2 and not sharing.shards_weights else 0.0  # else of what is gathered
        self.table = float(model.vocabulary * model.width)
        self.largest = max((count for name, count in self.matrices.items() if name in learning.names), default=0)

    # what stays

    def weights(self) -> float:
        n = self.sharing.processes
        frozen = self.s.compute * float(self.frozen)
        if self.s.frozen is not None:
            packed = sum(count for name, count in self.matrices.items() if name not in self.l.names)
            frozen += (self.s.frozen - self.s.compute) * packed
        held = 4.0 * self.learning + frozen
        if self.sharing.offloads_weights:
            return self._gathered()
        return held / n + self._gathered() if self.sharing.shards_weights else held

    def _gathered(self) -> float:
        """Weights of two blocks at a time are whole where they are sharded, and the embeddings."""
        depth = max(1, self.m.layers)
        return self.s.compute * (2 * sum(self.matrices.values()) / depth + self.m.vocabulary * self.m.width)

    def gradients(self) -> float:
        n = self.sharing.processes
        whole = 4.0 * self.learning
        buckets = whole if self.sharing.kind == "ddp" else 0.0
        return (whole / n if self.sharing.shards_gradients else whole) + buckets

    def optimizer(self) -> float:
        if self.sharing.offloads_optimizer:
            return 0.0
        return 8.0 * self.learning / (self.sharing.processes if self.sharing.shards_optimizer else 1)

    def caches(self) -> float:
        """The logits that the artefact is compared with, the teacher's states of a batch."""
        if self.s.classifies:
            return 0.0
        rows, tokens = PROBE
        return 4.0 * rows * min(tokens, self.s.length) * self.m.vocabulary

    def kept_teacher(self) -> float:
        """Its head: what it said of each token is kept on the disk."""
        return self.s.compute * float(self.m.vocabulary * self.m.width) if self.l.teacher else 0.0

    def base(self) -> dict[str, float]:
        return {
            "weights": self.weights(),
            "optimizer": self.optimizer(),
            "teacher": self.kept_teacher(),
            "caches": self.caches(),
            "framework": self.k["framework"],
            "compiled kernels": self.kernels(),
        }

    def kernels(self) -> float:
        """What oneDNN compiled; see `hfstrat.advisor.kernels`."""
        if self.s.compute != 2 or not self.s.on_cpu:
            return 0.0
        whole, (training, evaluating) = not self.s.classifies and self.chunk(self.s.tokens) >= self.s.tokens, self.s.widths
        if self.l.body_once and self.s.classifies:
            training = min(training, ceil(self.s.rows * self.s.length / FEATURE_TOKENS[True]))
        return self.k["kernel"] * compiled(self.m, self.l, training, evaluating, whole)

    # what comes and goes

    def activations(self) -> float:
        """What autograd keeps of one pass."""
        tokens, wide = self.s.tokens, self._wide()
        live = live_blocks(self.m, self.l)
        ends = 2 * 4.0 * self.m.width * tokens  # embeddings, and the last norm
        if self.s.recompute:
            return ends + tokens * wide * self.m.width * len(live)
        return ends + sum(self._block(block) for block in live)

    def volume(self) -> float:
        """What of a pass goes through the allocator in small pieces."""
        whole = sum(self._block(block) for block in live_blocks(self.m, self.l))
        passed = max(whole, self.activations()) if self.s.on_cpu else self.activations()  # also what is recomputed
        return passed + self.head_forward()[0]

    def _wide(self) -> int:
        return 4 if self.s.compute == 4 or any(is_input(name) for name in self.l.names) else 2

    def _block(self, block: object) -> float:
        """Rows of a batch differ in length, nearly always."""
        return self.s.tokens * block_bytes(self.m, self.l, block, self.s.compute, self.s.length, True)  # type: ignore[arg-type]

    def one_block(self) -> float:
        """What the recomputed block keeps, at most."""
        return max((self._block(block) for block in live_blocks(self.m, self.l)), default=0.0)

    def workspace(self) -> float:
        """What a block's backward pass needs for the moment; attention with dropout has a gradient for all pairs."""
        if not live_blocks(self.m, self.l):
            return 0.0
        pairs = 2.0 * self.m.heads * self.s.length if self.m.attention_dropout else 0.0
        return self.s.tokens * (3.0 * self.s.compute * self.m.inner + 8.0 * self.m.width + pairs) + 6.0 * self.largest

    @property
    def head_learns(self) -> bool:
        tied = self.m.tied and not any(HEAD.search(name) for name in self.l.shapes)
        return any((EMBEDDING if tied else HEAD).search(name) for name in self.l.names)

    def head_forward(self) -> tuple[float, float]:
        """The chunked loss: in small pieces a chunk's logits, its gradients and those of what goes in; the gradient of the
        head's weight and its copy in 16 bits, which are large."""
        if self.s.classifies:
            return 0.0, 0.0
        rows, words, width, a = self.s.tokens * self.s.supervised, self.m.vocabulary, self.m.width, self.s.compute
        chunk = self.chunk(rows) * words
        buffers = chunk * (4 + a + (4 + a if a == 2 else 0) + (4 if a == 2 and self.head_learns else 0))
        buffers += chunk * 8 if self.l.teacher else 0
        tables = (4 + (2 if a == 2 else 0)) * self.table if self.head_learns else 0.0
        return rows * width * (self._wide() + 4) + buffers, tables

    def head_backward(self) -> tuple[float, float]:
        """The gradient of the head's weight as it was made, and scaled."""
        if self.s.classifies:
            return 0.0, 0.0
        states = self.s.tokens * self.s.supervised * self.m.width * 8.0
        return states, 8.0 * self.table if self.head_learns else 0.0

    def chunk(self, rows: float) -> float:
        size = CHUNK_BYTES[self.s.on_cpu] // (4 * self.m.vocabulary)
        return min(rows, max(CHUNK_ROWS, size, self.m.width // 4 if self.head_learns else 0))
