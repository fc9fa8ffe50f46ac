"""The baselines of a run with a head, measured before training, and how the result compares with them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.errors import first_line
from hfstrat.evaluation import simple_models
from hfstrat.evaluation.intervals import BASELINE, measurement_of, with_intervals
from hfstrat.evaluation.simple_models import SimpleModel
from hfstrat.recipe import format
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import is_sharded

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData
    from hfstrat.evaluation.intervals import Measurement
    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Recipe
    from hfstrat.strategies.base import Strategy
    from hfstrat.tasks.report_parts import SimpleModel as SimpleModelPart
    from hfstrat.trainer.train_data import TrainData

TF_IDF, FROZEN = "TF-IDF", "head on frozen features"
SEED = 42


def measure(recipe: Recipe, strategy: Strategy[Any], base: Base, rows: TrainData, data: PreparedData) -> list[SimpleModel]:
    """The baselines of a task with a head, the simplest first; empty for other tasks, or if the recipe wants none.

    All processes of a run have to call it.
    """
    task = TASKS[recipe.task]
    if task.text.generates or not task.metrics.has_baselines or not recipe.evaluation.baselines:
        return []
    found = [_constant(task, rows, data), *([_tf_idf(task, rows, data)] if task.model.reads_tokens else [])]
    if strategy.has_pretrained_body and not is_sharded():
        try:
            found.append(_frozen(task, base, rows, data))
        except Exception as error:  # the code of a family can fail in any way; a baseline ends no run
            base.say(f"no baseline on frozen features: {first_line(error)}")
    return found


def _constant(task: Task, rows: TrainData, data: PreparedData) -> SimpleModel:
    started, classes = time.monotonic(), len(data.label_names)
    labels = rows.collate.encode_labels(data.train["label"][:])
    numbers = rows.collate.units is not None
    one = np.zeros(classes) if numbers else simple_models.constant(labels, classes)
    outputs = np.tile(one, (len(data.eval), 1))
    name = "mean of the training examples" if numbers else "most frequent label" if labels.dim() == 1 else "frequent labels"
    return _model(name, task, outputs, rows, data, len(labels), started, standardized=numbers)


def _tf_idf(task: Task, rows: TrainData, data: PreparedData) -> SimpleModel:
    started, units = time.monotonic(), rows.collate.units
    places = np.sort(np.random.default_rng(SEED).permutation(len(data.train))[: simple_models.MOST_ROWS])
    sample = data.train.select(places)
    labels, train, test = rows.collate.encode_labels(sample["label"][:]), sample["input_ids"][:], data.eval["input_ids"][:]
    if units is None:
        outputs = simple_models.tf_idf(train, labels, test, len(data.label_names))
    else:
        outputs = simple_models.tf_idf_of_numbers(train, labels, test)
    return _model(TF_IDF, task, outputs, rows, data, len(places), started, standardized=units is not None)


def _frozen(task: Task, base: Base, rows: TrainData, data: PreparedData) -> SimpleModel:
    from hfstrat.strategies.head import frozen_features

    started = time.monotonic()
    outputs, count = frozen_features.outputs(base, rows, len(data.label_names))
    return _model(FROZEN, task, outputs.numpy(), rows, data, count, started)


def _model(
    name: str,
    task: Task,
    outputs: np.ndarray,
    rows: TrainData,
    data: PreparedData,
    count: int,
    started: float,
    standardized: bool = False,
) -> SimpleModel:
    """The metrics of outputs `[examples, K]`, by the same code that evaluates the model in training."""
    import torch

    wide = torch.as_tensor(outputs, dtype=torch.float64)
    if standardized:
        wide = wide * rows.collate.units.std + rows.collate.units.mean
    metrics, labels = task.metrics.for_data(data), rows.collate.encode_labels(data.eval["label"][:])
    sums = tuple(each.numpy() for each in metrics.sums(lambda: {"logits": wide}, {"labels": labels}))
    return SimpleModel(name, count, measurement_of(task, sums, data), time.monotonic() - started, metrics.columns(sums))


def line(found: list[SimpleModel], task: Task) -> str:
    """'baselines  accuracy 23.1% (most frequent label), 78.2% (TF-IDF), 81.0% (head on frozen features, 2,000 examples)'."""
    metric = shown_metric(task)
    parts = [f"{format.metric(metric, one.found.values()[metric])} ({one.name})" for one in found]
    return f"{'baselines':<9} {metric.replace('_', ' ')} on the evaluation examples: {', '.join(parts)}"


def shown_metric(task: Task) -> str:
    quality = task.metrics.quality.metric
    return "mae" if "mae" in task.metrics.names else quality


def compare(found: list[SimpleModel], result: Measurement, task: Task) -> list[dict[str, Any]]:
    """For the report: each baseline with its interval, and the paired difference of the result from it."""
    metric, rows = shown_metric(task), []
    for one in found:
        both = with_intervals(one.found, result)
        about = {"name": one.name, "train_rows": one.rows, "seconds": one.seconds, "metric": metric}
        rows.append(about | {"value": both["before"][metric], "difference": both["difference"][metric]})
    return rows


def columns(found: list[SimpleModel], task: Task) -> dict[str, np.ndarray]:
    """What `hfstrat compare` needs of each example, to be stored beside the scores of the result."""
    above = task.metrics.quality.above
    return {f"{BASELINE}{one.name}": one.columns[above].astype(np.float64) for one in found}


def summary(found: list[SimpleModelPart]) -> list[str]:
    """The result beside the baselines, and a warning for each that is better than it beyond chance."""
    lines = []
    if found:
        parts = [f"{format.difference(one.metric, one.difference.value)} from {one.name}" for one in found]
        parts[0] = f"{found[0].metric.replace('_', ' ')} {parts[0]}"
        lines.append(f"{'baselines':<16} {', '.join(parts)}")
    for one in found:
        low, high = one.difference.low, one.difference.high
        higher_is_better = format.is_share(one.metric)
        if low is None or high is None or (high >= 0 if higher_is_better else low <= 0):
            continue
        value, name = format.metric(one.metric, one.value.value), one.metric.replace("_", " ")
        lines.append(
            f"{'warning':<16} the result is worse than the baseline {one.name} ({name} {value}); difference "
            f"{format.difference(one.metric, one.difference.value)}, 95% interval {format.difference(one.metric, low)} to "
            f"{format.difference(one.metric, high)}: {advice_on(one.name)}"
        )
    return lines


def advice_on(name: str) -> str:
    """What to do where a baseline is better than the result."""
    if name == FROZEN:
        return "use strategy head, or train longer or with another training.learning_rate"
    return "train longer, with another training.learning_rate, or on more examples; `hfstrat check` shows what is trained on"
