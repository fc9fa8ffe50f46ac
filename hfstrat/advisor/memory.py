"""Peak memory of a run above its imports, in bytes: for each phase a sum of named terms. The largest phase is the prediction.

The terms follow what hfstrat does: trainable parameters are in float32, frozen ones in 16 bits; autocast stores 16-bit copies
of trainable matrices during a pass; AdamW has two moments; the loss goes through the LM head in chunks; no sequence is longer
than `max_length`.

On a CPU, oneDNN compiles each 16-bit matrix product again for each of its shapes and caches the kernel. Seen in torch 2.13
(`ONEDNN_VERBOSE=profile_create`): a kernel takes half a MiB whatever its shape, 1,024 are cached, and the shapes are the
products of a pass times the widths of the batches. In float32, and on a GPU, there is no such cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from hfstrat.advisor import towers
from hfstrat.advisor.architecture import Block, Model, block_bytes, live_blocks, trains_input, trains_stem
from hfstrat.advisor.hardware import Sharing, constants
from hfstrat.models import rows_per_chunk
from hfstrat.models.parameter_names import BLOCK, EMBEDDING, HEAD
from hfstrat.strategies.description import Description
from hfstrat.trainer.plan import CPU_MULTIPLE

CACHED_KERNELS = 1024  # capacity of oneDNN's cache of primitives
OF_A_PRODUCT = 3  # kernels: forward, and the gradients of input and weight
OF_THE_HEAD = 2  # kernels: forward, and the gradient of the input
ATTENTION, ATTENTION_FORWARD = 3, 1  # products of an attention, with and without the backward pass
EVALUATED = 128  # sampled examples; the number of evaluation examples is unknown, and more add few widths
FEATURE_TOKENS = {True: 2048, False: 32_768}  # of a batch for pooled features, as in hfstrat.strategies.head
# as in hfstrat.strategies.head.pooled: poolings, layers, examples and bytes of the features that are probed
POOLINGS, PROBED_LAYERS, PROBED, PROBED_BYTES = 2, 12, 2000, 256 * 2**20
COPIES, FEATURE_COPIES = 2.0, 3.0  # of probed features: with those of the fit; of all: as made, as written, as read
TF_IDF_ROWS = 20_000
PIXEL_BYTES = 4.0
PROBE = (2, 128)  # sequences and tokens whose logits are stored to compare the artifact with


def widths(lengths: np.ndarray, micro: int, share: int, steps: int | None = None) -> int:
    """The number of different widths of batches of `micro` sequences, in steps of `share` sequences sorted by length.

    Args:
        steps: number of steps; None: those of an epoch.
    """
    rounded = -(-np.asarray(lengths, dtype=np.int64) // CPU_MULTIPLE)
    drawn = np.random.default_rng(0).permutation(rounded)
    # the last step is filled up from the beginning
    drawn = np.resize(drawn, (steps or max(1, -(-len(drawn) // share))) * share)
    steps_of = np.sort(drawn.reshape(-1, share), axis=1).ravel()
    batches = np.resize(steps_of, -(-len(steps_of) // micro) * micro).reshape(-1, micro)
    return len(np.unique(batches.max(axis=1)))


def batch_widths(
    lengths: np.ndarray, micro: int, share: int, eval_rows: int, once: bool = False, steps: int | None = None
) -> tuple[int, int]:
    """The number of widths in training, and of those in evaluation if its batches differ; lengths are assumed alike.

    Args:
        once: the body runs once over all examples, sorted, so that each width occurs.
    """
    training = widths(lengths, 1, 1) if once else widths(lengths, micro, share, steps)
    drawn = np.random.default_rng(1).permutation(lengths)[:EVALUATED]
    return training, 0 if eval_rows == micro else widths(drawn, eval_rows, eval_rows)


def compiled(model: Model, description: Description, training: int, evaluating: int, whole_head: bool) -> int:
    """Compiled kernels of a run whose batches have so many widths; `whole_head`: the head's product is as wide as the batch."""
    products = {name: shape for name, shape in description.shapes.items() if BLOCK.search(name) and len(shape) == 2}
    adapted = {description.shapes[name] for name in description.adapted if len(description.shapes[name]) == 2}
    adapters = len({shape[0] for shape in adapted}) + len({shape[1] for shape in adapted})
    forward = len(set(products.values()))
    backward = forward if live_blocks(model, description) else 0
    weights = len({shape for name, shape in products.items() if name in description.names})
    attention = ATTENTION if backward else ATTENTION_FORWARD
    head = OF_THE_HEAD if whole_head else 0
    per_width = forward + backward + weights + OF_A_PRODUCT * adapters + head + attention
    return min(CACHED_KERNELS, training * per_width + evaluating * (forward + adapters + ATTENTION_FORWARD))


@dataclass(frozen=True)
class Shape:
    """The batches of a run.

    length: tokens per sequence.
    micro: sequences per pass; `passes` of them make an optimizer step.
    eval_rows: sequences per evaluation pass.
    compute: bytes per number in the forward pass.
    frozen: bytes per frozen weight of a linear layer, if it is quantized.
    supervised: share of the tokens that contribute to the loss.
    rows: training examples in total.
    widths: numbers of different batch widths in training and in evaluation.
    reads_words: whether examples are texts, of which TF-IDF is a baseline.
    pixels, image_tokens: of the images of a sequence: numbers that the vision tower is given, and tokens.
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
    reads_words: bool = True
    pixels: int = 0
    image_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.length * self.micro


class Phases:
    """The phases of a run, each a sum of terms by name."""

    def __init__(self, model: Model, description: Description, shape: Shape, sharing: Sharing) -> None:
        self.m, self.d, self.s, self.sharing = model, description, shape, sharing
        self.k = constants()["cpu" if shape.on_cpu else "cuda"]
        sizes = {name: prod(found) for name, found in description.shapes.items()}
        inside = description.beside.union(name for name in sizes if BLOCK.search(name))
        self.matrices = {n: sizes[n] for n, s in description.shapes.items() if n in inside and len(s) == 2}
        adapters = sum(description.rank * sum(description.shapes[name]) for name in description.adapted)
        self.trainable = adapters + sum(sizes[name] for name in description.names)
        self.frozen = sum(count for name, count in sizes.items() if name not in description.names)
        self.all = sum(sizes.values())
        copied = sum(count for name, count in self.matrices.items() if name in description.names) + adapters
        # sharded weights are copied when they are gathered
        self.copies = 2.0 * copied if shape.compute == 2 and not sharing.shards_weights else 0.0
        self.table = float(model.vocabulary * model.width)
        self.largest = max((count for name, count in self.matrices.items() if name in description.names), default=0)

    # terms of all phases

    def weights(self) -> float:
        n = self.sharing.processes
        frozen = self.s.compute * float(self.frozen)
        if self.s.frozen is not None:
            packed = sum(count for name, count in self.matrices.items() if name not in self.d.names)
            frozen += (self.s.frozen - self.s.compute) * packed
        stored = 4.0 * self.trainable + frozen
        if self.sharing.offloads_weights:
            return self._gathered()
        return stored / n + self._gathered() if self.sharing.shards_weights else stored

    def _gathered(self) -> float:
        """Of sharded weights, two blocks at a time and the embeddings are gathered."""
        depth = max(1, self.m.layers)
        return self.s.compute * (2 * sum(self.matrices.values()) / depth + self.m.vocabulary * self.m.width)

    def gradients(self) -> float:
        n = self.sharing.processes
        full = 4.0 * self.trainable
        buckets = full if self.sharing.kind == "ddp" else 0.0
        return (full / n if self.sharing.shards_gradients else full) + buckets

    def optimizer(self) -> float:
        if self.sharing.offloads_optimizer:
            return 0.0
        return 8.0 * self.trainable / (self.sharing.processes if self.sharing.shards_optimizer else 1)

    def caches(self) -> float:
        """The logits that the artifact is compared with."""
        if self.s.classifies:
            return 0.0
        rows, tokens = PROBE
        return 4.0 * rows * min(tokens, self.s.length) * self.m.vocabulary

    def teacher_head(self) -> float:
        """The LM head of the teacher; its hidden states are cached on disk."""
        return self.s.compute * float(self.m.vocabulary * self.m.width) if self.d.teacher else 0.0

    def base(self) -> dict[str, float]:
        return {
            "weights": self.weights(),
            "optimizer": self.optimizer(),
            "teacher": self.teacher_head(),
            "caches": self.caches(),
            "framework": self.k["framework"],
            "compiled kernels": self.kernels(),
            "baselines": self.k["baselines"] if self.s.classifies and self.s.reads_words else 0.0,
            "pixels": PIXEL_BYTES * self.s.pixels * self.s.micro,
        }

    def kernels(self) -> float:
        """The kernels that oneDNN has compiled."""
        if self.s.compute != 2 or not self.s.on_cpu:
            return 0.0
        full_head, (training, evaluating) = not self.s.classifies and self.chunk(self.s.tokens) >= self.s.tokens, self.s.widths
        if self.d.body_once and self.s.classifies:
            training = min(training, ceil(self.s.rows * self.s.length / FEATURE_TOKENS[True]))
        return self.k["kernel"] * compiled(self.m, self.d, training, evaluating, full_head)

    # terms of some phases

    def activations(self) -> float:
        """What autograd stores during one pass."""
        tokens, wide = self.s.tokens, self._wide()
        live = live_blocks(self.m, self.d)
        ends = (2 * 4.0 * self.m.width + self._stem()) * tokens + self._of_images()  # embeddings and the last norm
        if self.s.recompute:
            return ends + tokens * wide * self.m.width * len(live)
        return ends + sum(self._block(block) for block in live)

    def _stem(self) -> float:
        """Bytes for each position that autograd stores for the layers before the blocks."""
        return self._wide() * self.m.stem.numbers if trains_stem(self.d) else 0.0

    def _patches(self) -> float:
        """Positions of the vision tower for a sequence."""
        return self.s.pixels / towers.patch_numbers(self.m) if self.m.tower is not None else 0.0

    def _of_images(self) -> float:
        """What autograd stores in a vision tower and its projector."""
        if self.m.tower is None:
            return 0.0
        rows = self.s.micro
        return towers.stored(self.m, self.d, self.s.compute, rows * self._patches(), rows * self.s.image_tokens)

    def volume(self) -> float:
        """What a pass allocates in small pieces."""
        blocks = sum(self._block(block) for block in live_blocks(self.m, self.d))
        passed = max(blocks, self.activations()) if self.s.on_cpu else self.activations()  # recomputed activations too
        return passed + self.head_forward()[0]

    def _wide(self) -> int:
        return 4 if self.s.compute == 4 or trains_input(self.d) else 2

    def _block(self, block: Block) -> float:
        """What autograd stores for a block; the sequences of a batch nearly always differ in length."""
        return self.s.tokens * block_bytes(self.m, self.d, block, self.s.compute, self.s.length, True)

    def one_block(self) -> float:
        """The largest amount stored for a recomputed block."""
        return max((self._block(block) for block in live_blocks(self.m, self.d)), default=0.0)

    def workspace(self) -> float:
        """Temporary memory of the backward pass of a block; attention with dropout has a gradient for all pairs."""
        if not live_blocks(self.m, self.d):
            return 0.0
        pairs = 2.0 * self.m.heads * self.s.length if self.m.attention_dropout else 0.0
        return self.s.tokens * (3.0 * self.s.compute * self.m.inner + 8.0 * self.m.width + pairs) + 6.0 * self.largest

    @property
    def trains_head(self) -> bool:
        tied = self.m.tied and not any(HEAD.search(name) for name in self.d.shapes)
        return any((EMBEDDING if tied else HEAD).search(name) for name in self.d.names)

    def head_forward(self) -> tuple[float, float]:
        """The chunked loss: small pieces (logits of a chunk, their gradients, gradients of the input) and large ones (the
        gradient of the head's weight and its copy in 16 bits)."""
        if self.s.classifies:
            return 0.0, 0.0
        rows, words, width, a = self.s.tokens * self.s.supervised, self.m.vocabulary, self.m.width, self.s.compute
        chunk = self.chunk(rows) * words
        buffers = chunk * (4 + a + (4 + a if a == 2 else 0) + (4 if a == 2 and self.trains_head else 0))
        buffers += chunk * 8 if self.d.teacher else 0
        tables = (4 + (2 if a == 2 else 0)) * self.table if self.trains_head else 0.0
        return rows * width * (self._wide() + 4) + buffers, tables

    def head_backward(self) -> tuple[float, float]:
        """The gradient of the head's weight, unscaled and scaled."""
        if self.s.classifies:
            return 0.0, 0.0
        states = self.s.tokens * self.s.supervised * self.m.width * 8.0
        return states, 8.0 * self.table if self.trains_head else 0.0

    def chunk(self, rows: float) -> float:
        return min(rows, rows_per_chunk(self.m.vocabulary, self.m.width, self.trains_head, self.s.on_cpu))

    # the phases

    def forward(self) -> dict[str, float]:
        small, tables = self.head_forward()
        return {
            **self.base(),
            "gradients": self.gradients() if self.s.passes > 1 else 0.0,
            "16-bit copies": self.copies,
            "activations": self.activations(),
            "head and loss": small + tables,
            "allocator": self.holes(),
        }

    def backward(self) -> dict[str, float]:
        """The larger of its beginning, with all activations, and its end, with all gradients."""
        small, tables = self.head_backward()
        begins = {
            **self.base(),
            "gradients": self.gradients() if self.s.passes > 1 else 0.0,
            "16-bit copies": 0.0 if self.s.recompute else self.copies,
            "activations": self.activations() + (self.one_block() if self.s.recompute else 0.0),
            "head and loss": small + tables,
            "workspace": self.workspace(),
            "allocator": self.holes(),
        }
        tied = self.trains_head and not any(HEAD.search(name) for name in self.d.shapes)
        ends = {
            **self.base(),
            "gradients": self.gradients(),
            "activations": self.one_block() if live_blocks(self.m, self.d) else 0.0,
            "head and loss": 8.0 * self.table if tied and not self.s.classifies else 0.0,
            "workspace": self.workspace(),
            "allocator": self.holes(),
        }
        return max(begins, ends, key=lambda terms: sum(terms.values()))

    def holes(self) -> float:
        """Unused gaps between small pieces, which arise because sequences differ in length."""
        return self.k["holes"] * self.volume()

    def retained(self) -> float:
        """Small pieces of earlier passes that the allocator of a CPU retains; large pieces are returned at once."""
        large = self.k["large"]
        tables = sum(4.0 * prod(self.d.shapes[name]) for name in self.d.names if 4.0 * prod(self.d.shapes[name]) > large)
        before = max(0.0, self.gradients() - tables) if self.s.passes > 1 else 0.0
        small = self.copies + self.activations() + self.head_forward()[0] + self.holes()
        return self.k["retained"] * (before + small)

    def step(self) -> dict[str, float]:
        return {**self.base(), "gradients": self.gradients()}

    def _passing(self) -> float:
        """Numbers for each position that are in memory at a time in the layers before the blocks, without gradients."""
        return self.m.stem.numbers / 2

    def evaluation(self) -> dict[str, float]:
        rows = (self.s.eval_rows or 2 * self.s.micro) * self.s.length
        a, words = self.s.compute, self.m.vocabulary
        inside = rows * (a * 3.0 * self.m.inner + 4.0 * self.m.width * 4 + 4.0 * self._passing())
        if self.m.tower is not None:
            inside = max(inside, towers.passing(self.m, a, rows / self.s.length * self._patches()))
        head = 0.0
        if not self.s.classifies:
            chunk = min(rows, rows_per_chunk(words, self.m.width, False, self.s.on_cpu)) * words
            head = chunk * (a + 8.0) + (2.0 * words * self.m.width if self.trains_head and a == 2 else 0.0)
        # a solved head is saved with a copy of the body below the chosen layer, assumed to be half of it
        shorter = 0.5 * self.s.compute * (self.all + self.table) if self.d.body_once and self.s.classifies else 0.0
        return {**self.base(), "16-bit copies": self.copies, "evaluation": inside + head, "result": shorter}

    def best(self) -> dict[str, float]:
        """The best weights are loaded from their checkpoint next to the current ones."""
        if self.d.body_once and self.s.classifies:
            return self.base()
        saved = 4.0 * self.trainable + (0.0 if self.d.rank else self.s.compute * float(self.frozen))
        if self.d.saves_model and self.s.compute == 2 and towers.is_converted(self.m):
            saved += 4.0 * self.frozen  # in a model of float32, see `hfstrat.models.converted`
        return {**self.base(), "best weights": self.k["restored"] * saved, "allocator": self.retained()}

    def loading(self) -> dict[str, float]:
        stored = 0.0 if self.m.by_hand else float(self.m.stored)
        converted = self.k["loading"] * stored * self.trainable / max(1, self.all)  # to float32
        return {"weights": self.weights(), "loading": converted, "framework": self.k["framework"]}

    def features(self) -> dict[str, float]:
        """Of a solved head: features of the probed examples from all layers, those of all examples from one layer, and TF-IDF.

        The checkpoint is still mapped, and counts where its numbers were converted.
        """
        rows = min(FEATURE_TOKENS[self.s.on_cpu], max(1, self.s.rows) * self.s.length)
        inside = rows * (self.s.compute * 3.0 * self.m.inner + 4.0 * self.m.width * 6 + 4.0 * self._passing())
        each = 4.0 * self.m.width * POOLINGS * min(self.m.layers, PROBED_LAYERS)  # bytes of a probed example
        probed = min(self.s.rows, PROBED, max(64.0, PROBED_BYTES / each)) * each
        cached = 4.0 * self.m.width * self.s.rows
        narrower = self.s.compute < self.m.stored / max(1, self.all) - 1 and not self.m.by_hand
        return {
            **self.base(),
            "activations": inside,
            "caches": self.caches() + COPIES * probed + FEATURE_COPIES * cached,
            "TF-IDF": self.k["tf_idf"] * min(self.s.rows, TF_IDF_ROWS) * self.s.length * self.s.reads_words,
            "checkpoint": float(self.m.stored) if narrower else 0.0,
        }

    def teacher(self) -> dict[str, float]:
        rows = (self.s.eval_rows or 2 * self.s.micro) * self.s.length
        inside = rows * (self.s.compute * 3.0 * self.m.inner + 16.0 * self.m.width)
        return {
            "weights": self.weights(),
            "teacher": self.s.compute * float(self.d.teacher),
            "activations": inside,
            "caches": self.caches(),
            "framework": self.k["framework"],
        }


class Prediction(NamedTuple):
    """Bytes by phase and term; the largest phase is the peak."""

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


def predict(model: Model, description: Description, shape: Shape, sharing: Sharing | None = None) -> Prediction:
    """Predict the memory of a run on one device, phase by phase."""
    parts = Phases(model, description, shape, sharing or Sharing())
    phases = {"loading": parts.loading(), "evaluation": parts.evaluation(), "best weights": parts.best()}
    if description.body_once and shape.classifies:
        phases["features"] = parts.features()
    else:
        phases |= {"forward pass": parts.forward(), "backward pass": parts.backward(), "optimizer step": parts.step()}
    if description.teacher:
        phases["teacher"] = parts.teacher()
    return Prediction({name: {key: value for key, value in terms.items() if value} for name, terms in phases.items()})
