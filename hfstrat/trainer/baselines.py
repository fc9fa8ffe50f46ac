"""Baselines of causal language modeling: the loss of uniform and of unigram predictions; and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


OPTIMAL = 20  # compute-optimal training tokens per parameter: Hoffmann et al. 2022, arXiv 2203.15556
MAX_EPOCHS = 4  # up to which repeated tokens are almost as good as new ones: Muennighoff et al. 2023, arXiv 2305.16264


@dataclass(frozen=True)
class Baselines:
    """Losses in nats per token on the evaluation examples, and the number of training tokens per parameter."""

    uniform: float  # ln V: the loss of random weights
    unigram: float  # of a model that predicts the training tokens' frequencies (add-one smoothed)
    unigram_bits_per_byte: float | None
    parameters: int
    unique_tokens: int  # supervised, duplicates counted once
    epoch_tokens: int  # supervised, of one epoch: weighted sources may repeat examples
    epochs: float | None  # of the complete run; None if a time limit ends it
    estimated: bool = False  # from the first rows, since rows are read while training: the number of tokens, and the unigram

    def lines(self) -> list[str]:
        """The lines that are printed before training."""
        in_bytes = f" ({self.unigram_bits_per_byte:.3f} bits/byte)" if self.unigram_bits_per_byte else ""
        line = f"baselines uniform (ln V) {self.uniform:.3f}, unigram {self.unigram:.3f} nats/token{in_bytes}"
        return [f"{line} on the evaluation examples", *self.supply()]

    def supply(self) -> list[str]:
        """Training tokens per parameter, and warnings if there are too few tokens or too many epochs."""
        counts = f"({self.unique_tokens:,} tokens, {self.parameters:,} parameters)"
        if self.estimated:
            share = f"about {self.unique_tokens / self.parameters:.2g} training tokens per parameter"
            return [f"{'supply':<9} {share} {counts}, estimated from the first rows; more is read while training"]
        text = f"{'supply':<9} {self.unique_tokens / self.parameters:.2g} unique training tokens per parameter {counts}"
        if self.epochs is None:
            return [text]
        times = self.epochs * self.epoch_tokens / max(self.unique_tokens, 1)
        seen = self.epochs * self.epoch_tokens / self.parameters
        lines = [f"{text}, {times:.1f} epochs"]
        if seen < OPTIMAL:
            lines.append(
                f"{'warning':<9} {seen:.2g} training tokens per parameter in all epochs; about {OPTIMAL} are compute-optimal "
                "(Hoffmann et al. 2022, arXiv 2203.15556): train longer on more text, or train a smaller model"
            )
        if times > MAX_EPOCHS:
            lines.append(
                f"{'warning':<9} {times:.1f} epochs; beyond {MAX_EPOCHS}, repeated tokens help less and less (Muennighoff et "
                "al. 2023, arXiv 2305.16264): add more text, and watch the evaluation loss"
            )
        return lines


def measure(data: PreparedData, plan: Plan, model: nn.Module) -> Baselines:
    """The baselines of prepared data for a model that is about to be trained on them."""
    from hfstrat.models.load import count_parameters

    vocabulary = max(int(model.get_input_embeddings().weight.shape[0]), len(data.renderer.tokenizer))  # type: ignore[operator]
    train, evaluated = (token_counts(rows, vocabulary) for rows in (data.train, data.eval))
    nats, tokens = unigram(train, evaluated), int(evaluated.sum())
    found = token_bytes(data.renderer.tokenizer)
    unique, epoch_tokens = int(token_counts(data.train.select(distinct(data.train).first), vocabulary).sum()), int(train.sum())
    if data.stream is not None:
        unique = epoch_tokens = round(epoch_tokens / len(data.train) * plan.steps * plan.global_batch_size)
    return Baselines(
        uniform=math.log(vocabulary),
        unigram=nats,
        unigram_bits_per_byte=None if found is None else bits_per_byte(nats, tokens, row_bytes(data.eval, found).sum()),
        parameters=count_parameters(model)[1],
        unique_tokens=unique,
        epoch_tokens=epoch_tokens,
        epochs=None if plan.steps >= ENDLESS or not plan.rows else plan.epochs,
        estimated=data.stream is not None,
    )


def token_counts(rows: Dataset, vocabulary: int) -> np.ndarray:
    """How often each token is a target, `[vocabulary]`."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        labels = _target_labels(table)
        counts += np.bincount(labels[labels != IGNORED], minlength=vocabulary)
    return counts


def _target_labels(table: Any) -> np.ndarray:
    """The labels of all examples, ignored for their first tokens, which are never predicted."""
    column = table.column("labels").combine_chunks()
    labels = column.flatten().to_numpy().copy()
    firsts = column.offsets.to_numpy()[:-1] - column.offsets[0].as_py()
    labels[firsts[firsts < len(labels)]] = IGNORED
    return labels


def row_bytes(rows: Dataset, found: TokenBytes) -> np.ndarray:
    """Bytes behind the supervised tokens of each example, `[examples]`."""
    totals, start = np.zeros(len(rows)), 0
    for table in rows.with_format("arrow").iter(batch_size=1000):
        column = table.column("input_ids").combine_chunks()
        offsets = column.offsets.to_numpy()
        offsets = offsets - offsets[0]
        sizes = found.count_bytes(column.flatten().to_numpy(), offsets[:-1])
        ends = np.concatenate([[0], np.cumsum(np.where(_target_labels(table) != IGNORED, sizes, 0))])
        totals[start : start + len(table)] = np.diff(ends[offsets])
        start += len(table)
    return totals


def unigram(train: np.ndarray, evaluated: np.ndarray) -> float:
    """Cross-entropy (nats per token) of `evaluated` under the add-one smoothed frequencies of `train`, counts `[V]` both."""
    smoothed = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(evaluated * smoothed).sum() / max(evaluated.sum(), 1))


def bits_per_byte(nats: float, tokens: int, size: float) -> float | None:
    """Bits per byte from nats per token, for `tokens` of `size` bytes (end tokens have none); None without bytes."""
    return nats * tokens / math.log(2) / size if size else None


def add_bits_per_byte(facts: dict[str, Any], data: PreparedData) -> None:
    """Add `bits_per_byte` to the metrics of a report, if the tokenizer allows it to be exact."""
    found = None if data.label_names else token_bytes(data.renderer.tokenizer)
    if found is None:
        return
    tokens, size = int(token_counts(data.eval, len(found.sizes)).sum()), float(row_bytes(data.eval, found).sum())
    for metrics in (facts["metrics_before"], facts["metrics_after"]):
        if metrics and (bits := bits_per_byte(metrics["loss"], tokens, size)) is not None:
            metrics["bits_per_byte"] = bits
