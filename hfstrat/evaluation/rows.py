"""The evaluation rows themselves: per-row sums by the task, as the Trainer keeps them during training.

What the last evaluation of a run said of each row: what two runs are compared by, row by row."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.intervals import Found
from hfstrat.tasks.base import Task

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData


def measure(subject: Subject, data: PreparedData, runner: Runner, words: str = "evaluation rows") -> Found:
    """The task's metrics of `data.eval`."""
    task, rows = subject.task, data.eval
    collate = task.collator(subject.base(), data, subject.tokenizer, runner.multiple)

    def step(places: list[int]) -> Any:
        columns = rows[places]
        batch = collate([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        return task.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    sums = runner.per_row(words, np.asarray(data.eval_lengths), step)
    return of_sums(task, sums, data)


def of_sums(task: Task, sums: tuple[np.ndarray, ...], data: PreparedData) -> Found:
    """From what is kept of each row of `data.eval`, in its order."""
    metrics, details = task.measure(sums, data.label_names)
    sizes = bytes_of_rows(data)
    beside = {} if sizes is None else {"bytes": sizes}
    counts = {name: metrics[name] for name in ("tokens",) if name in metrics}
    order = hashlib.sha256(np.asarray(data.eval["row"][:], dtype=np.int64).tobytes()).hexdigest()
    score = task.score(sums, data.label_names, beside)
    return Found(len(sums[0]), score, task.shares, counts, details, order=order)


FILE = "evaluation_rows.npz"  # in the run's folder


Columns = dict[str, np.ndarray]


def write(folder: Path, data: PreparedData, columns: Columns) -> None:
    """Write the columns (`Task.of_rows`, `[rows]` each) with the number that each row has in its source.

    Where the tokenizer tells it exactly, there is too how many `bytes` the tokens that carry loss stand for.
    """
    if len(columns["nll"]) != len(data.eval):
        return  # a trainer of another library evaluated other rows
    found = {"row": np.asarray(data.eval["row"][:], dtype=np.int64), **columns}
    if (sizes := bytes_of_rows(data)) is not None:
        found["bytes"] = sizes
    np.savez_compressed(folder / FILE, **found)  # type: ignore[arg-type]


def bytes_of_rows(data: PreparedData) -> np.ndarray | None:
    """Bytes of text that are predicted in each evaluation row, `[rows]`; None where a token has no bytes of its own."""
    from hfstrat.data.token_bytes import token_bytes
    from hfstrat.trainer.baselines import row_bytes

    found = None if data.label_names else token_bytes(data.renderer.tokenizer)
    return None if found is None else row_bytes(data.eval, found)


def read(folder: Path) -> Columns:
    """The columns with those that follow from them (`rows`, `bits`), a row's pieces together, by ascending `row`.

    Empty where the file is not there, or is not whole.
    """
    try:
        with np.load(folder / FILE) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    numbers, first, place = np.unique(found.pop("row"), return_index=True, return_inverse=True)
    joined = {
        name: values[first] if values.dtype.kind == "i" else np.bincount(place, weights=values, minlength=len(numbers))
        for name, values in found.items()
    }
    return {"row": numbers, "rows": np.ones(len(numbers)), "bits": joined["nll"] / math.log(2), **joined}
