"""Bars to beat, and alarms: what a model that has learnt nothing, or only how often each token comes, would score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.render import IGNORED
from hfstrat.data.splits import distinct
from hfstrat.data.token_bytes import TokenBytes, token_bytes
from hfstrat.trainer.plan import ENDLESS, Plan

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from hfstrat.data.prepare import PreparedData


OPTIMAL = 20  # training tokens per parameter that spend a given compute best: Hoffmann et al. 2022, arXiv 2203.15556


WORTHWHILE = 4  # epochs up to which a repeated token is worth about a new one: Muennighoff et al. 2023, arXiv 2305.16264


@dataclass(frozen=True)
class Baselines:
    """Losses in nats per token of the evaluation rows, and what the training rows can carry."""

    uniform: float  # ln V: what random weights say
    unigram: float  # of a model that knows nothing but the training tokens' frequencies (add-one smoothed)
    unigram_bits_per_byte: float | None
    parameters: int
    unique_tokens: int  # supervised, each row once
    epoch_tokens: int  # supervised, of one epoch: rows with a weight stand there more than once
    epochs: float | None  # over the whole run; None where the clock ends it

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """In words, before training."""
        in_bytes = f" = {self.unigram_bits_per_byte:.3f} bits/byte" if self.unigram_bits_per_byte else ""
        lines = [
            f"{'bars':<9} random weights: ln V = {self.uniform:.3f} nats/token; frequencies of single tokens: "
            f"{self.unigram:.3f}{in_bytes} on the evaluation rows"
        ]
        return [*lines, *self.supply()]

    def supply(self) -> list[str]:
        """Tokens a parameter, and whether they are too few."""
        unique = self.unique_tokens / self.parameters
        text = f"{'supply':<9} {self.unique_tokens:,} training tokens for {self.parameters:,} parameters: {unique:.2g} each"
        if self.epochs is None:
            return [text]
        times = self.epochs * self.epoch_tokens / max(self.unique_tokens, 1)
        seen = unique * times
        lines = [f"{text}, seen {times:.1f} times: {seen:.2g} each"]
        if seen < OPTIMAL:
            lines.append(
                f"{'alarm':<9} {seen:.2g} tokens seen a parameter, where about {OPTIMAL} use the compute best (Hoffmann et al. "
                "2022, arXiv 2203.15556): train longer on more text, or take a smaller model"
            )
        if times > WORTHWHILE:
            lines.append(
                f"{'alarm':<9} every token is seen {times:.1f} times; beyond {WORTHWHILE} epochs repeats are worth "
                "less and less (Muennighoff et al. 2023, arXiv 2305.16264): bring more text, and watch the evaluation loss"
            )
        return lines


def measure(data: PreparedData, plan: Plan, model: nn.Module) -> Baselines:
    """The bars of prepared data for a model that is about to be trained on them."""
    from hfstrat.models.load import count_parameters

    vocabulary = max(int(model.get_input_embeddings().weight.shape[0]), len(data.renderer.tokenizer))  # type: ignore[operator]
    train, held = (token_counts(rows, vocabulary) for rows in (data.train, data.eval))
    nats, tokens = unigram(train, held), int(held.sum())
    found = token_bytes(data.renderer.tokenizer)
    endless = plan.steps >= ENDLESS
    return Baselines(
        uniform=math.log(vocabulary),
        unigram=nats,
        unigram_bits_per_byte=None if found is None else bits_per_byte(nats, tokens, row_bytes(data.eval, found).sum()),
        parameters=count_parameters(model)[1],
        unique_tokens=int(token_counts(data.train.select(distinct(data.train).first), vocabulary).sum()),
        epoch_tokens=int(train.sum()),
        epochs=None if endless else plan.epochs,
    )


def token_counts(rows: Dataset, vocabulary: int) -> np.ndarray:
    """How often each token carries loss, `[vocabulary]`."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for labels in _labels(rows):
        counts += np.bincount(labels[labels != IGNORED], minlength=vocabulary)
    return counts


def _labels(rows: Dataset) -> Iterator[np.ndarray]:
    """The labels that are predicted: nobody predicts the first token of a row."""
    for table in rows.with_format("arrow").iter(batch_size=1000):
        yield _labels_of(table)


def _labels_of(table: Any) -> np.ndarray:
    column = table.column("labels").combine_chunks()
    labels = column.flatten().to_numpy().copy()
    firsts = column.offsets.to_numpy()[:-1] - column.offsets[0].as_py()
    labels[firsts[firsts < len(labels)]] = IGNORED
    return labels


def row_bytes(rows: Dataset, found: TokenBytes) -> np.ndarray:
    """Bytes that the tokens which carry loss stand for, of each row, `[rows]`."""
    totals, start = np.zeros(len(rows)), 0
    for table in rows.with_format("arrow").iter(batch_size=1000):
        column = table.column("input_ids").combine_chunks()
        offsets = column.offsets.to_numpy()
        offsets = offsets - offsets[0]
        sizes = found.count_bytes(column.flatten().to_numpy(), offsets[:-1])
        ends = np.concatenate([[0], np.cumsum(np.where(_labels_of(table) != IGNORED, sizes, 0))])
        totals[start : start + len(table)] = np.diff(ends[offsets])
        start += len(table)
    return totals


def unigram(train: np.ndarray, held: np.ndarray) -> float:
    """Cross-entropy (nats a token) of the tokens `held` under the add-one smoothed frequencies of `train`, `[V]` each."""
    smoothed = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(held * smoothed).sum() / max(held.sum(), 1))


def bits_per_byte(nats: float, tokens: int, size: float) -> float | None:
    """From nats a token to bits a byte, of so many tokens that stand for so many bytes; end tokens cost and have no bytes."""
    return nats * tokens / math.log(2) / size if size else None


def add_bits_per_byte(facts: dict[str, Any], data: PreparedData) -> None:
    """Put `bits_per_byte` beside the losses of a report, where the tokenizer allows it to be exact."""
    found = None if data.label_names else token_bytes(data.renderer.tokenizer)
    if found is None:
        return
    tokens, size = int(token_counts(data.eval, len(found.sizes)).sum()), float(row_bytes(data.eval, found).sum())
    for metrics in (facts["metrics_before"], facts["metrics_after"]):
        if metrics and (bits := bits_per_byte(metrics["loss"], tokens, size)) is not None:
            metrics["bits_per_byte"] = bits
