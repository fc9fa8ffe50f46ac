"""The evaluation rows themselves: per-row sums by the task, as the Trainer keeps them during training."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat import evaluation_rows
from hfstrat.evaluation.intervals import Found
from hfstrat.evaluation.loop import Runner
from hfstrat.evaluation.subject import Subject
from hfstrat.tasks import Task

if TYPE_CHECKING:
    from hfstrat.data import Prepared


def measure(subject: Subject, data: Prepared, runner: Runner, words: str = "evaluation rows") -> Found:
    """The task's metrics of `data.eval`."""
    task, rows = subject.task, data.eval
    collate = task.collator(subject.base(), data, subject.tokenizer, runner.multiple)

    def step(places: list[int]) -> Any:
        columns = rows[places]
        batch = collate([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        return task.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    sums = runner.per_row(words, np.asarray(data.eval_lengths), step)
    return of_sums(task, sums, data)


def of_sums(task: Task, sums: tuple[np.ndarray, ...], data: Prepared) -> Found:
    """From what is kept of each row of `data.eval`, in its order."""
    metrics, details = task.measure(sums, data.label_names)
    sizes = evaluation_rows.bytes_of_rows(data)
    beside = {} if sizes is None else {"bytes": sizes}
    counts = {name: metrics[name] for name in ("tokens",) if name in metrics}
    order = hashlib.sha256(np.asarray(data.eval["row"][:], dtype=np.int64).tobytes()).hexdigest()
    score = task.score(sums, data.label_names, beside)
    return Found(len(sums[0]), score, task.shares, counts, details, order=order)
