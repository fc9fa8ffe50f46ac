"""After the last step: convert the weights to the form that is saved, evaluate it, and collect the result for the report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from hfstrat.evaluation import row_scores
from hfstrat.models import fused_loss, load
from hfstrat.run.setup import Job
from hfstrat.tasks import verify
from hfstrat.tasks.report import Result
from hfstrat.trainer import autobatch, baselines, callbacks, sharded


def conclude(job: Job, seconds: float) -> tuple[Result, Any]:
    """The result of a run that took `seconds` to train, and the probe: logits of the final model on some inputs."""
    last = _measure(job)
    if job.trainer.is_world_process_zero() and job.trainer.sums is not None:
        row_scores.write(job.folder, job.data, job.task.metrics.columns(job.trainer.sums))
    result = _result(job, last, seconds)
    trained = job.trainer.accelerator.unwrap_model(job.trainer.model, keep_fp32_wrapper=False)  # no autocast, as it is loaded
    fused_loss.unbind_head_loss(job.base.model)  # the model as transformers defines it is saved and compared
    dtype = str(load.main_dtype(trained)).removeprefix("torch.")
    logits = verify.probe_logits(trained, job.probe)
    device = next(trained.parameters()).device.type
    return result, {"inputs": job.probe, "logits": logits, "dtype": dtype, "device": device, "untrained": job.untrained}


def _measure(job: Job) -> dict[str, float] | None:
    """The metrics of the final model: those of the last evaluation if nothing has changed since, else evaluated again."""
    trainer = job.trainer
    step, best = trainer.state.global_step, trainer.best_step()
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    current = last is not None and last["step"] == step and trainer.details is not None and best in (None, step)
    if sharded_training := job.outline is not None:  # evaluated while sharded: the full model may fit no device
        last = last if current else trainer.evaluate()
        sharded.bring_together(trainer, job.outline, job.base)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    precision = {name: p.dtype for name, p in trained.named_parameters()}
    for undo in job.feed.undo:  # the final model is evaluated without cached columns
        undo()
    job.strategy.finish(trained, job.base)
    current &= precision == {name: p.dtype for name, p in trained.named_parameters()}
    if not sharded_training and not current:
        job.progress.evaluated = f"the result (weights of step {step if best is None else best}, as saved)"
        last = trainer.evaluate()
    return last


def _result(job: Job, last: dict[str, float] | None, seconds: float) -> Result:
    trainer, history = job.trainer, job.trainer.state.log_history
    step = trainer.state.global_step
    first = next((entry for entry in history if "eval_loss" in entry and entry["step"] == 0), None)
    learning, total = load.count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    bar = job.baselines and replace(job.baselines, epochs=step * job.plan.global_batch_size / job.plan.rows)
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
        "trainable_parameters": learning,
        "total_parameters": total,
        "curve": job.progress.curve,
        "losses": [{"step": e["step"], "loss": e["loss"]} for e in history if "loss" in e],
        "plan": asdict(job.plan) | {"accumulation": job.plan.accumulation, "epochs": job.plan.epochs},
        **job.feed.facts,
        "baselines": bar.facts() if bar else None,
        "overfitting": callbacks.overfitting(history),
        "reload": job.base.reload,
        **({"quantization": job.base.quantized} if job.base.quantized else {}),
    }
    baselines.add_bits_per_byte(facts, job.data)
    return Result.model_validate(facts)


def _metrics(entry: dict[str, float] | None, names: tuple[str, ...]) -> dict[str, float] | None:
    return {name: float(entry[f"eval_{name}"]) for name in names if f"eval_{name}" in entry} if entry else None
