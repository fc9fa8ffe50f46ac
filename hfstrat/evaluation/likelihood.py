"""How likely a model holds continuations of contexts, many at once: only their own tokens go through the LM head.

Continuations of one context stand behind it side by side in one row, each blind to the others (a mask) and at the positions it
would have alone. That the model at hand keeps them apart is shown on random tokens first; where it does not, each gets a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from hfstrat.data.batches import rounded
from hfstrat.evaluation.loop import Runner
from hfstrat.evaluation.progress import Progress
from hfstrat.evaluation.subject import Subject

Ids = list[int]
MOST_TOGETHER, MOST_TOKENS = 32, 512  # continuations of one row, and their tokens
TOLERANCE = {4: 1e-3, 2: 3e-2}  # by the bytes of a weight, of the largest loss of a token


class Unit(NamedTuple):
    """A context, and the continuations behind it: their places in the whole list, and their tokens."""

    context: Ids
    places: list[int]
    continuations: list[Ids]

    @property
    def length(self) -> int:
        """Tokens that are read: the last one of a continuation is only predicted."""
        return len(self.context) + sum(len(each) - 1 for each in self.continuations)


class Likelihood:
    """Scores continuations with one model.

    Args:
        shared: whether continuations of a context share its forward pass; None: where this model can be shown to allow it.
    """

    def __init__(self, subject: Subject, runner: Runner, shared: bool | None = None) -> None:
        self.subject, self.runner = subject, runner
        self.attention = str(getattr(subject.inner.config, "_attn_implementation", ""))
        self.shared = self._keeps_apart() if shared is None else shared

    def score(
        self, pairs: Sequence[tuple[Ids, Ids]], words: str, progress: Progress | None = None, work: float | None = None
    ) -> np.ndarray:
        """Of each context and continuation: negative log-likelihood (nats), tokens, and how many of them are the top-1 guess.

        Returns:
            `[pairs, 3]`, float64.
        """
        units = self.units(pairs)
        width = max((len(unit.places) for unit in units), default=1)

        def step(places: list[int]) -> tuple[torch.Tensor]:
            return (self._pass([units[place] for place in places], width),)

        lengths = np.array([unit.length for unit in units])
        (found,) = self.runner.per_row(words, lengths, step, progress, work)
        whole = np.zeros((len(pairs), 3))
        for unit, rows in zip(units, found, strict=True):
            whole[unit.places] = rows[: len(unit.places)]
        return whole

    def units(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Unit]:
        """Pairs of one context together, as long as that pays and fits."""
        if not self.shared:
            return [Unit(context, [place], [rest]) for place, (context, rest) in enumerate(pairs)]
        found, open_units = list[Unit](), dict[tuple[int, ...], Unit]()
        for place, (context, rest) in enumerate(pairs):
            key = tuple(context)
            unit = open_units.get(key)
            full = unit is None or len(unit.places) == MOST_TOGETHER
            if unit is None or full or unit.length - len(context) + len(rest) > MOST_TOKENS:
                unit = open_units[key] = Unit(context, [], [])
                found.append(unit)
            unit.places.append(place)
            unit.continuations.append(rest)
        return found

    def _pass(self, units: list[Unit], width: int) -> torch.Tensor:
        """One forward pass; `[units, width, 3]`, on the device."""
        size = rounded(max(unit.length for unit in units), self.runner.multiple)
        ids, places, parts = np.zeros((3, len(units), size), dtype=np.int64)
        parts -= 1  # padding; 0 is the context, then continuations by number
        rows, targets, owners = list[int](), Ids(), list[int]()
        for index, unit in enumerate(units):
            context, start = len(unit.context), len(unit.context)
            ids[index, :context], places[index, :context], parts[index, :context] = unit.context, range(context), 0
            for number, rest in enumerate(unit.continuations):
                stop = start + len(rest) - 1
                ids[index, start:stop] = rest[:-1]
                places[index, start:stop] = range(context, context + len(rest) - 1)
                parts[index, start:stop] = number + 1
                rows += [index * size + context - 1, *range(index * size + start, index * size + stop)]
                targets += rest
                owners += [index * width + number] * len(rest)
                start = stop
        nll, right = self._losses(*map(self._there, (ids, places, parts, rows, targets)))
        columns = torch.stack([nll.double(), torch.ones_like(nll).double(), right.double()], dim=1)
        sums = torch.zeros(len(units) * width, 3, dtype=torch.float64, device=columns.device)
        return sums.index_add_(0, self._there(owners), columns).view(len(units), width, 3)

    def _there(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self.runner.device, non_blocking=True)

    def _losses(
        self, ids: torch.Tensor, places: torch.Tensor, parts: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each target `[n]` at flat position `rows`, and whether it is the top-1 guess."""
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.shared:
            given |= {"attention_mask": self._mask(parts), "position_ids": places}
        else:
            given["attention_mask"] = (parts >= 0).long()
        if "forward" in vars(self.subject.inner):  # our loss is bound to it
            out = self.subject.model(**given, loss_rows=rows, targets=targets)
            return out.nll, out.correct
        logits = self.subject.model(**given).logits.flatten(0, 1).index_select(0, rows).float()
        return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def _mask(self, parts: torch.Tensor) -> torch.Tensor:
        """`[B, 1, T, T]`: what each position sees: the context and its own continuation, up to itself."""
        size = parts.shape[1]
        mine, theirs = parts[:, :, None], parts[:, None, :]
        seen = ((theirs == 0) | (theirs == mine)) & (theirs >= 0)
        seen &= torch.ones(size, size, dtype=torch.bool, device=parts.device).tril()
        seen |= torch.eye(size, dtype=torch.bool, device=parts.device)  # padding sees itself: a softmax of nothing is NaN
        if self.attention == "sdpa":
            return seen[:, None]
        dtype = next(self.subject.model.parameters()).dtype
        return torch.zeros(seen.shape, dtype=dtype, device=parts.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    def _keeps_apart(self) -> bool:
        """Whether a row of several continuations says of each what a row of its own says, on random tokens."""
        if self.attention not in ("sdpa", "eager") or getattr(self.subject.inner.config, "sliding_window", None):
            return False
        words = self.subject.inner.get_input_embeddings().weight.shape[0]
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, words, (23,), generator=draw).tolist()
        pairs = [(ids[:9], ids[9:12]), (ids[:9], ids[12:18]), (ids[:9], ids[18:19]), (ids[4:9], ids[19:])]
        found = []
        try:
            for self.shared in (True, False):
                with self.runner.computing():
                    found.append(torch.cat([self._pass([unit], 3)[0, : len(unit.places)] for unit in self.units(pairs)]))
        except Exception:  # a structure that was not foreseen can fail in any way
            return False
        dtype = self.runner.dtype if self.runner.dtype != torch.float32 else next(self.subject.model.parameters()).dtype
        together, alone = (each[:, 0] / each[:, 1] for each in found)
        return bool((together - alone).abs().max() <= TOLERANCE[min(4, dtype.itemsize)] * alone.abs().max())
