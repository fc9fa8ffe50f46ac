"""One job of a search: train a candidate to the end of a rung, or finish the winner as an ordinary run. Imports torch.

A rung trains at a constant rate, saves a checkpoint, and then lowers the rate to zero in a short cooldown, whose result is
measured; the next rung continues from the checkpoint before the cooldown (Hägele et al. 2024, arXiv 2405.18392). One run with
`lr_scheduler_type: warmup_stable_decay` and as many steps has the same weights.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.optimization import get_scheduler
from transformers.trainer_callback import ExportableState

from hfstrat.errors import RunError, UserError, named
from hfstrat.evaluation import evaluate, intervals
from hfstrat.evaluation.intervals import ROWS
from hfstrat.models.load import read_json
from hfstrat.recipe.load import load_recipe, located
from hfstrat.run import measure, output_dir, preflight, train
from hfstrat.run.setup import set_up
from hfstrat.tasks import report
from hfstrat.trainer import checkpoints
from hfstrat.trainer.distributed import join_world
from hfstrat.tuning import choosing, recipes

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe
    from hfstrat.run.setup import Job

FORWARD_SHARE = 0.3  # of the time of training on a row that its forward pass takes
COOLDOWN = 0.2  # of the steps before it: 10 to 20 % are enough in arXiv 2405.18392, figures 4 and 5
SAVE = 120.0  # seconds of training between two checkpoints of a long rung
PLAN = "rung.json"  # the steps of the rung, once they are known
WAIT = 30.0  # seconds until an earlier process, which was stopped, has released the folder
FEW = 100  # rows, the evaluation of which mostly takes a time that does not depend on them,
ALIKE = 20  # about that of so many more
ONLY_ROWS = ("evaluation.samples=0", "evaluation.control=off")  # the final run has measured the control text
ON_OTHERS = "other_rows.json"  # the winner's measurement on the rows of --eval-data


@dataclass(frozen=True)
class Spec:
    """What a job has to do, as its JSON file has it.

    kind: rung, final, or direct: training to the end of a rung as the final run.
    source, text, overrides: the recipe.
    result: the file for the answer, written last and atomically.
    seconds: of training in a rung. until: the time at which its training has to end.
    start: the checkpoint that a rung continues from.
    checkpoint: the cooled checkpoint that a final job publishes; None: the recipe is run from its start.
    measured: what the rung has measured of that checkpoint's weights, a file of `run.measure.keep_sums`.
    choosing, seed: the share of the held-out rows for choosing, and the seed that draws them.
    others: data to measure the winner on.
    in_bytes: whether losses are compared in bits per byte, because tokenizers differ.
    """

    kind: str
    source: str
    text: str | None
    overrides: list[str]
    result: str
    seconds: float = 0.0
    until: float | None = None
    checkpoint: str | None = None
    measured: str | None = None
    choosing: float = 1.0
    seed: int = 0
    others: str | None = None
    in_bytes: bool = False


class Rung(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends training with a cooldown such that both take so many seconds in all.

    Args:
        seconds: of training.
        until: the time (`time.time()`) at which training has to end; None: there is none.
        plan: the file that fixes the steps once they are decided, so that an interrupted rung ends at the same step.
    """

    def __init__(self, seconds: float, plan: Path, until: float | None = None) -> None:
        self.seconds, self.file, self.until = seconds, plan, until
        self.spent = 0.0
        self.steps = 0  # in all sessions of this rung
        self.in_session = 0.0  # of `spent`, in this session
        self._last: float | None = None
        self._saved = 0.0  # `spent` at the last checkpoint

    def follow(self, given: Rung) -> None:
        """Take over the settings of the present rung; time spent counts only if it was spent in it."""
        if str(self.file) != str(given.file):
            self.spent, self.steps = 0.0, 0
        self._saved = self.spent
        self.seconds, self.file, self.until, self._last = given.seconds, given.file, given.until, None

    @property
    def plan(self) -> dict[str, int]:
        return read_json(self.file)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
        if self.until is not None:  # loading may have taken longer than expected
            self.seconds = min(self.seconds, self.spent + self.until - time.time())
        plan = self.plan
        if plan and state.global_step >= plan["trunk"]:  # it was interrupted in its cooldown
            self._cool_down(plan, args, kwargs["lr_scheduler"])
        if plan and state.global_step >= plan["trunk"] + plan["cooldown"]:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        passed = now - (now if self._last is None else self._last)
        self.spent += passed
        self.in_session += passed
        self._last = now
        self.steps += 1
        plan = self.plan
        if not plan:
            cooldown = max(1, round(COOLDOWN * state.global_step))
            if self.spent * (1 + (cooldown + 0.5) / self.steps) < self.seconds:
                if self.spent - self._saved > SAVE:
                    control.should_save, self._saved = True, self.spent
                return control
            plan = {"trunk": state.global_step, "cooldown": cooldown}
            write(self.file, plan)
        if state.global_step == plan["trunk"]:
            control.should_save = True
            self._cool_down(plan, args, kwargs["lr_scheduler"])
        if state.global_step >= plan["trunk"] + plan["cooldown"]:
            control.should_save = control.should_training_stop = True
        return control

    @staticmethod
    def _cool_down(plan: dict[str, int], args: Any, schedule: Any) -> None:
        total = plan["trunk"] + plan["cooldown"]
        settings: Any = {"scheduler_specific_kwargs": recipes.decay(plan["cooldown"])}
        other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        shape: Any = get_scheduler("warmup_stable_decay", other, args.get_warmup_steps(total), total, **settings)
        schedule.lr_lambdas = [shape.lr_lambdas[0]] * len(schedule.lr_lambdas)

    def state(self) -> dict[str, Any]:
        return {
            "args": {"seconds": self.seconds, "plan": str(self.file)},
            "attributes": {"spent": self.spent, "steps": self.steps, "file": str(self.file)},
        }


def write(file: Path, content: Any) -> None:
    """Write JSON atomically and flush it to the disk."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, default=str)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def run_rung(spec: Spec) -> dict[str, Any]:
    """Train to the end of a rung, and measure; returns what the search has to know."""
    started = time.monotonic()
    loaded = load_recipe(spec.source, spec.overrides, spec.text)
    folder = Path(loaded.recipe.output_dir).expanduser()
    wait_for(folder)
    preflight.check(loaded, network=False)
    with located(loaded):
        job = set_up(loaded, join_world(), overwrite=False)
    job.setup_seconds = time.monotonic() - started
    plan = folder / PLAN
    rung = Rung(spec.seconds, plan, spec.until)
    job.trainer.add_callback(rung)
    began = time.monotonic()
    try:
        job.trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    finally:
        job.progress.close()
    trained = time.monotonic() - began
    state, steps = job.trainer.state, read_json(plan)
    result, _ = measure.conclude(job, trained)
    concluded = time.monotonic() - began - trained
    measure.keep_sums(job, folder / recipes.SUMS)
    in_steps = next(each.in_session for each in job.trainer.callback_handler.callbacks if isinstance(each, Rung))
    return {
        **scores_of(job.recipe, spec),
        "trunk": steps.get("trunk", state.global_step),
        "cooldown": steps.get("cooldown", 0),
        "is_complete": not steps,
        "trained": trained,
        "setup": job.setup_seconds,
        "saving": max(0.0, trained - in_steps),
        "evaluated": concluded,
        "cached": float(job.train_data.facts.get("head", {}).get("features_seconds", 0.0)),
        "row_seconds": row_seconds(job, concluded, trained, result.session_steps or 0),
        "seconds": time.monotonic() - started,
        "memory": result.peak_memory_bytes,
        "trainable": result.trainable_parameters,
        "parameters": result.total_parameters,
        "bytes": artifact_bytes(result.trainable_parameters, result.total_parameters, job),
        "tokens": result.tokens,
        "train_rows": len(job.data.train),
        "learning_rate": job.recipe.training.learning_rate,
    }


class FixLength(TrainerCallback):  # type: ignore[misc]
    """Gives a run that its clock has ended the recipe of that length, which alone reproduces it."""

    def __init__(self, job: Job, spec: Spec, plan: Path) -> None:
        self.job, self.spec, self.plan = job, spec, plan

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        job, steps = self.job, state.global_step
        state.max_steps = steps
        overrides = recipes.fixed_length(self.spec.overrides, steps, read_json(self.plan)["cooldown"])
        job.loaded = load_recipe(self.spec.source, overrides, self.spec.text)
        job.plan = replace(job.plan, steps=steps, eval_every=steps, save_every=steps)
        output_dir.write_recipe(job.recipe)


def run_direct(spec: Spec) -> dict[str, Any]:
    """Train the only candidate that the time allows as the final run: it is loaded, evaluated and verified once."""
    started = time.monotonic()
    loaded = load_recipe(spec.source, spec.overrides, spec.text)
    folder, plan = Path(loaded.recipe.output_dir).expanduser(), Path(spec.result).with_suffix(".plan.json")
    wait_for(folder)

    def limit(job: Job) -> None:
        for callback in (Rung(spec.seconds, plan, spec.until), FixLength(job, spec, plan)):
            job.trainer.add_callback(callback)

    begun = plan.with_suffix(".begun")
    if not begun.is_file():  # another candidate was trained here and failed
        output_dir.clear(folder)
        begun.touch()
    finished = report.read(folder) if report.status(folder) == "done" else None  # killed before its answer was written
    finished = finished or train.run(loaded, before_training=limit)
    assert finished is not None
    assert finished.run.data is not None
    result, recipe = finished.finished, finished.run.recipe
    for checkpoint in checkpoints.complete(folder):
        retitle(checkpoint, recipe.model_dump(), checkpoints.state_of(checkpoint))
    return {
        **scores_of(recipe, spec),
        "trunk": result.steps - read_json(plan)["cooldown"],
        "cooldown": read_json(plan)["cooldown"],
        "is_complete": False,
        "trained": result.train_seconds,
        "setup": result.setup_seconds,
        "seconds": time.monotonic() - started,
        "memory": result.peak_memory_bytes,
        "trainable": result.trainable_parameters,
        "parameters": result.total_parameters,
        "bytes": result.artifact_bytes,
        "tokens": result.tokens,
        "train_rows": finished.run.data.train.rows_kept,
        "learning_rate": recipe.training.learning_rate,
    }


def row_seconds(job: Job, concluded: float, trained: float, steps: int) -> float:
    """Seconds of evaluating one row: a share of the evaluation, but at most FORWARD_SHARE of those of training on it."""
    rows = len(job.data.eval)
    found = concluded / max(1, rows if rows >= FEW else rows + ALIKE)
    seen = steps * job.plan.global_batch_size
    runs_body = (
        job.train_data.collate.sizes_batches and "precomputed" not in job.train_data.facts
    )  # else training sees cached states
    return min(found, FORWARD_SHARE * trained / seen) if seen and runs_body else found


def artifact_bytes(trainable: int, total: int, job: Job) -> int:
    """The size of what is saved, estimated: an adapter is its trainable parameters."""
    adapter = hasattr(job.published, "peft_config")
    width = next(job.published.parameters()).element_size()
    return int((4 * trainable) if adapter else width * total)


def scores_of(recipe: Recipe, spec: Spec) -> dict[str, Any]:
    """The metric on the rows for choosing, its loss, and how many rows these are."""
    quality = choosing.quality_of(recipe, spec.in_bytes)
    columns = intervals.read_rows(Path(recipe.output_dir).expanduser())
    if quality.below not in columns:
        raise UserError(
            "data: losses per token are not comparable across tokenizers, and the tokens of this one have no defined bytes; "
            "leave out the strategies with a new tokenizer (--strategies)"
        )
    places = choosing.places(columns["row"], spec.choosing, spec.seed)
    return choosing.score(columns, quality, places) | {"held_out": len(columns["row"])}


def wait_for(folder: Path) -> None:
    """Wait until an earlier process has released the folder of a run."""
    import fcntl

    file, until = folder / output_dir.LOCK, time.monotonic() + WAIT
    while file.is_file():
        with file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > until:
                    return  # `output_dir.claim` reports it
        time.sleep(0.2)


def run_final(spec: Spec) -> dict[str, Any]:
    """Finish the winner as an ordinary run: evaluate, save, verify, report and card; then measure it on other rows."""
    started = time.monotonic()
    loaded = load_recipe(spec.source, spec.overrides, spec.text)
    folder = Path(loaded.recipe.output_dir).expanduser()
    wait_for(folder)
    if report.status(folder) != "done" or not same_recipe(folder, loaded.recipe.model_dump()):
        output_dir.clear(folder)
        if spec.checkpoint is not None:
            adopt(Path(spec.checkpoint), folder, loaded.recipe.model_dump())

        def add_measured(job: Job) -> None:
            job.known_sums = Path(spec.measured) if spec.measured else None

        train.run(loaded, before_training=add_measured)
    finished = time.monotonic() - started
    answer: dict[str, Any] = {"run_seconds": finished}
    if spec.others is not None:
        file = folder / ON_OTHERS
        evaluate.evaluate(evaluate.Request(str(folder), data=spec.others, overrides=[*ONLY_ROWS], output=str(file)))
        metric = choosing.quality_of(loaded.recipe, spec.in_bytes).metric
        found = read_json(file)["measured"][ROWS]
        answer |= {"others": found["after"][metric], "other_rows": found["rows"]}
    return answer | {"seconds": time.monotonic() - started}


def same_recipe(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the finished run in a folder is that of this recipe."""
    found = report.read(folder)
    return found is not None and found.run.recipe.model_dump() == recipe


def adopt(checkpoint: Path, folder: Path, recipe: dict[str, Any]) -> None:
    """Link a cooled checkpoint into the folder of the result, as one of its recipe."""
    target = folder / checkpoint.name
    target.mkdir(parents=True)
    for file in (path for path in checkpoint.rglob("*") if path.is_file() and path.name != checkpoints.MARKER):
        place = target / file.relative_to(checkpoint)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # another file system
            shutil.copyfile(file, place)
    retitle(target, recipe, checkpoints.state_of(checkpoint))


def retitle(checkpoint: Path, recipe: dict[str, Any], state: dict[str, Any]) -> None:
    """Mark a checkpoint as one of another recipe; `state` is that of its marker."""
    kept = {key: value for key, value in state.items() if key not in ("sizes", "sha256", "digest")}
    checkpoints.mark_complete(checkpoint, kept | {"recipe": recipe, "steps": recipe["training"]["max_steps"]})


KINDS = {"rung": run_rung, "direct": run_direct, "final": run_final}


def run_job(file: Path) -> None:
    """Run the job of a JSON file and write its answer, also if it fails."""
    spec = Spec(**json.loads(file.read_text(encoding="utf-8")))
    answer: dict[str, Any]
    try:
        answer = {"status": "done"} | KINDS[spec.kind](spec)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        ended: RunError = named(error)
        answer = {"status": "failed", "code": ended.code, "sentence": str(ended)}
        write(Path(spec.result), answer)
        raise
    write(Path(spec.result), answer)
