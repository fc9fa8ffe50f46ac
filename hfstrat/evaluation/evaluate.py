"""`hfstrat evaluate`: load, measure, compare, print. Under a launcher: `python -m hfstrat.evaluation.evaluate REQUEST`."""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.evaluation.request import Request

if TYPE_CHECKING:
    from rich.console import Console

    from hfstrat.evaluation.forward import Runner, Subject
    from hfstrat.evaluation.intervals import Measurement
    from hfstrat.recipe.schema import Recipe

PROGRAM = "hfstrat.evaluation.evaluate"


def evaluate(request: Request) -> dict[str, Any] | None:
    """Measure and print what was requested.

    Returns:
        The report on the main process, None on the others.

    Raises:
        UserError: models or examples that cannot be read, or that do not match.
    """
    recipe = request.check()
    from hfstrat.errors import quiet_libraries

    quiet_libraries()
    from hfstrat.evaluation.suite import Suite
    from hfstrat.trainer.distributed import join_world, leave_world
    from hfstrat.trainer.progress import make_console

    world, started = join_world(), time.monotonic()
    screen, rows = make_console(world.is_main_process), Rows(request, recipe)
    found: dict[str, dict[str, Measurement]] = {"before": {}, "after": {}}
    answers: dict[str, list[str]] = {}
    for side, target in (("after", request.target), ("before", request.base())):
        if target is not None:
            subject = load(target, quantization_form(request, recipe, side), recipe.model.dtype)  # the same precision for both
            data = rows.for_model(subject)
            suite = Suite(recipe.evaluation, data, recipe.seed)
            found[side] = suite.measure(subject, make_runner(subject, recipe, screen, world))
            answers[side] = rows.answers(subject, data) if world.is_main_process else []
            del subject, data
            gc.collect()  # models contain reference cycles
    leave_world()
    if not world.is_main_process:
        return None
    report = build_report(request, recipe, found, rows.side_by_side(answers), world.num_processes)
    report["seconds"] = time.monotonic() - started
    if request.output:
        Path(request.output).write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    show(report, screen, recipe)
    return report


def quantization_form(request: Request, recipe: Recipe, side: str) -> str:
    """The requested form; for `recorded`, the other model gets that of the run."""
    section = recipe.model.quantization
    return section.name if section and side == "before" and request.quantization == "recorded" else request.quantization


def load(target: str, form: str, dtype: str) -> Subject:
    """A model with its tokenizer, ready for inference."""
    from hfstrat.evaluation.forward import Subject
    from hfstrat.tasks import artifact

    model, tokenizer, _ = artifact.load(target, form, dtype)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return Subject.from_model(model, tokenizer, artifact.task_of(target))


def make_runner(subject: Subject, recipe: Recipe, screen: Console, world: Any) -> Runner:
    """A runner of forward passes in the precision of the weights, without autocast."""
    import torch

    from hfstrat.evaluation.forward import Runner

    tokens = recipe.evaluation.batch_tokens
    return Runner(subject.device, torch.float32, screen, tokens, world.num_processes, world.process_index)


@dataclass
class Rows:
    """The examples to evaluate on, tokenized for each model; models with the same vocabulary share them."""

    request: Request
    recipe: Recipe
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
            shares = subject.tokenizer.get_vocab() == self.first.tokenizer.get_vocab()
            data = self.data if shares else self._read(subject)
            subject.tokenizer = self.first.tokenizer if shares else subject.tokenizer
        if data is not None and hasattr(subject.inner, "base_model"):
            check_context(subject.inner, int(max(data.eval_lengths)))
        return data

    def _check_same(self, subject: Subject) -> None:
        known = getattr(self.data, "label_names", ())
        if subject.task.name != self.first.task.name:
            raise UserError(f"--against: the task is {subject.task.name}, but {self.first.task.name} for {self.request.target}")
        if known and tuple(subject.inner.config.id2label[index] for index in sorted(subject.inner.config.id2label)) != known:
            raise UserError(f"--against: the labels differ from those of {self.request.target}; name another classifier")

    def _read(self, subject: Subject) -> Any:
        from hfstrat.data.splits import held_out
        from hfstrat.tasks.artifact import resolve

        recipe, rows = self.recipe, subject.task.rows
        if not self.request.data and not resolve(self.request.target)[1]:
            return None
        wanted = recipe.evaluation
        if self.request.data:
            return rows.prepare_eval(
                recipe.data, subject.tokenizer, subject.inner.config, wanted.rows_to_answer, wanted.max_rows
            )
        return rows.prepare(
            recipe.data, subject.tokenizer, recipe.seed, wanted.rows_to_answer, wanted.max_rows, held_out(recipe, rows.reader)
        )

    @property
    def prompts(self) -> list[Any]:
        wanted = self.recipe.evaluation
        samples = self.data.samples[: wanted.samples] if self.data is not None else []
        return wanted.prompts or [sample["prompt"] for sample in samples]

    def answers(self, subject: Subject, data: Any) -> list[str]:
        """The model's answers to the prompts."""
        import torch

        from hfstrat.data.render import Renderer

        given: Any = data if data is not None else SimpleNamespace(renderer=Renderer(subject.tokenizer, "auto"))
        length = self.recipe.evaluation.max_new_tokens
        return [subject.task.text.predict(subject.model, given, prompt, length, torch.float32) for prompt in self.prompts]

    def side_by_side(self, answers: dict[str, list[str]]) -> list[dict[str, str]]:
        references = (
            [] if self.recipe.evaluation.prompts else [sample["reference"] for sample in getattr(self.data, "samples", [])]
        )
        rows = []
        for index, prompt in enumerate(self.prompts):
            row = {"prompt": self.first.task.text.prompt(prompt), **{side: texts[index] for side, texts in answers.items()}}
            rows.append(row | ({"reference": references[index]} if references else {}))
        return rows


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
    from hfstrat.evaluation.suite import ROWS
    from hfstrat.tasks import TASKS
    from hfstrat.trainer import progress

    progress.show_answers(screen, report["answers"])
    measured = report.get("measured", {})
    for line in table.lines(measured, report["against"] or "", report["target"]):
        screen.print(line, markup=False)
    details = measured.get(ROWS, {}).get("details", {})
    for line in (*table.label_table(details), *TASKS[recipe.task].text.details(details)):
        screen.print(line, markup=False)


def main() -> None:
    """The entry point under a launcher; ends the process with an exit code."""
    from hfstrat.trainer import signals

    with signals.report_exit():
        evaluate(Request(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
