"""The examples of a regression: tokenized once, targets standardized by the training examples, batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfstrat.data import cache, splits
from hfstrat.data.classes import find_duplicates, longest_first, prompt_of, tokenize_texts
from hfstrat.data.collate import ClassCollator
from hfstrat.data.labeled import Texts
from hfstrat.data.prepare import PreparedData, Table, load_table
from hfstrat.data.splits import choose_stratified, column
from hfstrat.errors import UserError
from hfstrat.models.output_scale import Units
from hfstrat.tasks.regression.targets import FORMAT, TargetFormat

if TYPE_CHECKING:
    from datasets import Dataset

    from hfstrat.recipe.data import Data


@dataclass
class Targets(PreparedData):
    """Rows with `input_ids`, `token_type_ids` (empty where all zero), `label` (a list of numbers), `length`, `row`.

    `label_names` are the names of the targets, `units` their mean and standard deviation on the training examples.
    """

    units: Units = field(default_factory=lambda: Units(torch.zeros(1), torch.ones(1)))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(repr((self.label_names, self.train["label"][:])).encode())
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        facts = {name: {"mean": m, "std": s} for name, m, s in self._facts()}
        return super().report() | {"labels": {"problem_type": "regression", "targets": facts}}

    def lines(self) -> list[str]:
        """The data statistics, with the range of each target."""
        lines = super().lines()
        values = np.asarray(self.train["label"][:], dtype=np.float64)
        for index, (name, mean, std) in enumerate(self._facts()):
            low, high = values[:, index].min(), values[:, index].max()
            lines.append(f"{'target':<9} {name}: mean {mean:.4g}, standard deviation {std:.4g}, from {low:.4g} to {high:.4g}")
        return lines

    def _facts(self) -> list[tuple[str, float, float]]:
        return list(zip(self.label_names, self.units.mean.tolist(), self.units.std.tolist(), strict=True))


class TargetCollator(ClassCollator):
    """As `ClassCollator`; `labels` are standardized targets, float32 `[B, targets]`."""

    def __init__(self, pad_token_id: int, multiple: int, has_types: bool, units: Units) -> None:
        super().__init__(pad_token_id, multiple, has_types)
        self.units = units

    def encode_labels(self, values: list[Any]) -> torch.Tensor:
        return self.units.standardize(torch.tensor(values, dtype=torch.float64)).float()


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Targets:
    """Load and tokenize the training and evaluation examples of a recipe, or take them from the cache.

    Raises:
        UserError: data that cannot be read, targets that are not finite numbers, or that do not vary.
    """
    texts = Texts(tokenizer, data.max_length)
    table, names = _table(data.train, data, "data.train", texts)
    train = table.rows.table.rename_column("targets", "label")
    origin = np.searchsorted(table.ends, np.arange(len(train)), "right")
    statistics, evaluated = {"train": table.statistics}, table
    if data.eval or data.eval_split:
        evaluated, others = _table(data.eval or data.train, data, "data.eval", texts)
        if len(others) != len(names):
            raise UserError(f"data.eval: it has {len(others)} targets, and data.train {len(names)}; expected the same ones")
        statistics["eval"], held = evaluated.statistics, evaluated.rows.table.rename_column("targets", "label")
        held = held.select(range(min(max_eval_rows or len(held), len(held))))
    else:
        hashes = column(train, "text_hash")
        if held_out is None:
            held_out = choose_stratified(hashes, [""] * len(hashes), data.eval_size, max_eval_rows, data.drawn_by(seed))
        out = np.isin(hashes, held_out)
        train, held, origin = train.select(np.flatnonzero(~out)), train.select(np.flatnonzero(out)), origin[~out]
    found, units = find_duplicates(train, held, tokenizer), units_of(train, names, table.statistics.source)
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        train = train.select(splits.apply_weights(origin, weights, seed))
    train = train.remove_columns("text_hash")
    lengths, shown = column(train, "length"), _samples(evaluated, held, samples, names)
    held = longest_first(held)
    order = hashlib.sha256(column(train, "row").tobytes() + lengths.tobytes()).hexdigest()
    eval_lengths = column(held, "length")
    return Targets(train, held, lengths, eval_lengths, order, texts, statistics, shown, found, tuple(names), units)


def prepare_eval(data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Targets:
    """All examples of `data.train`, with the units by which the model of this config was trained.

    Raises:
        UserError: as `prepare`; also another number of targets than the model has.
    """
    texts = Texts(tokenizer, data.max_length)
    table, found = _table(data.train, data, "data.train", texts)
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if len(found) != len(names):
        raise UserError(f"data.train: it has {len(found)} targets, and the model predicts {len(names)}: {', '.join(names)}")
    held = table.rows.table.rename_column("targets", "label")
    held = held.select(range(min(max_rows or len(held), len(held))))
    shown, held = _samples(table, held, samples, names), longest_first(held)
    lengths, statistics = column(held, "length"), {"eval": table.statistics}
    mean = getattr(config, "target_mean", None) or [0.0] * len(names)  # a model of another library has none
    std = getattr(config, "target_std", None) or [1.0] * len(names)
    units = Units(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    return Targets(held, held, lengths, lengths, "", texts, statistics, shown, {}, tuple(names), units)


def units_of(train: Dataset, names: list[str], source: str) -> Units:
    """Mean and standard deviation of each target over examples.

    Raises:
        UserError: a target with one value in all of them.
    """
    values = torch.tensor(train["label"][:], dtype=torch.float64)
    std = values.std(0, correction=0)
    for index, name in enumerate(names):
        if std[index] <= 1e-12 * values[:, index].abs().max().clamp(min=1e-300):
            raise UserError(
                f"data.train: {source}: '{name}' is {values[0, index]:g} in all training rows; expected numbers that vary"
            )
    return Units(values.mean(0), std)


def _table(sources: Any, data: Data, key: str, texts: Texts) -> tuple[Table, list[str]]:
    """The tokenized rows of all sources, and the names of their targets."""
    digest = cache.tokenizer_digest(texts.tokenizer)
    table = load_table(
        sources, data, key, partial(tokenize_texts, texts=texts, key=digest, task=FORMAT, detect=TargetFormat.detect)
    )
    names = [source.read()[1].target_names for source in table.sources]
    if odd := next((found for found in names if len(found) != len(names[0])), None):
        raise UserError(f"{key}: a source has {len(odd)} targets, and the first one {len(names[0])}; expected the same in all")
    return table, names[0]


def _samples(table: Table, held: Dataset, count: int, names: list[str]) -> list[dict[str, Any]]:
    """The first evaluation examples as prompt and reference."""
    examples = table.examples([int(row) for row in column(held, "row")[:count]])
    return [
        {"prompt": prompt_of(e), "reference": ", ".join(f"{n} {v:.6g}" for n, v in zip(names, e.labels, strict=True))}
        for e in examples
    ]
