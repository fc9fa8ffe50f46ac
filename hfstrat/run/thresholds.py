"""Thresholds of the result, chosen on training examples that were held out of training: of each of several labels, or of a rare
class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.tasks.rankings import rarest_of
from hfstrat.tasks.text_classification.thresholds import KEY
from hfstrat.trainer.train_data import multiple_for

if TYPE_CHECKING:
    from hfstrat.run.setup import Job


def choose(job: Job) -> bool:
    """Choose the thresholds of the result, and store them in its config; whether there are any."""
    precision = job.recipe.evaluation.rare_class_precision
    if precision is None and not (job.recipe.evaluation.label_thresholds and getattr(job.data, "many", False)):
        return False
    found = job.strategy.out_of_fold(job.trainer)
    if found is None:
        found = None if job.held_out is None else _outputs(job)
    if found is None:
        return False
    if precision is not None:
        return _choose_rare(job, precision, *found)
    keys = job.task.metrics.for_data(job.data).thresholds(*found)
    for name, value in keys.items():
        setattr(job.base.model.config, name, value)
        low, high = min(value.values()), max(value.values())
        job.screen.print(
            f"{'labels':<9} predicted above {low:.2f} to {high:.2f}, chosen on {len(found[0]):,} held-out examples"
        )
    return bool(keys)


def _choose_rare(job: Job, precision: float, outputs: np.ndarray, labels: np.ndarray) -> bool:
    """Store the threshold of the rarest class in the config of the result; whether there is one with this precision."""
    data: Any = job.data
    held_out = np.bincount(labels, minlength=len(data.counts)) if job.held_out is not None else 0
    place = rarest_of(data.counts + held_out)
    assert place is not None, "held_out.check_rare has found it"
    name, count = data.label_names[place], int((labels == place).sum())
    metrics: Any = job.task.metrics.for_data(data)
    threshold = metrics.rare_threshold(outputs, labels, place, precision)
    of = f"a precision of {precision:.0%} on {len(labels):,} held-out examples, {count:,} of them {name}"
    if threshold is None:
        words = f"none: no probability of {name} has {of}; the most probable class is predicted"
    else:
        words = f"{name} is predicted above {threshold:.3g}, the lowest probability with {of}"
        setattr(job.base.model.config, KEY, {name: threshold})
    job.screen.print(f"{'threshold':<9} {words}", markup=False)
    return threshold is not None


def note(job: Job) -> None:
    """Add the thresholds to the details of the evaluation."""
    for row in (job.trainer.details or {}).get("labels", []):
        if row["label"] in (stored := getattr(job.base.model.config, KEY, None) or {}):
            row["threshold"] = stored[row["label"]]


def _outputs(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The outputs `[n, L]` of the result for the examples that were held out, and their labels."""
    model, rows, args = job.published, job.held_out, job.trainer.args
    runner = Runner(args.device, job.compute_dtype, job.screen, "auto", job.plan.processes, args.process_index)
    collate = job.task.rows.collator(job.base, job.data, job.data.renderer.tokenizer, multiple_for(args.device))
    if job.outline is None:
        model.to(args.device)
    subject = Subject.from_model(model, job.data.renderer.tokenizer, job.task)

    def step(places: list[int]) -> Any:
        columns = rows[places]
        batch = collate([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        labels = batch.pop("labels")
        return model(**{name: tensor.to(args.device) for name, tensor in batch.items()}).logits.float(), labels

    with subject.measured():
        logits, labels = runner.per_row("held-out examples", np.asarray(rows["length"][:]), step)
    return logits, labels
