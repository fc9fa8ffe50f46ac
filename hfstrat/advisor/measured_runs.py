"""Runs whose quality was measured, with what was known before each: what predictions of quality are learned from. No torch.

`measured_runs.csv` ships with the package; benchmarks/measured_runs.py makes it from the stored results of benchmarks. The
user's own runs (`report.json`) are further rows of the same kind.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from hfstrat.errors import UserError
from hfstrat.tasks import TASKS
from hfstrat.tasks import report as reports
from hfstrat.tasks.report import Failure, Report

FILE = Path(__file__).parent / "measured_runs.csv"
YOURS = "your runs"
CLASSES, TEXT = "classification", "language model"
SINGLE = "single_label_classification"
TF_IDF = "TF-IDF"  # the baseline in reports, as `hfstrat.run.simple_models` names it, which imports torch


class Run(NamedTuple):
    """A run that was measured, or (without `value`) one that is considered.

    group: the data set. Of a user's own run: its path.
    task: classification (each text has one label) or language model.
    steps: optimizer steps; `seen`: examples in all of them. Both are 0 of a solved head.
    value: accuracy, or the loss per token of the result; of `scratch`, bits per byte.
    base: loss per token of the base before training.
    tf_idf, probe: cross-validated accuracies before training.
    gap: bits per byte that the base needs on the texts, divided by those that it expects, minus 1; `base_bits`: those it needs.
    ngram: bits per byte of an n-gram model.
    """

    group: str
    source: str
    task: str
    model: str
    parameters: float
    is_decoder: bool
    strategy: str
    rows: float
    classes: int
    steps: float
    seen: float
    value: float | None = None
    base: float | None = None
    tf_idf: float | None = None
    probe: float | None = None
    gap: float | None = None
    base_bits: float | None = None
    ngram: float | None = None


TEXTS = ("group", "source", "task", "model", "strategy")


@lru_cache
def shipped() -> tuple[Run, ...]:
    """The runs that ship with the package."""
    return tuple(read(FILE))


def read(file: Path) -> list[Run]:
    with file.open(encoding="utf-8", newline="") as source:
        return [_parsed(row) for row in csv.DictReader(source)]


def _parsed(row: dict[str, str]) -> Run:
    values: dict[str, object] = {}
    for name, text in row.items():
        values[name] = text if name in TEXTS else (float(text) if text else None)
    values["classes"], values["is_decoder"] = int(row["classes"]), row["is_decoder"] == "1"
    return Run(**values)  # type: ignore[arg-type]


def write(runs: Iterable[Run], file: Path) -> None:
    """Write the table; numbers have five significant digits."""
    with file.open("w", encoding="utf-8", newline="") as target:
        rows = csv.writer(target, lineterminator="\n")
        rows.writerow(Run._fields)
        for run in runs:
            rows.writerow(
                ["" if v is None else int(v) if isinstance(v, bool) else v if isinstance(v, str) else f"{v:.5g}" for v in run]
            )


def of_reports(folder: Path) -> list[Run]:
    """The user's own finished runs below a folder, as far as their reports say what predictions need."""
    return [run for path, report in reports.find(folder) if (run := of_report(report, path)) is not None]


def of_report(report: Report, path: Path) -> Run | None:
    """The run of a report; None where it is of another kind, or did not finish."""
    recipe, result, data = report.run.recipe, report.result, report.run.data
    if isinstance(result, Failure) or data is None:
        return None
    try:
        task = TASKS[recipe.task]
    except (UserError, KeyError):
        return None
    if not task.model.reads_tokens or task.model.sees_images:  # the table is of texts
        return None
    is_text = task.text.generates
    labels = data.labels
    if not is_text and (labels is None or labels.problem_type != SINGLE):
        return None
    after, before = result.metrics_after, result.metrics_before or {}
    value = after.get("loss" if is_text else "accuracy")
    name = recipe.strategy.name
    if name == "scratch":
        value = after.get("bits_per_byte")
    if value is None or (is_text and name not in ("scratch",) and not before.get("loss")):
        return None
    words = next((one.value.value for one in result.simple_models if one.name == TF_IDF), None)
    steps = 0.0 if name == "head" and not is_text else float(result.steps)
    return Run(
        group=str(Path(recipe.data.train[0].path).expanduser().absolute()),
        source=f"{YOURS}: {path}",
        task=TEXT if is_text else CLASSES,
        model=recipe.model.name_or_path if recipe.strategy.needs_weights else "",
        parameters=float(result.total_parameters),
        is_decoder=is_text or name == "scratch",
        strategy=name,
        rows=float(data.train.rows_kept),
        classes=len(labels.training_rows) if labels else 1,
        steps=steps,
        seen=round(steps * (result.plan.rows_per_step or recipe.training.global_batch_size)),
        value=value,
        base=before.get("loss") if is_text else None,
        tf_idf=words,
    )
