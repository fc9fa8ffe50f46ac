"""The request of `hfstrat evaluate`: model, examples and measurements; all of it is checked before torch is imported."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.recipe.load import Answers, apply_override
from hfstrat.recipe.schema import Evaluation, Recipe
from hfstrat.tasks import artifact, task_of_files
from hfstrat.tasks.artifact import check_output, resolve

LIBRARIES = {"rouge": "rouge_score", "chrf": "sacrebleu"}


def check(wanted: Evaluation) -> None:
    """Refuse measurements whose library is not installed or whose file does not exist.

    Raises:
        UserError: what is missing.
    """
    from hfstrat.data import sources

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
    files = [("choices", file) for file in wanted.choices]
    if wanted.control not in ("auto", "off"):
        files.append(("control", wanted.control))
    for key, file in files:
        if sources.local_file(file, f"evaluation.{key}") is None:
            raise UserError(f"evaluation.{key}: {file}: no such file; expected a local file with examples")


def _installed(library: str, key: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{key}: this needs {library}, which is not installed: pip install 'hfstrat[eval]'")


SECTIONS = ("data", "evaluation", "seed")  # may be set on the command line
ONE_FILE = {"eval": None, "eval_split": None, "config": None, "revision": None, "split": "train", "documents": "lines"}


@dataclass(frozen=True)
class Request:
    """The command line, in a form that is passed to other processes.

    Args:
        target: a run, an adapter or a model.
        against: another one, or `base`.
        data: a file of examples to evaluate on instead of the run's own.
        overrides: `key=value` of the sections `data`, `evaluation` and `seed`.
        output: the path of the JSON report.
        quantization: the form in which models are loaded (`artifact.FORMS`); `recorded` is that of the run, also for its base.
    """

    target: str
    against: str | None = None
    data: str | None = None
    overrides: list[str] = field(default_factory=list)
    output: str | None = None
    quantization: str = "recorded"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def is_own(self) -> bool:
        """Whether the examples are the run's own."""
        return self.data is None

    def recipe(self) -> Recipe:
        """The run's recipe (or a default one for a model) with the requested changes.

        Raises:
            UserError: a setting that does not exist or has a wrong value, with the correction.
        """
        folder, report = resolve(self.target)
        given: dict[str, Any] = report.run.recipe.model_dump() if report else _plain(self.target, folder)
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
            raise UserError("\n".join(Answers(origins, "evaluate", None, given).to(error.errors()))) from None

    def base(self) -> str | None:
        """The model that `against` names; `base` is the base model of the run or adapter.

        Raises:
            UserError: the base model is unknown, or a .gguf file.
        """
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

    def check(self) -> Recipe:
        """Check the request and return its recipe.

        Raises:
            UserError: anything that is wrong and can be detected without loading a model.
        """
        recipe, report = self.recipe(), resolve(self.target)[1]
        check_output(Path(self.output) if self.output else None)
        self._check_form(self.target)
        if against := self.base():
            self._check_form(against)
        task, wanted = artifact.task_of(self.target), recipe.evaluation
        task.check(recipe)
        if self.data is not None or report:
            _check_rows(recipe, self)
        elif not task.text.generates:
            raise UserError(
                f"evaluate: {self.target} is a classifier, not a run with its own data; name labeled examples with --data FILE"
            )
        elif wanted.metrics:
            raise UserError("evaluation.metrics: these need prompts with answers; name a file of them with --data FILE")
        check(wanted)
        if not (self.data or report or wanted.choices or wanted.lm_eval) and wanted.control == "off":
            raise UserError("evaluate: nothing to measure; add --data FILE, --choices FILE or --lm-eval TASK")
        return recipe


def _plain(target: str, folder: str) -> dict[str, Any]:
    task = task_of_files(folder).name
    return {"task": task, "model": {"name_or_path": target}, "strategy": "full", "data": {"train": "-"}, "output_dir": "-"}


def _check_rows(recipe: Recipe, request: Request) -> None:
    from hfstrat.data import sources

    key = "--data" if request.data else "data.train"
    for source in recipe.data.train:
        sources.local_files(source.path, key)
