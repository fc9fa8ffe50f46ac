"""Everything that is measured of one model, by name: the same list for `hfstrat evaluate` and for a training run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.intervals import METHOD, Found, together
from hfstrat.evaluation.row_scores import supervised_bytes
from hfstrat.recipe.evaluation import Evaluation
from hfstrat.tasks.base import Task

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData

ROWS, ANSWERS, CONTROL = "evaluation rows", "answers", "control text"


@dataclass
class Suite:
    """What to measure.

    Args:
        data: whose evaluation rows; `samples` of them are answered.
        own_rows: whether their loss is measured here (during training the Trainer does it).
        is_trained: whether the weights knew something before training, so that it can be forgotten.
    """

    wanted: Evaluation
    data: PreparedData | None
    seed: int
    own_rows: bool = True
    is_trained: bool = True

    def is_empty(self, task: Task) -> bool:
        """Whether there is nothing to measure."""
        wanted = self.wanted
        named = wanted.metrics or wanted.choices or wanted.lm_eval or wanted.control not in ("auto", "off")
        return not (named or (self.own_rows and self.data is not None) or self.checks_forgetting(task))

    def checks_forgetting(self, task: Task) -> bool:
        """Whether the control text is measured."""
        return self.wanted.control != "off" and task.generates and (self.is_trained or self.wanted.control != "auto")

    def measure(self, subject: Subject, runner: Runner) -> dict[str, Found]:
        """All of it, by name; every process calls it, and each gets the whole."""
        from hfstrat.evaluation import choices, likelihood, lm_eval, text_metrics

        wanted, found = self.wanted, dict[str, Found]()
        with subject.measured():
            if self.own_rows and self.data is not None:
                found[ROWS] = measure_rows(subject, self.data, runner)
            if wanted.metrics and self.data is not None:
                found[ANSWERS] = text_metrics.measure(subject, self.data, wanted, runner, self.seed)
            for file in wanted.choices:
                found[Path(file).name] = choices.measure(subject, file, runner, wanted.max_rows)
            if wanted.lm_eval:
                found |= lm_eval.measure(subject, wanted, runner, self.seed)
            if self.checks_forgetting(subject.task):
                found[CONTROL] = likelihood.measure(subject, wanted.control, runner)
        return found


def measure_rows(subject: Subject, data: PreparedData, runner: Runner) -> Found:
    """The task's metrics on the evaluation examples, `data.eval`."""
    task, rows = subject.task, data.eval
    collate = task.collator(subject.base(), data, subject.tokenizer, runner.multiple)

    def step(places: list[int]) -> Any:
        columns = rows[places]
        batch = collate([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        return task.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    return measurement_of(task, runner.per_row(ROWS, np.asarray(data.eval_lengths), step), data)


def measurement_of(task: Task, sums: tuple[np.ndarray, ...], data: PreparedData) -> Found:
    """The task's metrics from what `Task.sums` gives for each example of `data.eval`, in its order."""
    metrics, details = task.measure(sums, data.label_names)
    sizes = supervised_bytes(data)
    beside = {} if sizes is None else {"bytes": sizes}
    counts = {name: metrics[name] for name in ("tokens",) if name in metrics}
    order = hashlib.sha256(np.asarray(data.eval["row"][:], dtype=np.int64).tobytes()).hexdigest()
    score = task.score(sums, data.label_names, beside)
    return Found(len(sums[0]), score, task.shares, counts, details, order=order)


def report_of(before: dict[str, Found], after: dict[str, Found]) -> dict[str, Any]:
    """For the report: each set of rows with its metrics before, after and by difference, with intervals."""
    measured = {name: together(before.get(name), found) for name, found in after.items()}
    return {"interval": METHOD, "measured": measured} if measured else {}
