"""`hfstrat evaluate`: load, measure, compare, show. Under a launcher `python -m hfstrat.evaluation.evaluate REQUEST`."""

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
    from hfstrat.evaluation.intervals import Found
    from hfstrat.recipe.schema import Recipe

PROGRAM = "hfstrat.evaluation.evaluate"


def evaluate(request: Request) -> dict[str, Any] | None:
    """Measure what was asked for; the first process prints it and gets the report, the others None.

    Raises:
        UserError: a model or rows that cannot be read, or that do not go together.
    """
    recipe = request.check()
    from hfstrat.errors import quiet_libraries

    quiet_libraries()
    from hfstrat.evaluation.suite import Suite
    from hfstrat.trainer.distributed import join_world, leave_world
    from hfstrat.trainer.progress import make_console

    world, started = join_world(), time.monotonic()
    screen, rows = make_console(world.is_main_process), Rows(request, recipe)
    found: dict[str, dict[str, Found]] = {"before": {}, "after": {}}
    said: dict[str, list[str]] = {}
    for side, target in (("after", request.target), ("before", request.base())):
        if target is not None:
            subject = load(target, form_of(request, recipe, side), recipe.model.dtype)  # both in one precision
            data = rows.of(subject)
            suite = Suite(recipe.evaluation, data, recipe.seed)
            found[side] = suite.measure(subject, runner_of(subject, recipe, screen, world))
            said[side] = rows.answers(subject, data) if world.is_main_process else []
            del subject, data
            gc.collect()  # a model sits in reference cycles
    leave_world()
    if not world.is_main_process:
        return None
    whole = whole_of(request, recipe, found, rows.side_by_side(said), world.num_processes)
    whole["seconds"] = time.monotonic() - started
    if request.output:
        Path(request.output).write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")
    show(whole, screen, recipe)
    return whole


def form_of(request: Request, recipe: Recipe, side: str) -> str:
    """As asked for; else as recorded, and the other model in that of the run."""
    bits = recipe.model.quantization
    return bits.name if bits and side == "before" and request.quantization == "recorded" else request.quantization


def load(target: str, form: str, dtype: str) -> Subject:
    """The model with its tokenizer, as it is used for inference."""
    from hfstrat.evaluation.forward import Subject
    from hfstrat.tasks import artifact

    model, tokenizer, _ = artifact.load(target, form, dtype)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return Subject.of(model, tokenizer, artifact.task_of(target))


def runner_of(subject: Subject, recipe: Recipe, screen: Console, world: Any) -> Runner:
    """Forward passes with the weights as they are, without autocast."""
    import torch

    from hfstrat.evaluation.forward import Runner

    tokens = recipe.evaluation.batch_tokens
    return Runner(subject.device, torch.float32, screen, tokens, world.num_processes, world.process_index)


@dataclass
class Rows:
    """The rows to evaluate on, for each model as its tokenizer has them; models of one vocabulary share them."""

    request: Request
    recipe: Recipe
    first: Any = None  # the target, as far as the other model has to know it: task, tokenizer
    data: Any = None

    def of(self, subject: Subject) -> Any:
        """The rows, None where there are none.

        Raises:
            UserError: rows longer than the model's context, or models of different tasks or labels.
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
            raise UserError(f"--against: it is for {subject.task.name}, and {self.request.target} for {self.first.task.name}")
        if known and tuple(subject.inner.config.id2label[index] for index in sorted(subject.inner.config.id2label)) != known:
            raise UserError(f"--against: its labels are not those of {self.request.target}; name a classifier of the same ones")

    def _read(self, subject: Subject) -> Any:
        from hfstrat.data.corpus import held_out
        from hfstrat.tasks.artifact import resolve

        recipe, task = self.recipe, subject.task
        if not self.request.data and not resolve(self.request.target)[1]:
            return None
        wanted = recipe.evaluation
        if self.request.data:
            return task.held(recipe.data, subject.tokenizer, subject.inner.config, wanted.rows_to_answer, wanted.max_rows)
        return task.prepare(
            recipe.data, subject.tokenizer, recipe.seed, wanted.rows_to_answer, wanted.max_rows, held_out(recipe, task.reader)
        )

    @property
    def prompts(self) -> list[Any]:
        wanted = self.recipe.evaluation
        samples = self.data.samples[: wanted.samples] if self.data is not None else []
        return wanted.prompts or [sample["prompt"] for sample in samples]

    def answers(self, subject: Subject, data: Any) -> list[str]:
        """What the model says to the prompts."""
        import torch

        from hfstrat.data.render import Renderer

        given: Any = data if data is not None else SimpleNamespace(renderer=Renderer(subject.tokenizer, "auto"))
        length = self.recipe.evaluation.max_new_tokens
        return [subject.task.answer(subject.model, given, prompt, length, torch.float32) for prompt in self.prompts]

    def side_by_side(self, said: dict[str, list[str]]) -> list[dict[str, str]]:
        references = (
            [] if self.recipe.evaluation.prompts else [sample["reference"] for sample in getattr(self.data, "samples", [])]
        )
        rows = []
        for index, prompt in enumerate(self.prompts):
            row = {"prompt": self.first.task.prompt_text(prompt), **{side: texts[index] for side, texts in said.items()}}
            rows.append(row | ({"reference": references[index]} if references else {}))
        return rows


def whole_of(
    request: Request, recipe: Recipe, found: dict[str, dict[str, Found]], answers: list[dict[str, str]], processes: int
) -> dict[str, Any]:
    """Everything, for the JSON."""
    from hfstrat.evaluation.suite import report_of
    from hfstrat.models import fingerprint

    files = [path for source in recipe.data.train if (path := Path(source.path).expanduser()).is_file()]
    return {
        "target": request.target,
        "against": request.base(),
        **report_of(found["before"], found["after"]),
        "answers": answers,
        "settings": {name: getattr(recipe, name).model_dump() for name in ("data", "evaluation")}
        | {"seed": recipe.seed, "quantization": request.quantization},
        "processes": processes,
        "environment": fingerprint.environment(request.target, None, files),
    }


def show(whole: dict[str, Any], screen: Console, recipe: Recipe) -> None:
    """Samples side by side, then the numbers."""
    from hfstrat.evaluation import table
    from hfstrat.evaluation.suite import ROWS
    from hfstrat.tasks import TASKS
    from hfstrat.trainer import progress

    progress.show_answers(screen, whole["answers"])
    measured = whole.get("measured", {})
    for line in table.lines(measured, whole["against"] or "", whole["target"]):
        screen.print(line, markup=False)
    details = measured.get(ROWS, {}).get("details", {})
    for line in (*table.by_label(details), *TASKS[recipe.task].table(details)):
        screen.print(line, markup=False)


def main() -> None:
    """Entry under a launcher; ends with the exit code."""
    from hfstrat.trainer import exit_status

    with exit_status.reported():
        evaluate(Request(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
