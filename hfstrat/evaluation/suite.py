"""All measurements of one model, by name: the same list for `hfstrat evaluate` and for a training run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.intervals import ANSWERS, CONTROL, METHOD, ROWS, Measurement, measurement_of, with_intervals
from hfstrat.recipe.schema import Evaluation
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData


@dataclass
class Suite:
    """The measurements to make."""

    wanted: Evaluation
    data: PreparedData | None  # its evaluation examples are measured, and its `samples` answered
    seed: int
    own_rows: bool = True  # whether the loss of the examples is measured here; during training the Trainer does it
    rows_at_once: int | None = None  # evaluation examples of a pass, as the Trainer has them
    is_trained: bool = True  # whether the weights were trained before, so that something can be forgotten

    def is_empty(self, task: Task) -> bool:
        """Whether nothing is to be measured."""
        wanted = self.wanted
        named = wanted.metrics or wanted.choices or wanted.lm_eval or wanted.control not in ("auto", "off")
        return not (named or (self.own_rows and self.data is not None) or self.checks_forgetting(task))

    def checks_forgetting(self, task: Task) -> bool:
        """Whether the control text is measured."""
        return self.wanted.control != "off" and task.text.generates and (self.is_trained or self.wanted.control != "auto")

    def measure(self, subject: Subject, runner: Runner) -> dict[str, Measurement]:
        """All measurements, by name; a collective operation whose result is the same on every process."""
        from hfstrat.evaluation import choices, likelihood, lm_eval, text_metrics

        wanted, found = self.wanted, dict[str, Measurement]()
        with subject.measured():
            if self.own_rows and self.data is not None:
                found[ROWS] = measurement_of(subject.task, row_sums(subject, self.data, runner, self.rows_at_once), self.data)
            subject = replace(subject, task=TASKS[subject.task.name])  # texts are measured in the same way for any objective
            if wanted.metrics and self.data is not None:
                found[ANSWERS] = text_metrics.measure(subject, self.data, wanted, runner, self.seed)
            for file in wanted.choices:
                found[Path(file).name] = choices.measure(subject, file, runner, wanted.max_rows)
            if wanted.lm_eval:
                found |= lm_eval.measure(subject, wanted, runner, self.seed)
            if self.checks_forgetting(subject.task):
                found[CONTROL] = likelihood.measure(subject, wanted.control, runner)
        return found


def row_sums(subject: Subject, data: PreparedData, runner: Runner, at_once: int | None = None) -> tuple[np.ndarray, ...]:
    """What `Metrics.sums` gives for each evaluation example (`data.eval`), in their order.

    Args:
        at_once: examples of a pass: the last bits of the numbers depend on what is computed together.
    """
    task, metrics, rows = subject.task, subject.task.metrics.for_data(data), data.eval
    collate = task.rows.collator(subject.base(), data, subject.tokenizer, runner.multiple)

    def step(places: list[int]) -> Any:
        columns = rows[places]
        batch = collate([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        return metrics.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    return replace(runner, rows=at_once).per_row(ROWS, np.asarray(data.eval_lengths), step)


def build_report(before: dict[str, Measurement], after: dict[str, Measurement]) -> dict[str, Any]:
    """The entries of the report: for each set of examples the metrics before, after and their difference, with intervals."""
    measured = {name: with_intervals(before.get(name), found) for name, found in after.items()}
    return {"interval": METHOD, "measured": measured} if measured else {}
