"""Measurements of a training run in addition to the evaluation loss, before and after training, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.intervals import Measurement
from hfstrat.evaluation.suite import ROWS, Suite, build_report, measurement_of
from hfstrat.trainer import sharded
from hfstrat.trainer.distributed import is_sharded

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.run.setup import Job


def before(job: Job) -> dict[str, Measurement]:
    """The suite's results before training; a resumed run has those of its start, without the scores of single examples.

    The evaluation examples are added when the Trainer has evaluated them.
    """
    from hfstrat.trainer import checkpoints

    kept: dict[str, Any] = {}
    if job.checkpoint:
        kept = checkpoints.state_of(job.checkpoint).get("measured", {})
        found = {
            name: Measurement(one["rows"], lambda weights: {}, given=one["metrics"], order="gone") for name, one in kept.items()
        }
    elif job.recipe.evaluation.eval_on_start:
        found = measure(job)
        kept = {name: whole(one) for name, one in found.items()}
    else:
        found = {}

    task, data = job.task, job.data  # not the job, which holds the trainer: a cycle would keep the folder locked

    def note_rows(sums: tuple[np.ndarray, ...]) -> None:
        if len(sums[0]) == len(data.eval):
            found[ROWS] = measurement_of(task, sums, data)
            kept[ROWS] = whole(found[ROWS])

    job.trainer.marker_state["measured"] = kept
    job.trainer.at_first = note_rows
    return found


def whole(found: Measurement) -> dict[str, Any]:
    """The number of examples, and value, low and high of each metric."""
    from hfstrat.evaluation.intervals import with_intervals

    metrics = with_intervals(None, found)["after"]
    return {"rows": found.rows, "metrics": {name: tuple(each.values()) for name, each in metrics.items()}}


def after(job: Job, earlier: dict[str, Measurement]) -> dict[str, Any]:
    """For the report: the evaluation examples and the suite, before and after training."""
    found, sums = dict[str, Measurement](), job.trainer.sums
    if sums is not None and len(sums[0]) == len(job.data.eval):
        found[ROWS] = measurement_of(job.task, sums, job.data)
    found |= measure(job)
    return build_report(earlier, found)


def measure(job: Job) -> dict[str, Measurement]:
    """The suite's results for the current model, which is complete on each process, also if it is sharded in training."""
    trainer, strategy = job.trainer, job.recipe.strategy
    suite = Suite(job.recipe.evaluation, job.data, job.recipe.seed, own_rows=False, is_trained=strategy.needs_weights)
    if suite.is_empty(job.task):
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    args, tokens = trainer.args, job.recipe.evaluation.batch_tokens
    if not is_sharded():
        model.to(args.device)
    processes = job.plan.processes
    rank = args.process_index if processes > 1 else 0
    runner = Runner(args.device, job.compute_dtype, job.screen, tokens, processes, rank)
    with sharded.on_device(model, args.device):
        subject = Subject.from_model(model, job.data.renderer.tokenizer, job.task)
        if not all(runner.gather(subject.device.type == args.device.type)):  # all or none: the processes wait for each other
            job.screen.print(
                "only the loss was measured: the complete model does not fit a device; `hfstrat evaluate` measures the result"
            )
            return {}
        return suite.measure(subject, runner)
