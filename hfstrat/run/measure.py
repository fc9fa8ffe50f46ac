"""What is measured before and after training; the result of a run, for the report and for the verification of what is saved."""

from __future__ import annotations

import math
import zipfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from hfstrat.evaluation import intervals
from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.intervals import ROWS, Measurement, measurement_of
from hfstrat.evaluation.suite import Suite, build_report, row_sums
from hfstrat.models import fused_loss, load
from hfstrat.run import simple_models, thresholds
from hfstrat.tasks import verify
from hfstrat.tasks.report import Result
from hfstrat.trainer import autobatch, baselines, callbacks, checkpoints, sharded
from hfstrat.trainer.distributed import is_sharded

MISTAKES, SHOWN_TOKENS = 12, 120

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from hfstrat.run.setup import Job


def before(job: Job) -> dict[str, Measurement]:
    """The suite's results before training; a resumed run has those of its start.

    The evaluation examples are added when the Trainer has evaluated them.
    """
    kept: dict[str, Any]
    if job.checkpoint:
        kept = checkpoints.state_of(job.checkpoint).get("measured", {})
        found = from_marker(kept, intervals.kept_samples(job.folder))
    else:
        found = measure(job) if job.recipe.evaluation.eval_on_start else {}
        kept = {name: for_marker(one) for name, one in found.items()}

    task, data, folder = job.task, job.data, job.folder  # not the job, which holds the trainer: the folder would stay locked
    first = job.trainer.is_world_process_zero()

    def note_rows(sums: tuple[np.ndarray, ...]) -> None:
        if len(sums[0]) == len(data.eval):
            found[ROWS] = measurement_of(task, sums, data)
            kept[ROWS] = for_marker(found[ROWS])
            if first:
                intervals.keep_samples(folder, found)

    job.trainer.marker_state["measured"] = kept
    job.trainer.at_first = note_rows
    return found


def from_marker(kept: dict[str, Any], samples: dict[str, dict[str, Any]]) -> dict[str, Measurement]:
    """The measurements that a checkpoint's marker names, with their resampled metrics where those are still there."""
    no_scores, found = intervals.means({}), dict[str, Measurement]()
    for name, one in kept.items():
        same = name in samples and samples[name]["rows"] == one["rows"]
        more = samples[name] if same else {"rows": one["rows"], "order": "gone"}
        found[name] = Measurement(score=no_scores, given=one["metrics"], **more)
    return found


def for_marker(found: Measurement) -> dict[str, Any]:
    """The number of examples, and value, low and high of each metric."""
    metrics = intervals.with_intervals(None, found)["after"]
    return {"rows": found.rows, "metrics": {name: tuple(each.values()) for name, each in metrics.items()}}


def after(job: Job, result: Result, earlier: dict[str, Measurement]) -> Result:
    """The result with the evaluation examples and the suite, before and after training.

    A metric that is computed in two ways, such as bits per byte, has the measured value in both places, to the last bit.
    """
    found, sums = dict[str, Measurement](), job.trainer.sums
    if sums is not None and len(sums[0]) == len(job.data.eval):
        found[ROWS] = measurement_of(job.task, sums, job.data)
    found |= measure(job) | of_objective(job)
    simple = simple_models.compare(job.simple_models, found[ROWS], job.task) if ROWS in found else []
    parts = build_report(earlier, found) | {"simple_models": simple, **mistakes(job)}
    for when in ("before", "after"):
        metrics, measured = getattr(result, f"metrics_{when}"), parts.get("measured", {}).get(ROWS, {}).get(when, {})
        if metrics:
            same = {name: measured[name]["value"] for name in metrics if name in measured}
            parts[f"metrics_{when}"] = {**metrics, **same}
    return result.with_parts(**parts)


def mistakes(job: Job) -> dict[str, Any]:
    """The part of the report with the evaluation examples that the result gets most wrong; empty where a task has none."""
    sums, data, rows = job.trainer.sums, job.data, job.task.rows
    if sums is None or len(sums[0]) != len(data.eval):
        return {}
    tokenizer, found = data.renderer.tokenizer, []
    for one in job.task.metrics.for_data(data).mistakes(sums, MISTAKES):
        row = data.eval[one.place]
        about = {"row": int(row["row"]), "text": rows.as_text(row, tokenizer, SHOWN_TOKENS)}
        found.append(about | {"expected": one.expected, "predicted": one.predicted, "score": one.score, "place": one.place})
    return {"mistakes": found} if found else {}


def of_objective(job: Job) -> dict[str, Measurement]:
    """What the objective measures of the result beside its metrics."""
    subject = Subject.from_model(job.published, job.data.renderer.tokenizer, job.task)
    with subject.measured():
        return intervals.of_columns(job.objective.measure(subject.model, job.train_data))


def measure(job: Job) -> dict[str, Measurement]:
    """The suite's results for the current model, which is complete on each process, also if it is sharded in training."""
    trainer, strategy = job.trainer, job.recipe.strategy
    suite = Suite(job.recipe.evaluation, job.data, job.recipe.seed, own_rows=False, is_trained=strategy.needs_weights)
    if suite.is_empty(job.task):
        return {}
    model = job.published or trainer.accelerator.unwrap_model(trainer.model)
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


def conclude(job: Job, seconds: float) -> tuple[Result, Any]:
    """The result of a run that took `seconds` to train, and the probe: logits of the final model on some inputs."""
    last = _measure(job)
    if job.trainer.is_world_process_zero() and job.trainer.sums is not None:
        columns = job.task.metrics.columns(job.trainer.sums) | simple_models.columns(job.simple_models, job.task)
        intervals.write_rows(job.folder, job.data, columns, job.task.metrics.of_tokens)
    result = _result(job, last, seconds)
    trained = job.published
    assert trained is not None
    fused_loss.unbind_head_loss(job.base.model)  # the model as transformers defines it is saved and compared
    dtype = str(load.main_dtype(trained)).removeprefix("torch.")
    logits = verify.probe_logits(trained, job.probe)
    device = next(trained.parameters()).device.type
    return result, {"inputs": job.probe, "logits": logits, "dtype": dtype, "device": device, "untrained": job.untrained}


def _measure(job: Job) -> dict[str, float] | None:
    """The metrics of the final model: those of the last evaluation if nothing has changed since, else evaluated again."""
    trainer = job.trainer
    step, best = trainer.state.global_step, trainer.best_step()
    last = _last_evaluation(job)
    current = last is not None and last["step"] == step and trainer.details is not None and best in (None, step)
    if sharded_training := job.outline is not None:  # evaluated while sharded: the full model may fit no device
        last = last if current else trainer.evaluate()
        sharded.gather_model(trainer, job.outline, job.base)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    precision = {name: p.dtype for name, p in trained.named_parameters()}
    for undo in job.train_data.undo:  # the final model is evaluated without cached columns
        undo()
    job.strategy.finish(trained, job.base)
    job.parameters = load.count_parameters(trained)  # before an adapter is merged
    job.published = job.strategy.published(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), job.base)
    chosen = thresholds.choose(job)
    current &= job.published is trained and _is_plain(job) and not chosen
    current &= precision == {name: p.dtype for name, p in trained.named_parameters()}
    if chosen or not (sharded_training or current):
        last = _from_training_alone(job) | _evaluate_result(job)
        thresholds.note(job)
        if trainer.is_world_process_zero():
            text = job.task.text.metrics({name.removeprefix("eval_"): value for name, value in last.items()})
            job.screen.print(f"the result (weights of step {step if best is None else best}, as saved): {text}")
    return last


def keep_sums(job: Job, file: Path) -> None:
    """Store what was measured of each evaluation example, for another run of these weights (`Job.known_sums`)."""
    import numpy as np

    if job.trainer.sums is not None:
        np.savez(file, *job.trainer.sums, rows=np.asarray(job.data.eval["row"][:]))


def _known_sums(job: Job) -> tuple[np.ndarray, ...] | None:
    """What another run has measured of the weights that this one started from; None where it trained, or has other examples."""
    import numpy as np

    trained = job.trainer.state.global_step > job.progress.first_step
    if job.known_sums is None or not job.known_sums.is_file() or trained or job.plan.processes > 1:
        return None
    try:
        with np.load(job.known_sums) as stored:
            if np.array_equal(stored["rows"], job.data.eval["row"][:]):
                return tuple(stored[f"arr_{place}"] for place in range(len(stored.files) - 1))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # it was not completely written
        pass
    return None


def _last_evaluation(job: Job) -> dict[str, float] | None:
    return next((entry for entry in reversed(job.trainer.state.log_history) if "eval_loss" in entry), None)


def _from_training_alone(job: Job) -> dict[str, float]:
    """Metrics of the result that need more than its outputs: the divergence from the teacher."""
    if "eval_teacher_kl" not in (_last_evaluation(job) or {}):
        return {}
    return {"eval_teacher_kl": job.trainer.evaluate()["eval_teacher_kl"]}


def _is_plain(job: Job) -> bool:
    """Whether evaluations in training compute what one of the saved model does: from the same rows, by the same loss."""
    trainer, plain = job.trainer, job.task.rows.collator(job.base, job.data, job.data.renderer.tokenizer, 1)
    same_rows = trainer.eval_dataset is job.data.eval and type(trainer.eval_collator) is type(plain)
    return same_rows and trainer.evaluates_its_loss and not job.recipe.training.torch_compile


def _evaluate_result(job: Job) -> dict[str, float]:
    """The metrics of the model that is saved, as `hfstrat evaluate` measures it; the Trainer gets the sums and the details."""
    trainer, model = job.trainer, job.published
    if job.outline is None:
        model.to(trainer.args.device)
    if (known := _known_sums(job)) is not None:
        trainer.sums = known
    else:
        processes = job.plan.processes
        runner = Runner(trainer.args.device, job.compute_dtype, job.screen, "auto", processes, trainer.args.process_index)
        subject = Subject.from_model(model, job.data.renderer.tokenizer, job.task)
        with subject.measured():
            trainer.sums = row_sums(subject, job.data, runner, job.plan.eval_batch)
    metrics = job.task.metrics.for_data(job.data)
    values, trainer.details = metrics.measure(trainer.sums)
    if not math.isfinite(values["loss"]):
        trainer._stop_non_finite("evaluation loss", trainer.state.global_step)
    return {f"eval_{name}": value for name, value in values.items()}


def _result(job: Job, last: dict[str, float] | None, seconds: float) -> Result:
    trainer, history = job.trainer, job.trainer.state.log_history
    step = trainer.state.global_step
    first = next((entry for entry in history if "eval_loss" in entry and entry["step"] == 0), None)
    trainable, total = job.parameters
    bounds = job.baselines
    if bounds and job.plan.rows:
        bounds = replace(bounds, epochs=job.plan.epochs_at(step))
    facts: dict[str, Any] = {
        "metrics_before": _metrics(first, job.task.metrics.names),
        "metrics_after": _metrics(last, job.task.metrics.names),
        **({"evaluation": trainer.details} if trainer.details else {}),
        "steps": step,
        "session_steps": step - job.progress.first_step,
        "best_step": trainer.best_step(),
        "resumed_from": str(job.checkpoint) if job.checkpoint else None,
        "setup_seconds": job.setup_seconds,
        "train_seconds": seconds,
        "step_seconds": job.progress.seconds,
        "tokens": job.progress.tokens,
        "tokens_per_second": job.progress.tokens_per_second,
        "peak_memory_bytes": autobatch.peak_bytes(),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "curve": job.progress.curve,
        "losses": losses_of(history),
        "speeds": job.progress.speeds,
        "plan": asdict(job.plan) | {"accumulation": job.plan.accumulation, "epochs": job.plan.epochs},
        **job.train_data.facts,
        **job.objective.facts(history),
        "baselines": asdict(bounds) if bounds else None,
        "overfitting": callbacks.overfitting(history, trainer.marker_state.get("margins"))
        if job.task.metrics.can_overfit
        else [],
        "reload": job.base.reload,
        **({"quantization": job.base.quantized} if job.base.quantized else {}),
    }
    if job.task.metrics.of_tokens:
        baselines.add_bits_per_byte(facts, job.data)
    return Result.model_validate(facts)


def losses_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training losses of a log, with the learning rate and the norm of the gradient where they are logged."""
    names = ("step", "loss", "learning_rate", "grad_norm")
    return [{name: entry[name] for name in names if entry.get(name) is not None} for entry in history if "loss" in entry]


def _metrics(entry: dict[str, float] | None, names: tuple[str, ...]) -> dict[str, float] | None:
    return {name: float(entry[f"eval_{name}"]) for name in names if f"eval_{name}" in entry} if entry else None
