"""How far off the predictions were where they were checked: read from what the benchmarks stored.

The terms of a run's memory: what stays, what comes and goes. In bytes.

The terms follow what hfstrat does: what learns is in float32, what is frozen in 16 bits; autocast keeps 16-bit copies of
learning matrices during a pass; AdamW has two moments; the loss goes through the head in chunks; no row is longer
than `max_length`.


Peak memory of a run above its imports: for each phase of it a sum of named terms; the largest phase is the prediction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.advisor.activations import block_bytes, compiled, is_input, live_blocks
from hfstrat.advisor.hardware import Sharing
from hfstrat.advisor.shapes import Model
from hfstrat.models.parameter_names import BLOCK, EMBEDDING, HEAD
from hfstrat.strategies.description import Description

HERE = Path(__file__).parent


class Band(NamedTuple):
    """Median and worst relative error of a stored validation, and of how many configurations."""

    median: float
    worst: float
    runs: int

    def words(self) -> str:
        return f"within {self.worst:.0%} ({self.median:.0%} at the median) in the {self.runs} runs that it was checked with"


@lru_cache
def constants() -> dict[str, Any]:
    """What was fitted on measured runs: see benchmarks/memory_prediction.py."""
    found: dict[str, Any] = json.loads((HERE / "constants.json").read_text(encoding="utf-8"))
    return found


def memory_band() -> Band | None:
    found = constants().get("memory_band")
    return Band(found["median"], found["worst"], found["count"]) if found else None


def time_band(source: str) -> float | None:
    """The worst relative error of times whose rate is from this source; None: it was not validated."""
    found = constants().get("time_bands", {}).get(source)
    return float(found["worst"]) if found else None


CHUNK_BYTES = {True: 16 * 2**20, False: 256 * 2**20}  # of a chunk's logits, on a CPU or not: as in hfstrat.models.chunked_loss


CHUNK_ROWS = 128


FEATURE_TOKENS = {True: 2048, False: 32_768}  # of a batch that pooled features are made of, as in hfstrat.strategies.head


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

    def __init__(self, model: Model, learning: Description, shape: Shape, sharing: Sharing) -> None:
        self.m, self.l, self.s, self.sharing = model, learning, shape, sharing
        self.k = constants()["cpu" if shape.on_cpu else "cuda"]
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
        """What oneDNN compiled; see `hfstrat.advisor.activations`."""
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


FEATURES_KEPT = 16_384  # rows whose features of all layers are in memory at a time


class Prediction(NamedTuple):
    """Bytes by phase and term. The peak is the largest phase."""

    phases: dict[str, dict[str, float]]

    @property
    def phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def terms(self) -> dict[str, float]:
        return self.phases[self.phase]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def predict(model: Model, learning: Description, shape: Shape, sharing: Sharing | None = None) -> Prediction:
    """The phases of a run on one device."""
    parts = _Phases(model, learning, shape, sharing or Sharing())
    phases = {"loading": parts.loading(), "evaluation": parts.evaluation(), "best weights": parts.best()}
    if learning.body_once and shape.classifies:
        phases["features"] = parts.features()
    else:
        phases |= {"forward pass": parts.forward(), "backward pass": parts.backward(), "optimizer step": parts.step()}
    if learning.teacher:
        phases["asking the teacher"] = parts.teacher()
    return Prediction({name: {key: value for key, value in terms.items() if value} for name, terms in phases.items()})


class _Phases(Terms):
    """What is there at a time, in each phase."""

    def forward(self) -> dict[str, float]:
        small, tables = self.head_forward()
        return {
            **self.base(),
            "gradients": self.gradients() if self.s.passes > 1 else 0.0,
            "16-bit copies": self.copies,
            "activations": self.activations(),
            "head and loss": small + tables,
            "kept by the allocator": self.kept(),
        }

    def backward(self) -> dict[str, float]:
        """The largest of its beginning, when all activations are there, and its end, when all gradients are."""
        small, tables = self.head_backward()
        begins = {
            **self.base(),
            "gradients": self.gradients() if self.s.passes > 1 else 0.0,
            "16-bit copies": 0.0 if self.s.recompute else self.copies,
            "activations": self.activations() + (self.one_block() if self.s.recompute else 0.0),
            "head and loss": small + tables,
            "workspace": self.workspace(),
            "kept by the allocator": self.kept(),
        }
        tied = self.head_learns and not any(HEAD.search(name) for name in self.l.shapes)
        ends = {
            **self.base(),
            "gradients": self.gradients(),
            "activations": self.one_block() if live_blocks(self.m, self.l) else 0.0,
            "head and loss": 8.0 * self.table if tied and not self.s.classifies else 0.0,
            "workspace": self.workspace(),
            "kept by the allocator": self.kept(),
        }
        return max(begins, ends, key=lambda terms: sum(terms.values()))

    def kept(self) -> float:
        """Holes: what the allocator has for small pieces beyond those that are there, as rows differ in length."""
        return self.k["holes"] * self.volume()

    def retained(self) -> float:
        """What a CPU's allocator keeps of the passes' small pieces for later ones: large pieces go back at once."""
        large = self.k["large"]
        tables = sum(4.0 * prod(self.l.shapes[name]) for name in self.l.names if 4.0 * prod(self.l.shapes[name]) > large)
        before = max(0.0, self.gradients() - tables) if self.s.passes > 1 else 0.0
        small = self.copies + self.activations() + self.head_forward()[0] + self.kept()
        return self.k["retained"] * (before + small)

    def step(self) -> dict[str, float]:
        return {**self.base(), "gradients": self.gradients()}

    def evaluation(self) -> dict[str, float]:
        rows = (self.s.eval_rows or 2 * self.s.micro) * self.s.length
        a, words = self.s.compute, self.m.vocabulary
        inside = rows * (a * 3.0 * self.m.inner + 4.0 * self.m.width * 4)
        head = 0.0
        if not self.s.classifies:
            chunk = min(rows, max(CHUNK_ROWS, CHUNK_BYTES[self.s.on_cpu] // (4 * words))) * words
            head = chunk * (a + 8.0) + (2.0 * words * self.m.width if self.head_learns and a == 2 else 0.0)
        # of a head that was solved the result is made beside the body: as much of it as is below the chosen layer, say half
        shorter = 0.5 * self.s.compute * (self.all + self.table) if self.l.body_once and self.s.classifies else 0.0
        return {**self.base(), "16-bit copies": self.copies, "evaluation": inside + head, "result": shorter}

    def best(self) -> dict[str, float]:
        """The best weights are put back from their checkpoint, beside those that are there."""
        if self.l.body_once and self.s.classifies:
            return self.base()
        saved = 4.0 * self.learning + (0.0 if self.l.rank else self.s.compute * float(self.frozen))
        return {**self.base(), "best weights": self.k["restored"] * saved, "kept by the allocator": self.retained()}

    def loading(self) -> dict[str, float]:
        stored = 0.0 if self.m.by_hand else float(self.m.stored)
        turned = self.k["loading"] * stored * self.learning / max(1, self.all)  # into float32
        return {"weights": self.weights(), "loading": turned, "framework": self.k["framework"]}

    def features(self) -> dict[str, float]:
        rows = min(FEATURE_TOKENS[self.s.on_cpu], max(1, self.s.rows) * self.s.length)
        inside = rows * (self.s.compute * 3.0 * self.m.inner + 4.0 * self.m.width * 6)
        kept = 4.0 * self.m.width * min(self.s.rows, FEATURES_KEPT) * 2
        return {**self.base(), "activations": inside, "caches": self.caches() + kept}

    def teacher(self) -> dict[str, float]:
        rows = (self.s.eval_rows or 2 * self.s.micro) * self.s.length
        inside = rows * (self.s.compute * 3.0 * self.m.inner + 16.0 * self.m.width)
        return {
            "weights": self.weights(),
            "teacher": self.s.compute * float(self.l.teacher),
            "activations": inside,
            "caches": self.caches(),
            "framework": self.k["framework"],
        }
