"""One run, from recipe to report. `run` is the page to read: every process of a distributed run calls it."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat import errors
from hfstrat.models import fingerprint
from hfstrat.recipe.format import plural
from hfstrat.recipe.load import Loaded, load_recipe, located
from hfstrat.run import output_dir, page, prediction, preflight, report
from hfstrat.tasks.report import Report, Result, write
from hfstrat.tasks.report_parts import Answer, Comparison
from hfstrat.trainer import checkpoints, heartbeat, signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfstrat.run.setup import Job

FEW_STEPS = 10


def run(loaded: Loaded, overwrite: bool = False, before_training: Callable[[Job], None] | None = None) -> Report | None:
    """Train a model from a recipe; the first process gets the report, the others None.

    Args:
        before_training: called once with everything loaded, for example to add a callback to the Trainer.

    Raises:
        RunError: with an exit code.
    """
    started = time.monotonic()
    preflight.check(loaded, overwrite)  # before torch is imported

    from hfstrat.run.setup import set_up
    from hfstrat.trainer.distributed import join_world

    world = join_world()
    with located(loaded):
        job = set_up(loaded, world, overwrite)
    job.setup_seconds = time.monotonic() - started
    with job.lock or contextlib.nullcontext():
        if before_training is not None:
            before_training(job)
        finished = complete(job, world.is_main_process, started)
        if finished is not None:
            compare(job, finished)
            present(job, finished)
        return finished


def complete(job: Job, is_main: bool, started: float) -> Report | None:
    """Train, measure, save and verify; a failure is recorded in the output folder."""
    from hfstrat.run import measure
    from hfstrat.trainer.distributed import leave_world

    try:
        before = answer_prompts(job)
        measured = measure.before(job)
        seconds = fit(job, before)
        result, probe = measure.conclude(job, seconds)
        result = measure.after(job, result, measured)
        after = answer_prompts(job)
        partial = save(job)
        job.release()  # for the process that reloads the artifact
        leave_world()
        return publish(job, result, probe, partial, before, after, started) if is_main else None
    except BaseException as error:
        signals.exit_if_ended_by_launcher(error)
        if isinstance(error, KeyboardInterrupt):
            error.args = (interrupted(job),)
        named = heartbeat.explain(error)
        final = with_weights(job, named)
        if is_main:
            if named.code == errors.DISK_FULL:
                output_dir.discard(job.folder)
            told = report.write_failure(job.loaded, job.folder, final, **trained_so_far(job))
            if told is not None and final.code != errors.DISK_FULL:
                page.write_safely(told, job.folder, job.screen.print)
        if final is not named:
            raise final from error
        raise


def trained_so_far(job: Job) -> dict[str, Any]:
    """Steps and curves of a run that did not finish."""
    from hfstrat.run.measure import losses_of

    try:
        state = job.trainer.state
        return {"steps": state.global_step, "curve": job.progress.curve, "losses": losses_of(state.log_history)}
    except Exception:  # the trainer is released once the result is saved; and nothing may hide the error that ended the run
        return {}


def with_weights(job: Job, error: errors.RunError) -> errors.RunError:
    """The error with the place of the trained weights and how to continue, if training itself had ended."""
    if job.ended_in is None or error.code in (errors.INTERRUPTED, errors.DISK_FULL) or str(job.ended_in) in str(error):
        return error
    auto = job.recipe.training.resume_from_checkpoint != "never"
    how = "the same command" if auto else "the same command with training.resume_from_checkpoint=auto"
    text = f"{error}; training was complete: its weights are in {job.ended_in}, and {how} continues from there"
    return type(error)(text, error.code) if type(error) in (errors.RunError, errors.UserError) else error


def interrupted(job: Job) -> str:
    """The message for an interrupted run."""
    complete = checkpoints.complete(job.folder)
    if not complete:
        return "interrupted before the first checkpoint; the same command starts again, and uses the data prepared so far"
    return f"interrupted; the same command resumes from {complete[-1]}"


def answer_prompts(job: Job) -> list[str]:
    """The model's answers to the prompts, on the first process; a resumed run returns those of its start."""
    from hfstrat.trainer import sharded

    if job.checkpoint and job.trainer.state.global_step == 0:
        return list(checkpoints.state_of(job.checkpoint).get("answers", []))
    if not job.trainer.is_world_process_zero():
        return []
    model = job.published or job.trainer.accelerator.unwrap_model(job.trainer.model)
    length = job.recipe.evaluation.max_new_tokens
    with sharded.on_device(model, job.trainer.args.device):
        return [job.task.text.predict(model, job.data, prompt, length, job.compute_dtype) for prompt in job.prompts]


def fit(job: Job, before: list[str]) -> float:
    """Train; returns the seconds, including evaluations and checkpoints."""
    from hfstrat.tasks.verify import untrained_logits

    job.trainer.marker_state["answers"] = before
    if job.checkpoint:
        job.progress.speeds += checkpoints.state_of(job.checkpoint).get("speeds", [])
    job.trainer.marker_state["speeds"] = job.progress.speeds
    if job.untrained is None:  # it is sharded, and runs only now
        job.untrained = untrained_logits(job.trainer.model, job.probe, job.compute_dtype)
    if job.checkpoint:
        job.screen.print(f"resuming from {job.checkpoint}")
    started = time.monotonic()
    try:
        job.trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    finally:
        job.progress.close()
        job.ended_in = job.trainer.ended_in
    state = job.trainer.state
    if state.global_step < state.max_steps:
        reason = "max_time" if job.trainer.clock and job.trainer.clock.is_over else "early stopping"
        job.screen.print(f"stopped by {reason} after {state.global_step:,} of at most {state.max_steps:,} steps")
    for line in job.data.lines_after():
        job.screen.print(line)
    if job.trainer.best_step() == 0:
        by_clock = bool(job.trainer.clock and job.trainer.clock.is_over)
        job.screen.print(
            f"{'warning':<9} evaluation never improved on the untrained model, so the best checkpoint is step 0; "
            f"{_remedy(state.global_step, by_clock)}"
        )
    return time.monotonic() - started


def _remedy(steps: int, by_clock: bool) -> str:
    """What to change where training improved nothing: of a few steps, the first are warmup and the last have almost no rate."""
    if steps >= FEW_STEPS:
        return "lower training.learning_rate, or inspect the data with `hfstrat check`"
    longer = "training.max_time" if by_clock else "training.max_steps or num_train_epochs"
    return f"{plural(steps, 'step')}, most of them warmup and decay, are too few to learn from: raise {longer}"


def save(job: Job) -> Path:
    """Write the result next to its final folder."""
    from hfstrat.models.load import keep_padding_index

    partial = job.folder / f"{output_dir.RESULT}.partial"
    keep_padding_index(job.base.model)
    job.strategy.save(job.trainer, partial, job.base)
    job.trainer.accelerator.wait_for_everyone()
    return partial


def publish(job: Job, result: Result, probe: Any, partial: Path, before: list[str], after: list[str], started: float) -> Report:
    """Verify the saved result in a new process, move it to its final folder, and write the report."""
    from hfstrat.models.load import source_of
    from hfstrat.run import examples
    from hfstrat.tasks import verify

    source, options = source_of(job.recipe.model)
    if job.recipe.model.attn_implementation != "auto":
        options["attn_implementation"] = job.recipe.model.attn_implementation
    verified = verify.verify(partial, probe, {"source": source, "task": job.recipe.task, **options, **result.reload})
    final = output_dir.publish(partial)
    references = [sample["reference"] for sample in job.data.samples] if not job.recipe.evaluation.prompts else []
    answers = [
        Answer(prompt=job.task.text.prompt(prompt), before=old, after=new, reference=(references or [""] * len(after))[i])
        for i, (prompt, old, new) in enumerate(zip(job.prompts, before or [""] * len(after), after, strict=True))
    ]
    result = result.with_parts(
        verified=verified,
        answers=answers,
        artifact=str(final),
        artifact_bytes=fingerprint.folder_bytes(final),
        total_seconds=time.monotonic() - started,
        predicted=prediction.of_environment(job.recipe),
    )
    finished = report.build(job.loaded, result, examples.statistics(job))
    write(finished, job.folder)
    examples.keep_safely(job, result)
    return finished


def compare(job: Job, finished: Report) -> None:
    """Add a comparison with alternatives to the report, where the strategy makes one. An error here ends no run."""
    try:
        found = job.strategy.after(job.loaded, finished.finished, job.folder / output_dir.RESULT)
    except Exception as error:
        job.screen.print(f"not compared: {type(error).__name__}: {errors.first_line(error)}")
        return
    if found:
        finished.finished.comparison = Comparison.model_validate(found)
        write(finished, job.folder)


def present(job: Job, finished: Report) -> None:
    """Print the summary, write the model card, and push the result if the recipe requests it. An error here ends no run."""
    from hfstrat.publish import card, push
    from hfstrat.trainer import progress

    final = job.folder / output_dir.RESULT
    progress.show_answers(job.screen, [answer.model_dump() for answer in finished.finished.answers])
    file = page.write_safely(finished, job.folder, lambda line: job.screen.print(line, markup=False))
    shown = f", {file.name}" if file else ""
    told = f"report           {job.folder / 'report.json'}{shown}"
    for line in (*report.summary(finished), f"result           {final}", told):
        job.screen.print(line)
    try:
        (final / "README.md").write_text(card.make(finished, final, job.recipe.hub.repo_id or ""), encoding="utf-8")
    except Exception as error:  # the result is complete without it
        job.screen.print(f"no card          {type(error).__name__}: {error}", markup=False)
    for line in push.push(job.recipe, job.folder, finished):
        job.screen.print(line, markup=False)
    folder, kind = shlex.quote(str(job.folder)), job.task.rows.kind
    if job.task.text.generates:
        continues = getattr(job.data.renderer, "continues_text", False)
        tried = f"generate {folder} -p TEXT" if continues else f"chat {folder}"
    else:
        tried = f"predict {folder} --{kind.column} PATH" if kind else f"predict {folder} --text TEXT"
    ways = f"hfstrat {tried} tries it, hfstrat use {folder} prints the lines that load and serve it"
    job.screen.print(f"next             {ways}", markup=False)


def main(argv: list[str] | None = None) -> None:
    """Entry for `python -m hfstrat.train` and `accelerate launch -m hfstrat.train`; ends with the run's exit code."""
    given = sys.argv[1:] if argv is None else argv
    arguments = [argument for argument in given if argument != "--overwrite"]
    with signals.report_exit():
        if not arguments:
            raise errors.UserError("usage: python -m hfstrat.train RECIPE [key=value ...] [--overwrite]")
        run(load_recipe(arguments[0], arguments[1:]), overwrite="--overwrite" in given)
