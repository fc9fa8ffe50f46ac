"""How likely a model holds continuations of contexts, many at once: only their own tokens go through the LM head.

Continuations of one context stand behind it side by side, each blind to the others (a mask) and at the positions it would have
alone; several contexts with theirs share a row likewise, so that nothing much pads and most passes have one shape. That the
model at hand keeps them apart is shown on random tokens first; where it does not, each continuation gets a row.


The forgetting check: the loss on a text that training does not see, before and after.

The passages that come with hfstrat are written for it: plain statements, stories, instructions, dialogue, arithmetic, code and
a few other languages. What counts is the difference; its own size says little. Catastrophic forgetting in fine-tuned LLMs: Luo
et al. 2023, arXiv 2308.08747.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from hfstrat.data.collate import Collator, rounded
from hfstrat.data.packing import balance
from hfstrat.evaluation.forward import Progress, Runner, Subject
from hfstrat.evaluation.intervals import Found
from hfstrat.models.load import takes_logits_mask

Ids = list[int]


MOST_TOGETHER, MOST_TOKENS = 32, 512  # continuations of one unit, and their tokens


WIDTH = 64  # tokens of a row of several units, about: wider rows pad less and cost more attention


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
        shared: whether continuations share their context, and contexts a row; None: where this model can be shown to allow it.
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
        (found,) = self.runner.per_row(words, lengths, step, progress, work, packed=WIDTH if self.shared else 0)
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

    def _rows(self, units: list[Unit]) -> tuple[list[list[int]], int]:
        """Numbers of the units in each row of a pass, and the rows' width: that which pads least of a few."""
        if not self.shared:
            return [[number] for number in range(len(units))], self._width(unit.length for unit in units)
        lengths = [unit.length for unit in units]
        fewest = -(-sum(lengths) // max(WIDTH, *lengths))
        found = []
        for count in range(fewest, fewest + 3):
            rows = [row for row in balance(lengths, count) if row]
            found.append((rows, self._width(sum(lengths[number] for number in row) for row in rows)))
        return min(found, key=lambda each: len(each[0]) * each[1])

    def _width(self, lengths: Iterable[int]) -> int:
        return rounded(max(lengths), self.runner.multiple)

    def _pass(self, units: list[Unit], width: int) -> torch.Tensor:
        """One forward pass; `[units, width, 3]`, on the device."""
        rows, size = self._rows(units)
        ids, places, parts, contexts = np.zeros((4, len(rows), size), dtype=np.int64)
        parts -= 1  # padding; else contexts and continuations of a row by number
        asked, targets, owners = list[int](), Ids(), list[int]()  # flat positions, what stands there next, whose it is
        for index, row in enumerate(rows):
            stop = part = 0
            for number in row:
                context, continuations = units[number].context, units[number].continuations
                root, before = part, stop + len(context) - 1  # the context's number, and its last token
                for first, each in [(0, context), *((len(context), rest[:-1]) for rest in continuations)]:
                    here, stop = slice(stop, stop + len(each)), stop + len(each)
                    ids[index, here], places[index, here] = each, range(first, first + len(each))
                    parts[index, here], contexts[index, here] = part, root
                    if part > root:
                        asked += [index * size + place for place in (before, *range(here.start, stop))]
                    part += 1
                for place, rest in enumerate(continuations):
                    targets += rest
                    owners += [number * width + place] * len(rest)
        nll, right = self._losses(*map(self._there, (ids, places, parts, contexts, asked, targets)))
        columns = torch.stack([nll.double(), torch.ones_like(nll).double(), right.double()], dim=1)
        sums = torch.zeros(len(units) * width, 3, dtype=torch.float64, device=columns.device)
        return sums.index_add_(0, self._there(owners), columns).view(len(units), width, 3)

    def _there(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self.runner.device, non_blocking=True)

    def _losses(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        parts: torch.Tensor,
        contexts: torch.Tensor,
        asked: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each target `[n]` at the flat positions `asked`, and whether it is the top-1 guess."""
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.shared:
            given |= {"attention_mask": self._mask(parts, contexts), "position_ids": places}
        else:
            given["attention_mask"] = (parts >= 0).long()
        if "forward" in vars(self.subject.inner):  # our loss is bound to it
            out = self.subject.model(**given, loss_rows=asked, targets=targets)
            return out.nll, out.correct
        logits = self.subject.model(**given).logits.flatten(0, 1).index_select(0, asked).float()
        return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def _mask(self, parts: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """`[B, 1, T, T]`: what each position sees: its context and its own part, up to itself; padding sees padding."""
        theirs = parts[:, None, :]
        seen = (theirs == parts[:, :, None]) | (theirs == contexts[:, :, None])
        seen &= torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
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
                    sums = self._pass(self.units(pairs), 3).flatten(0, 1)
                found.append(sums[sums[:, 1] > 0])
        except Exception:  # a structure that was not foreseen can fail in any way
            return False
        dtype = self.runner.dtype if self.runner.dtype != torch.float32 else next(self.subject.model.parameters()).dtype
        together, alone = (each[:, 0] / each[:, 1] for each in found)
        return bool((together - alone).abs().max() <= TOLERANCE[min(4, dtype.itemsize)] * alone.abs().max())


FILE = Path(__file__).with_name("control.txt")


LENGTH = 512  # tokens of a passage, at most


def passages(source: str) -> list[str]:
    """`auto`: those that come with hfstrat, between blank lines; else the texts of a file."""
    if source == "auto":
        return [" ".join(text.split("\n")) if "    " not in text else text for text in _blocks(FILE.read_text("utf-8"))]
    from hfstrat.data import readers

    rows = readers.read(Path(source).expanduser())
    return [str(row.get("text") or next(iter(row.values()))) for row in rows]


def _blocks(text: str) -> list[str]:
    return [block.strip("\n") for block in text.split("\n\n") if block.strip()]


def measure(subject: Subject, source: str, runner: Runner) -> Found:
    """Loss, perplexity, token accuracy and, where the tokenizer tells, bits per byte: all tokens but the first carry loss."""
    from hfstrat.data.token_bytes import token_bytes

    tokenizer, texts = subject.tokenizer, passages(source)
    limit = min(LENGTH, subject.context or LENGTH)
    ids = [row[:limit] for row in tokenizer(texts, verbose=False)["input_ids"]]
    ids = [row for row in ids if len(row) > 1]
    bound = "forward" in vars(subject.inner)
    collate = Collator(tokenizer.pad_token_id or 0, runner.multiple, takes_logits_mask(subject.inner), selects_rows=bound)

    def step(places: list[int]) -> Any:
        batch = collate([{"input_ids": ids[place], "labels": ids[place]} for place in places])
        return subject.task.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    sums = runner.per_row("control text", np.array([len(row) for row in ids]), step)
    found = token_bytes(tokenizer)
    beside = (
        {} if found is None else {"bytes": np.array([found.of(np.array(row), np.array([0])).sum() for row in ids], dtype=float)}
    )
    order = hashlib.sha256(repr(ids).encode()).hexdigest()
    tokens = float(sums[0][:, 1].sum())
    name = "the passages that come with hfstrat" if source == "auto" else Path(source).name
    return Found(len(ids), subject.task.score(sums, (), beside), (), {"tokens": tokens}, {"text": name}, order=order)
