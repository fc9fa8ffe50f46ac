"""`hfstrat evaluate`: the request and its checks before torch is imported; load, measure, compare, print.

Under a launcher: `python -m hfstrat.evaluation.evaluate REQUEST`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from hfstrat.data import sources
from hfstrat.data.label_names import sources_of
from hfstrat.errors import UserError, quiet_libraries
from hfstrat.models.load import read_json
from hfstrat.objectives import Objective, objective_of, task_of
from hfstrat.recipe.data import SHUFFLE_BUFFER
from hfstrat.recipe.load import Answers, apply_override
from hfstrat.recipe.schema import Evaluation, Recipe
from hfstrat.tasks import artifact, task_of_files
from hfstrat.tasks.artifact import check_output, resolve
from hfstrat.tasks.heads import names_of

if TYPE_CHECKING:
    from rich.console import Console

    from hfstrat.evaluation.forward import Subject
    from hfstrat.evaluation.intervals import Measurement
    from hfstrat.trainer.train_data import TrainData

EVAL_BATCH = 8  # pairs of a pass through a reference, where no run says how many
LIBRARIES = {"rouge": "rouge_score", "chrf": "sacrebleu"}


def check_measurements(wanted: Evaluation) -> None:
    """Refuse measurements whose library is not installed or whose file does not exist. Raises UserError: what is missing."""
    for metric, library in LIBRARIES.items():
        if metric in wanted.metrics:
            _installed(library, f"evaluation.metrics: {metric}")
    if wanted.lm_eval:
        _installed("lm_eval", "evaluation.lm_eval")
    for name in wanted.lm_eval:
        if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_file():
            raise UserError(f"evaluation.lm_eval: {name}: no such file; expected the name of a task or its YAML file")
    if wanted.include_path and not Path(wanted.include_path).expanduser().is_dir():
        raise UserError(f"evaluation.include_path: {wanted.include_path}: no such folder")
    control = [("control", wanted.control)] if wanted.control not in ("auto", "off") else []
    for key, file in [*(("choices", file) for file in wanted.choices), *control]:
        if sources.local_file(file, f"evaluation.{key}") is None:
            raise UserError(f"evaluation.{key}: {file}: no such file; expected a local file with examples")


def _installed(library: str, key: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{key}: this needs {library}, which is not installed: pip install 'hfstrat[eval]'")


SECTIONS = ("data", "evaluation", "seed")  # may be set on the command line
UNTRAINED = {"strategy": "full", "data": {"train": "-"}, "output_dir": "-"}  # of the recipe for a model that no run trained
ONE_FILE: dict[str, Any] = {  # of the section data, besides `train`
    "eval": None,
    "eval_split": None,
    "config": None,
    "revision": None,
    "split": "train",
    "documents": "lines",
    "streaming": False,
    "shuffle_buffer": SHUFFLE_BUFFER,
    "bad_rows": "error",
}


@dataclass(frozen=True)
class Request:
    """The command line, in a form that is passed to other processes."""

    target: str  # a run, an adapter or a model
    against: str | None = None  # another one, or `base`
    data: str | None = None  # a file of examples to evaluate on instead of the run's own
    overrides: list[str] = field(default_factory=list)  # `key=value` of the sections `data`, `evaluation` and `seed`
    output: str | None = None  # the path of the JSON report
    quantization: str = "recorded"  # a form of `artifact.FORMS`; `recorded` is that of the run, also for its base

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def recipe(self) -> Recipe:
        """The run's recipe (or a default one for a model) with the overrides. Raises UserError for a wrong setting."""
        folder, report = resolve(self.target)
        given: dict[str, Any] = {"task": task_of_files(folder).name, "model": {"name_or_path": self.target}} | UNTRAINED
        if report:
            given = report.run.recipe.model_dump()
        if self.data is not None:
            given["data"] = {**given["data"], **ONE_FILE, "train": self.data}
        origins: dict[tuple[str, ...], str] = {}
        for override in self.overrides:
            if override.partition("=")[0].split(".")[0] not in SECTIONS:
                raise UserError(f"evaluate: {override}: only data.*, evaluation.* and seed can be set here")
            apply_override(override, given, origins)
        try:
            return Recipe.model_validate(given)
        except ValidationError as error:
            raise UserError("\n".join(Answers(origins, "evaluate", given).to(error.errors()))) from None

    def base(self) -> str | None:
        """The model that `against` names, or the base of the target. Raises UserError if it is unknown or a .gguf file."""
        if self.against != "base":
            return self.against
        folder, report = resolve(self.target)
        adapter = read_json(Path(folder) / "adapter_config.json") if Path(folder).is_dir() else {}
        named = report.run.recipe.model.name_or_path if report else adapter.get("base_model_name_or_path")
        if not named:
            raise UserError(f"--against base: {self.target} has no base model, or does not record it; name a model")
        if str(named).endswith(".gguf"):
            raise UserError(f"--against base: {named} is a GGUF file; expected a model folder or a Hub id")
        return str(named)

    def _check_form(self, target: str) -> None:
        folder, report = resolve(target)
        artifact.check(self.quantization, folder, report.reload.get("quantization") if report else None)

    def _check_page(self) -> None:
        """Refuse an output whose page would replace a file. Raises UserError."""
        if not self.output:
            return
        page = Path(self.output).with_suffix(".html")
        if page == Path(self.output):
            raise UserError(f"--json: {self.output} is the name of the page beside it; name a file that ends in .json")
        if page.exists():
            raise UserError(f"--json: {page}, the page beside {self.output}, exists already; name another file")

    def check(self) -> Recipe:
        """The recipe of the request, after all checks that need no model. Raises UserError."""
        recipe, report = self.recipe(), resolve(self.target)[1]
        check_output(Path(self.output) if self.output else None)
        self._check_page()
        self._check_form(self.target)
        if against := self.base():
            self._check_form(against)
        task, wanted = artifact.task_of(self.target), recipe.evaluation
        task.check(recipe)
        self._check_objective(recipe)
        rows = (task_of(recipe) if recipe.task == task.name else task).rows
        if self.data is not None or report:
            for source in recipe.data.train:
                key = "--data" if self.data else "data.train"
                if not (sources.is_local(source.path) and rows.check_source(source, recipe.data, key)):
                    sources.local_files(source.path, key)
        elif not task.text.generates:
            raise UserError(
                f"evaluate: {self.target} is a classifier, not a run with its own data; name labeled examples with --data FILE"
            )
        elif wanted.metrics:
            raise UserError("evaluation.metrics: these need prompts with answers; name a file of them with --data FILE")
        check_measurements(wanted)
        if not (self.data or report or wanted.choices or wanted.lm_eval) and wanted.control == "off":
            raise UserError("evaluate: nothing to measure; add --data FILE, --choices FILE or --lm-eval TASK")
        return recipe

    def _check_objective(self, recipe: Recipe) -> None:
        """Raises UserError where the rows or the reference of the objective cannot be those of the run."""
        objective_of(recipe).check(recipe)
        start, model = getattr(recipe.strategy, "adapter", None), recipe.model
        if recipe.objective.has_reference and model.revision and not start and not Path(model.name_or_path).exists():
            raise UserError(
                f"objective: {recipe.objective.name}: the reference is revision {model.revision} of {model.name_or_path}, "
                "which evaluate does not load; the metrics of the end of training are in report.json"
            )


def evaluate(request: Request) -> dict[str, Any] | None:
    """Measure and print what was requested; the main process gets the report, the others None. Raises UserError."""
    recipe = request.check()
    quiet_libraries()
    from hfstrat.evaluation.forward import Runner
    from hfstrat.evaluation.suite import Suite
    from hfstrat.trainer.distributed import join_world, leave_world
    from hfstrat.trainer.progress import make_console

    world, started, wanted = join_world(), time.monotonic(), recipe.evaluation
    screen, rows = make_console(world.is_main_process), Rows(request, recipe, objective_of(recipe))
    found: dict[str, dict[str, Measurement]] = {"before": {}, "after": {}}
    answers: dict[str, list[str]] = {}
    how = Precision.of(request, recipe)
    for side, target in (("after", request.target), ("before", request.base())):
        if target is not None:
            section, form = recipe.model.quantization, request.quantization
            if section and form == "recorded" and side == "before":  # then the other model has the form of the run
                form = section.name
            subject = load(target, form, how.weights, rows.objective)  # the same precision for both
            data, device = rows.for_model(subject), subject.device
            if side == "after":
                data = rows.with_reference(data, how, screen)
            runner = Runner(device, how.forward, screen, wanted.batch_tokens, world.num_processes, world.process_index)
            found[side] = Suite(wanted, data, recipe.seed, rows_at_once=how.rows).measure(subject, runner)
            if side == "after":  # the other model is the reference, or has another one
                found[side] |= rows.of_objective(subject, how, screen)
            answers[side] = rows.answers(subject, data, how.forward) if world.is_main_process else []
            del subject, data
            gc.collect()  # models contain reference cycles
    leave_world()
    if not world.is_main_process:
        return None
    report = build_report(request, recipe, found, rows.side_by_side(answers), world.num_processes)
    report["seconds"] = time.monotonic() - started
    if request.output:
        with artifact.written(Path(request.output)) as file:
            file.write(json.dumps(report, indent=2, default=str) + "\n")
    show(report, screen, recipe)
    if rows.data is not None:
        from hfstrat.data.prepare import few_rows

        for line in [*few_rows(len(rows.data.eval)), *seen_in_training(request)]:
            screen.print(line, markup=False)
    return report


def seen_in_training(request: Request) -> list[str]:
    """A warning where --data is a file that the run was trained on: its numbers say nothing about new examples."""
    report = resolve(request.target)[1]
    if request.data is None or report is None:
        return []
    given, now, before = Path(request.data).expanduser().absolute(), request.recipe().data, report.run.recipe.data
    part = now.of(now.train[0], "split"), now.of(now.train[0], "config")
    same = [source for source in before.train if Path(source.path).expanduser().absolute() == given]
    if part not in [(before.of(source, "split"), before.of(source, "config")) for source in same]:
        return []
    return [
        f"{'warning':<9} --data: {request.data} is training data of this run; it has not seen the rows that it held "
        "out, which are measured without --data"
    ]


class Precision(NamedTuple):
    """How models are measured: a run's result as at the end of training, so that the numbers are the same."""

    weights: str  # the `dtype` of `artifact.load`
    forward: Any  # the torch.dtype of forward passes: autocast, unless it is float32
    rows: int | None  # evaluation examples of a pass; None: as many as evaluation.batch_tokens allows

    @classmethod
    def of(cls, request: Request, recipe: Recipe) -> Precision:
        import torch

        from hfstrat.models.load import compute_dtype

        folder, report = resolve(request.target)
        if report is None:  # in the precision of the weights
            return cls(recipe.model.dtype, torch.float32, None)
        # an adapter is measured on its base in the precision of forward passes, other models are as they are stored
        stored = recipe.model.dtype if (Path(folder) / "adapter_config.json").is_file() else "checkpoint"
        return cls(stored, compute_dtype(recipe.model.dtype), report.finished.plan.eval_batch)


def load(target: str, form: str, dtype: str, objective: Objective | None = None) -> Subject:
    """A model with its tokenizer, ready for inference; measured as this objective does, by default as its task."""
    from hfstrat.evaluation.forward import Subject

    model, tokenizer, _ = artifact.load(target, form, dtype)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    task = artifact.task_of(target)
    return Subject.from_model(model, tokenizer, objective.task if objective and objective.task.name == task.name else task)


@dataclass
class Rows:
    """The examples to evaluate on, tokenized for each model; models with the same vocabulary share them."""

    request: Request
    recipe: Recipe
    objective: Objective
    first: Any = None  # task and tokenizer of the target, which the other model is compared with
    data: Any = None

    def for_model(self, subject: Subject) -> Any:
        """The prepared examples; None if there are none.

        Raises:
            UserError: examples longer than the model's context, or models with different tasks or labels.
        """
        from hfstrat.models.load import check_context

        if self.first is None:
            self.first, self.data = SimpleNamespace(task=subject.task, tokenizer=subject.tokenizer), self._read(subject)
            data = self.data
        else:
            self._check_same(subject)
            shares = subject.task.rows.same_inputs(subject.tokenizer, self.first.tokenizer)
            data = self.data if shares else self._read(subject)
            subject.tokenizer = self.first.tokenizer if shares else subject.tokenizer
        if data is not None and hasattr(subject.inner, "base_model"):
            check_context(subject.inner, subject.task.rows.longest(data), answers=subject.task.rows.answer_tokens)
        return data

    def with_reference(self, data: Any, how: Precision, screen: Console) -> Any:
        """The examples with the outputs of the objective's reference: the model that the run started from."""
        if data is None or not self.recipe.objective.has_reference:
            return data
        start = getattr(self.recipe.strategy, "adapter", None) or self.recipe.model.name_or_path
        form = self.recipe.model.quantization.name if self.recipe.model.quantization else "none"
        subject = load(start, form, how.weights, self.objective)
        with subject.measured():
            self.data = self.objective.reference(self.recipe, subject.model, self._batches(subject, data, how, screen), data)
        return self.data

    def of_objective(self, subject: Subject, how: Precision, screen: Console) -> dict[str, Measurement]:
        """What the objective measures beside its metrics, as at the end of training: the divergence from its reference."""
        from hfstrat.evaluation import intervals

        if self.data is None or not self.recipe.objective.has_reference:
            return {}
        with subject.measured():
            return intervals.of_columns(self.objective.measure(subject.model, self._batches(subject, self.data, how, screen)))

    def _batches(self, subject: Subject, data: Any, how: Precision, screen: Console) -> TrainData:
        """The evaluation examples and how they become batches for a model, in the form that objectives take."""
        from hfstrat.trainer.plan import make_plan
        from hfstrat.trainer.train_data import TrainData, multiple_for

        plan = replace(make_plan(self.recipe.training, data.lengths, data.eval_lengths, 1), eval_batch=how.rows or EVAL_BATCH)
        collate = subject.task.rows.collator(subject.base(), data, subject.tokenizer, multiple_for(subject.device))
        return TrainData(data.eval, data.eval, collate, plan, how.forward, subject.device, screen)

    def _check_same(self, subject: Subject) -> None:
        from hfstrat.models.class_outputs import arrange

        known, config = getattr(self.data, "label_names", ()), subject.inner.config
        if subject.task.name != self.first.task.name:
            raise UserError(f"--against: the task is {subject.task.name}, but {self.first.task.name} for {self.request.target}")
        if not known or (theirs := names_of(config)) == list(known):
            return
        sources = sources_of(known, theirs)
        if None in sources or len(theirs) != len(known):
            raise UserError(f"--against: the labels differ from those of {self.request.target}; name another classifier")
        arrange(subject.inner, sources, known)

    def _read(self, subject: Subject) -> Any:
        from hfstrat.data.splits import held_out

        recipe, rows = self.recipe, subject.task.rows
        counts, tokenizer = (recipe.evaluation.rows_to_answer, recipe.evaluation.max_rows), subject.tokenizer
        if self.request.data:
            return rows.prepare_eval(recipe.data, tokenizer, subject.inner.config, *counts)
        if not resolve(self.request.target)[1]:
            return None
        return rows.prepare(recipe.data, tokenizer, recipe.seed, *counts, held_out(recipe, rows.reader))

    @property
    def prompts(self) -> list[Any]:
        wanted = self.recipe.evaluation
        samples = self.data.samples[: wanted.samples] if self.data is not None else []
        return wanted.prompts or [sample["prompt"] for sample in samples]

    def answers(self, subject: Subject, data: Any, dtype: Any) -> list[str]:
        """The model's answers to the prompts."""
        options = self.recipe.data.chat_template_kwargs
        given: Any = (
            data
            if data is not None
            else SimpleNamespace(renderer=subject.task.rows.renderer(subject.tokenizer, "auto", options))
        )
        length = self.recipe.evaluation.max_new_tokens
        return [subject.task.text.predict(subject.model, given, prompt, length, dtype) for prompt in self.prompts]

    def side_by_side(self, answers: dict[str, list[str]]) -> list[dict[str, str]]:
        """The prompts with the answers of each model and, for examples, the references."""
        columns = {"prompt": [self.first.task.text.prompt(prompt) for prompt in self.prompts], **answers}
        if not self.recipe.evaluation.prompts and self.data is not None:
            columns["reference"] = [sample["reference"] for sample in self.data.samples[: len(self.prompts)]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def build_report(
    request: Request, recipe: Recipe, found: dict[str, dict[str, Measurement]], answers: list[dict[str, str]], processes: int
) -> dict[str, Any]:
    """The complete report, for the JSON file."""
    from hfstrat.evaluation.suite import build_report as measurements
    from hfstrat.models import fingerprint

    files = [path for source in recipe.data.train if (path := Path(source.path).expanduser()).is_file()]
    return {
        "target": request.target,
        "against": request.base(),
        **measurements(found["before"], found["after"]),
        "answers": answers,
        "settings": {name: getattr(recipe, name).model_dump() for name in ("data", "evaluation")}
        | {"seed": recipe.seed, "quantization": request.quantization},
        "processes": processes,
        "environment": fingerprint.environment(request.target, None, files),
    }


def show(report: dict[str, Any], screen: Console, recipe: Recipe) -> None:
    """Print the answers side by side, then the metrics."""
    from hfstrat.evaluation import table
    from hfstrat.evaluation.intervals import ROWS
    from hfstrat.trainer import progress

    progress.show_answers(screen, report["answers"])
    measured = report.get("measured", {})
    details = measured.get(ROWS, {}).get("details", {})
    metrics = table.lines(measured, report["against"] or "", report["target"])
    for line in (*metrics, *table.label_table(details), *task_of(recipe).text.details(details)):
        screen.print(line, markup=False)


def main() -> None:
    """The entry point under a launcher; ends the process with an exit code."""
    from hfstrat.trainer import signals

    with signals.report_exit():
        evaluate(Request(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
