"""The examples of a regression: tokenized once, targets standardized by the training examples, batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfstrat.data.classes import TextEncoder
from hfstrat.data.collate import ClassCollator
from hfstrat.data.prepare import PreparedData, Table, divide, evaluation_fields
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import Selection
from hfstrat.errors import UserError
from hfstrat.models.output_scale import Units
from hfstrat.recipe.format import plural
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


class TargetEncoder(TextEncoder):
    """Texts with numbers, one for each of `names`, which are those of the training rows unless given.

    Raises:
        UserError: sources with different numbers of targets.
    """

    task = FORMAT

    def __init__(self, tokenizer: Any, data: Data, names: list[str] | None = None) -> None:
        super().__init__(tokenizer, data)
        self.names, self.is_model = names or [], names is not None

    def reader(self, source: DataSource) -> Callable[..., Any]:
        return TargetFormat.detect

    def with_labels(self, table: Table, key: str) -> Selection:
        first, *others = [source.read()[1].target_names for source in table.sources]
        if odd := next((found for found in others if len(found) != len(first)), None):
            raise UserError(f"{key}: a source has {len(odd)} targets, and the first one {len(first)}; expected the same in all")
        self.names = self.names or first
        if len(first) != len(self.names):
            expected = f"the model predicts {len(self.names)}: {', '.join(self.names)}"
            if not self.is_model:
                expected = f"data.train {len(self.names)}; expected the same ones"
            raise UserError(f"{key}: it has {len(first)} targets, and {expected}")
        return self.selection(table, table.rows.table.rename_column("targets", "label"))

    def strata(self, rows: Selection) -> list[str]:
        return [""] * len(rows)  # numbers are no classes

    def reference(self, example: Any) -> str:
        return ", ".join(f"{name} {value:.6g}" for name, value in zip(self.names, example.labels, strict=True))


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
    encoder = TargetEncoder(tokenizer, data)
    parts = divide(encoder, data, seed, max_eval_rows, held_out)
    units = units_of(parts.train.dataset(), encoder.names, parts.table.statistics.source)
    return Targets(**parts.fields(data, seed, samples), label_names=tuple(encoder.names), units=units)


def prepare_eval(data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Targets:
    """All examples of `data.train`, with the units by which the model of this config was trained.

    Raises:
        UserError: as `prepare`; also another number of targets than the model has.
    """
    names = [config.id2label[index] for index in sorted(config.id2label)]
    fields = evaluation_fields(TargetEncoder(tokenizer, data, names), data, samples, max_rows)
    mean = getattr(config, "target_mean", None) or [0.0] * len(names)  # a model of another library has none
    std = getattr(config, "target_std", None) or [1.0] * len(names)
    units = Units(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    return Targets(**fields, label_names=tuple(names), units=units)


def units_of(train: Dataset, names: list[str], source: str) -> Units:
    """Mean and standard deviation of each target over examples.

    Raises:
        UserError: a target with one value in all of them.
    """
    values = torch.tensor(train["label"][:], dtype=torch.float64)
    if len(values) < 2:
        raise UserError(f"data.train: {source}: {plural(len(values), 'training row')}; expected several, whose numbers vary")
    std = values.std(0, correction=0)
    for index, name in enumerate(names):
        if std[index] <= 1e-12 * values[:, index].abs().max().clamp(min=1e-300):
            raise UserError(
                f"data.train: {source}: '{name}' is {values[0, index]:g} in all training rows; expected numbers that vary"
            )
    return Units(values.mean(0), std)
