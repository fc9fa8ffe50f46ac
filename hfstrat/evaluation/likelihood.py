"""Log-likelihoods of continuations, many per forward pass, and the forgetting check that uses the same forward passes.

The continuations of a context follow it in one row. A mask hides them from each other, and each has the positions that it
would have alone. Several contexts with their continuations share a row in the same way, which leaves little padding and gives
most passes the same shape. Only the tokens of continuations go through the LM head. A test on random tokens first shows that
the model keeps continuations separate; otherwise each gets its own row.

The forgetting check is the loss on a control text that is not in the training data, before and after training. The bundled
passages were written for it: statements, stories, instructions, dialogue, arithmetic, code and a few other languages. Only the
difference matters, not the loss itself. Catastrophic forgetting in fine-tuned LLMs: Luo et al. 2023, arXiv 2308.08747.
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
from hfstrat.evaluation.intervals import Measurement
from hfstrat.models.attention import takes_sdpa_masks
from hfstrat.models.fused_loss import is_bound
from hfstrat.models.load import takes_logits_mask

Ids = list[int]

MAX_CONTINUATIONS, MAX_TOKENS = 32, 512  # of one unit
WIDTH = 64  # tokens of a row of several units, about: wider rows have less padding and cost more attention
TOLERANCE = {4: 1e-3, 2: 3e-2}  # relative to the largest loss of a token, by the bytes of a weight


class Unit(NamedTuple):
    """A context with its continuations: their indices in the list of pairs, and their tokens."""

    context: Ids
    places: list[int]
    continuations: list[Ids]

    @property
    def length(self) -> int:
        """Input tokens: the last token of a continuation is only a target."""
        return len(self.context) + sum(len(each) - 1 for each in self.continuations)


class Likelihood:
    """Scores continuations with one model.

    Args:
        shared: whether continuations share their context, and contexts a row; None: if a test shows that this model allows it.
    """

    def __init__(self, subject: Subject, runner: Runner, shared: bool | None = None) -> None:
        self.subject, self.runner = subject, runner
        self.attention = str(getattr(subject.inner.config, "_attn_implementation", ""))
        self.shared = self._supports_sharing() if shared is None else shared

    def score(
        self, pairs: Sequence[tuple[Ids, Ids]], title: str, progress: Progress | None = None, work: float | None = None
    ) -> np.ndarray:
        """Scores of each pair of context and continuation.

        Returns:
            `[pairs, 3]`, float64: negative log-likelihood (nats), number of tokens, and how many are the top-1 prediction.
        """
        units = self.units(pairs)
        width = max((len(unit.places) for unit in units), default=1)

        def step(places: list[int]) -> tuple[torch.Tensor]:
            return (self._forward([units[place] for place in places], width),)

        lengths = np.array([unit.length for unit in units])
        (found,) = self.runner.per_row(title, lengths, step, progress, work, packed=WIDTH if self.shared else 0)
        scores = np.zeros((len(pairs), 3))
        for unit, rows in zip(units, found, strict=True):
            scores[unit.places] = rows[: len(unit.places)]
        return scores

    def units(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Unit]:
        """The pairs grouped by context, up to `MAX_CONTINUATIONS` and `MAX_TOKENS`."""
        if not self.shared:
            return [Unit(context, [place], [rest]) for place, (context, rest) in enumerate(pairs)]
        found, open_units = list[Unit](), dict[tuple[int, ...], Unit]()
        for place, (context, rest) in enumerate(pairs):
            key = tuple(context)
            unit = open_units.get(key)
            full = unit is None or len(unit.places) == MAX_CONTINUATIONS
            if unit is None or full or unit.length - len(context) + len(rest) > MAX_TOKENS:
                unit = open_units[key] = Unit(context, [], [])
                found.append(unit)
            unit.places.append(place)
            unit.continuations.append(rest)
        return found

    def _rows(self, units: list[Unit]) -> tuple[list[list[int]], int]:
        """Indices of the units in each row of a pass, and the width of the rows: of a few, the one with the least padding."""
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

    def _forward(self, units: list[Unit], width: int) -> torch.Tensor:
        """The scores of one forward pass, `[units, width, 3]`, on the device."""
        rows, size = self._rows(units)
        ids, places, parts, contexts = np.zeros((4, len(rows), size), dtype=np.int64)
        parts -= 1  # -1 is padding; contexts and continuations of a row are numbered from 0
        scored, targets, owners = list[int](), Ids(), list[int]()  # flat positions, the token after each, its continuation
        for index, row in enumerate(rows):
            stop = part = 0
            for number in row:
                context, continuations = units[number].context, units[number].continuations
                root, before = part, stop + len(context) - 1  # the number of the context, and its last position
                for first, each in [(0, context), *((len(context), rest[:-1]) for rest in continuations)]:
                    here, stop = slice(stop, stop + len(each)), stop + len(each)
                    ids[index, here], places[index, here] = each, range(first, first + len(each))
                    parts[index, here], contexts[index, here] = part, root
                    if part > root:
                        scored += [index * size + place for place in (before, *range(here.start, stop))]
                    part += 1
                for place, rest in enumerate(continuations):
                    targets += rest
                    owners += [number * width + place] * len(rest)
        nll, right = self._losses(*map(self._to_device, (ids, places, parts, contexts, scored, targets)))
        columns = torch.stack([nll.double(), torch.ones_like(nll).double(), right.double()], dim=1)
        sums = torch.zeros(len(units) * width, 3, dtype=torch.float64, device=columns.device)
        return sums.index_add_(0, self._to_device(owners), columns).view(len(units), width, 3)

    def _to_device(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self.runner.device, non_blocking=True)

    def _losses(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        parts: torch.Tensor,
        contexts: torch.Tensor,
        scored: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each target `[n]` at the flat positions `scored`, and whether it is the top-1 prediction."""
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.shared:
            given |= {"attention_mask": self._mask(parts, contexts), "position_ids": places}
        else:
            given["attention_mask"] = (parts >= 0).long()
        if is_bound(self.subject.inner):
            out = self.subject.model(**given, loss_rows=scored, targets=targets)
            return out.nll, out.correct
        logits = self.subject.model(**given).logits.flatten(0, 1).index_select(0, scored).float()
        return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def _mask(self, parts: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """The attention mask `[B, 1, T, T]`: a position attends to its context and its own continuation; padding to padding."""
        keys = parts[:, None, :]
        visible = (keys == parts[:, :, None]) | (keys == contexts[:, :, None])
        visible &= torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
        if takes_sdpa_masks(self.attention):
            return visible[:, None]
        dtype = next(self.subject.model.parameters()).dtype
        return torch.zeros(visible.shape, dtype=dtype, device=parts.device).masked_fill_(~visible, torch.finfo(dtype).min)[
            :, None
        ]

    def _supports_sharing(self) -> bool:
        """Whether continuations that share a row have the losses that they have in rows of their own, on random tokens."""
        takes_masks = takes_sdpa_masks(self.attention) or self.attention == "eager"
        if not takes_masks or getattr(self.subject.inner.config, "sliding_window", None):
            return False
        vocabulary = self.subject.inner.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (23,), generator=generator).tolist()
        pairs = [(ids[:9], ids[9:12]), (ids[:9], ids[12:18]), (ids[:9], ids[18:19]), (ids[4:9], ids[19:])]
        found = []
        try:
            for self.shared in (True, False):
                with self.runner.computing():
                    sums = self._forward(self.units(pairs), 3).flatten(0, 1)
                found.append(sums[sums[:, 1] > 0])
        except Exception:  # an unknown architecture can fail in any way
            return False
        dtype = self.runner.dtype if self.runner.dtype != torch.float32 else next(self.subject.model.parameters()).dtype
        shared, separate = (each[:, 0] / each[:, 1] for each in found)
        return bool((shared - separate).abs().max() <= TOLERANCE[min(4, dtype.itemsize)] * separate.abs().max())


FILE = Path(__file__).with_name("control.txt")
MAX_PASSAGE = 512  # tokens


def passages(source: str) -> list[str]:
    """The control text: the bundled passages for `auto` (separated by blank lines), else the texts of a file."""
    if source == "auto":
        blocks = [block.strip("\n") for block in FILE.read_text("utf-8").split("\n\n") if block.strip()]
        return [" ".join(text.split("\n")) if "    " not in text else text for text in blocks]
    from hfstrat.data import readers
    from hfstrat.data.values import valid

    rows = readers.read(Path(source).expanduser())
    return [valid(str(row.get("text") or next(iter(row.values())))) for row in rows]


def measure(subject: Subject, source: str, runner: Runner) -> Measurement:
    """Loss, perplexity, token accuracy and, if the tokenizer allows it, bits per byte of all tokens but the first."""
    from hfstrat.data.token_bytes import token_bytes

    tokenizer, texts = subject.tokenizer, passages(source)
    limit = min(MAX_PASSAGE, subject.context or MAX_PASSAGE)
    ids = [row[:limit] for row in tokenizer(texts, verbose=False)["input_ids"]]
    ids = [row for row in ids if len(row) > 1]
    bound = is_bound(subject.inner)
    collate = Collator(tokenizer.pad_token_id or 0, runner.multiple, takes_logits_mask(subject.inner), selects_rows=bound)

    def step(places: list[int]) -> Any:
        batch = collate([{"input_ids": ids[place], "labels": ids[place]} for place in places])
        return subject.task.metrics.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    sums = runner.per_row("control text", np.array([len(row) for row in ids]), step)
    found = token_bytes(tokenizer)
    beside: dict[str, np.ndarray] = {}
    if found is not None:
        sizes = [found.count_bytes(np.array(row), np.array([0])).sum() for row in ids]
        beside["bytes"] = np.array(sizes, dtype=float)
    order = hashlib.sha256(repr(ids).encode()).hexdigest()
    tokens = float(sums[0][:, 1].sum())
    name = "the bundled passages" if source == "auto" else Path(source).name
    return Measurement(len(ids), subject.task.metrics.score(sums, beside), (), {"tokens": tokens}, {"text": name}, order=order)
