"""Libraries and files that a measure needs, looked for before anything is loaded.

What `hfstrat evaluate` was asked for: whose recipe, which rows, which measures. Checked before torch is imported."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.recipe.evaluation import Evaluation
from hfstrat.recipe.load import Answers, apply_override
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import artifact, task_of_files
from hfstrat.tasks.artifact import check_output, resolve

LIBRARIES = {"rouge": "rouge_score", "chrf": "sacrebleu"}


def check(wanted: Evaluation) -> None:
    """Raises UserError: a library that is not installed, or a file that is not there."""
    from hfstrat.data import sources

    for metric, library in LIBRARIES.items():
        if metric in wanted.metrics:
            _installed(library, f"evaluation.metrics: {metric}")
    if wanted.lm_eval:
        _installed("lm_eval", "evaluation.lm_eval")
    for name in wanted.lm_eval:
        if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_file():
            raise UserError(f"evaluation.lm_eval: {name}: no such file; expected the name of a task, or its YAML file")
    if wanted.include_path and not Path(wanted.include_path).expanduser().is_dir():
        raise UserError(f"evaluation.include_path: {wanted.include_path}: no such folder")
    files = [("choices", file) for file in wanted.choices]
    if wanted.control not in ("auto", "off"):
        files.append(("control", wanted.control))
    for key, file in files:
        if sources.local_file(file, f"evaluation.{key}") is None:
            raise UserError(f"evaluation.{key}: {file}: no such file; expected a local file with rows")


def _installed(library: str, key: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{key}: it needs {library}, which is not installed: pip install 'hfstrat[eval]'")


SECTIONS = ("data", "evaluation", "seed")  # what may be set on the command line


OWN_ROWS = {"eval": None, "eval_split": None, "config": None, "revision": None, "split": "train", "documents": "lines"}


@dataclass(frozen=True)
class Request:
    """The command line, as it is handed to other processes.

    Args:
        target: a run, an adapter, a model.
        against: another one, or `base`.
        data: rows to evaluate on instead of the run's own.
        overrides: `key=value` of the sections `data`, `evaluation` and `seed`.
        output: where the JSON goes.
        quantization: the form in which models are loaded (`forms.FORMS`); recorded is that of the run, and of its base in it.
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
        """Whether the rows are the run's own."""
        return self.data is None

    def recipe(self) -> Recipe:
        """The run's recipe (or a plain one for a model), with what was asked for.

        Raises:
            UserError: a setting that does not exist or does not fit, with what to write.
        """
        folder, report = resolve(self.target)
        given: dict[str, Any] = dict(report["run"]["recipe"]) if report else _plain(self.target, folder)
        if self.data is not None:
            given["data"] = {**given["data"], **OWN_ROWS, "train": self.data}
        origins: dict[tuple[str, ...], str] = {}
        for override in self.overrides:
            if override.partition("=")[0].split(".")[0] not in SECTIONS:
                raise UserError(f"evaluate: {override}: only data.*, evaluation.* and seed can be set here")
            apply_override(override, given, origins)
        try:
            return Recipe.model_validate(given)
        except ValidationError as error:
            raise UserError("\n".join(Answers(origins, "evaluate", None).to(error.errors()))) from None

    def base(self) -> str | None:
        """What `against` names: `base` is what the run or the adapter was made from.

        Raises:
            UserError: there is none, or it is a .gguf file.
        """
        if self.against != "base":
            return self.against
        folder, report = resolve(self.target)
        adapter = read_json(Path(folder) / "adapter_config.json") if Path(folder).is_dir() else {}
        named = report["run"]["recipe"]["model"]["name_or_path"] if report else adapter.get("base_model_name_or_path")
        if not named:
            raise UserError(f"--against base: {self.target} began from no other model, or does not say from which; name one")
        if str(named).endswith(".gguf"):
            raise UserError(f"--against base: {named} is a GGUF file; name a model folder or a Hub id")
        return str(named)

    def _check_form(self, target: str) -> None:
        folder, report = resolve(target)
        artifact.check(self.quantization, folder, report.get("result", {}).get("reload", {}).get("quantization"))

    def check(self) -> Recipe:
        """Refuse what can be known to be wrong. Raises UserError."""
        recipe, report = self.recipe(), resolve(self.target)[1]
        check_output(Path(self.output) if self.output else None)
        self._check_form(self.target)
        if against := self.base():
            self._check_form(against)
        task, wanted = artifact.task_of(self.target), recipe.evaluation
        task.check(recipe)
        if self.data is not None or report:
            _check_rows(recipe, self)
        elif not task.generates:
            raise UserError(f"evaluate: {self.target} is a classifier and no run: name rows with labels by --data FILE")
        elif wanted.metrics:
            raise UserError("evaluation.metrics: they need rows with prompts and answers: name some by --data FILE")
        check(wanted)
        if not (self.data or report or wanted.choices or wanted.lm_eval) and wanted.control == "off":
            raise UserError("evaluate: nothing to measure; give --data FILE, --choices FILE or --lm-eval TASK")
        return recipe


def _plain(target: str, folder: str) -> dict[str, Any]:
    task = task_of_files(folder).name
    return {"task": task, "model": {"name_or_path": target}, "strategy": "full", "data": {"train": "-"}, "output_dir": "-"}


def _check_rows(recipe: Recipe, request: Request) -> None:
    from hfstrat.data import sources

    key = "--data" if request.data else "data.train"
    for source in recipe.data.train:
        sources.local_files(source.path, key)
