"""Peak memory of a run above its imports: for each phase of it a sum of named terms; the largest phase is the prediction."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from hfstrat.advisor.activations import live_blocks
from hfstrat.advisor.hardware import Sharing
from hfstrat.advisor.memory_terms import CHUNK_BYTES, CHUNK_ROWS, FEATURE_TOKENS, Shape, Terms
from hfstrat.advisor.shapes import Model
from hfstrat.depth import HEAD
from hfstrat.strategies import Learning

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


def predict(model: Model, learning: Learning, shape: Shape, sharing: Sharing | None = None) -> Prediction:
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
