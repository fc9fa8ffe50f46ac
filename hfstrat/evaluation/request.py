"""What `hfstrat evaluate` was asked for: whose recipe, which rows, which measures. Checked before torch is imported."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfstrat import forms
from hfstrat.config import Recipe
from hfstrat.errors import UserError
from hfstrat.evaluation import needs
from hfstrat.loading import Answers, apply_override
from hfstrat.model import read_json
from hfstrat.tasks import TASKS, of_artefact
from hfstrat.use import check_output, resolve

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
        forms.check(self.quantization, folder, report.get("result", {}).get("reload", {}).get("quantization"))

    def check(self) -> Recipe:
        """Refuse what can be known to be wrong. Raises UserError."""
        recipe, (folder, report) = self.recipe(), resolve(self.target)
        check_output(Path(self.output) if self.output else None)
        self._check_form(self.target)
        if against := self.base():
            self._check_form(against)
        task, wanted = of_artefact(folder, report["run"]["recipe"] if report else {}), recipe.evaluation
        TASKS[task.name].check(recipe)
        if self.data is not None or report:
            _check_rows(recipe, self)
        elif not task.generates:
            raise UserError(f"evaluate: {self.target} is a classifier and no run: name rows with labels by --data FILE")
        elif wanted.metrics:
            raise UserError("evaluation.metrics: they need rows with prompts and answers: name some by --data FILE")
        needs.check(wanted)
        if not (self.data or report or wanted.choices or wanted.lm_eval) and wanted.control == "off":
            raise UserError("evaluate: nothing to measure; give --data FILE, --choices FILE or --lm-eval TASK")
        return recipe


def _plain(target: str, folder: str) -> dict[str, Any]:
    task = of_artefact(folder, {}).name
    return {"task": task, "model": {"name_or_path": target}, "strategy": "full", "data": {"train": "-"}, "output_dir": "-"}


def _check_rows(recipe: Recipe, request: Request) -> None:
    from hfstrat.data import sources

    key = "--data" if request.data else "data.train"
    for source in recipe.data.train:
        sources.local_files(source.path, key)
