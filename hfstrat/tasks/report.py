"""`report.json` as a typed model: what ran, on which machine and data, and what came out of it. No torch.

The model lives here, below all of its readers (loading of results, strategies, publish, run, comparison, advisor, cli);
`hfstrat.run.report` builds and summarizes it. Its parts are in `report_parts.py`.
`read` also reads the reports of earlier versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator

from hfstrat.errors import UserError
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.stored import upgraded
from hfstrat.tasks.report_parts import (
    Answer,
    Baselines,
    ClassifierHead,
    Comparison,
    DataStatistics,
    Details,
    Distillation,
    Environment,
    HubCommit,
    LoggedLoss,
    Measured,
    Mistake,
    Overfitting,
    Part,
    Plan,
    Point,
    Precomputed,
    Predicted,
    Quantized,
    Reference,
    SimpleModel,
    Speed,
    Verified,
    VisionFeatures,
    optional,
)

FILE = "report.json"
SCHEMA_VERSION = 1


class Run(Part):
    """What was asked for."""

    recipe: Recipe = Field(description="The resolved recipe")
    source: str | None = Field(None, description="The file that the recipe was read from")
    origins: dict[str, str] = Field({}, description="Where each value that is not a plain default was set")
    data: DataStatistics | None = optional("None where the run ended before the data were read")

    @field_validator("recipe", mode="before")
    @classmethod
    def _todays_names(cls, value: Any) -> Any:
        return upgraded(value) if isinstance(value, dict) else value

    @property
    def strategy(self) -> str:
        """The strategy in words: 'lora', 'distill/full', 'peft IA3'."""
        student = getattr(self.recipe.strategy, "student", None)
        return self.recipe.strategy.title + (f"/{student.name}" if student else "")


class Result(Part):
    """What came out of a finished run."""

    status: Literal["done"] = "done"
    metrics_before: dict[str, float] | None = Field(None, description="Evaluation metrics before training")
    metrics_after: dict[str, float] = Field(description="Evaluation metrics of the result")
    evaluation: Details | None = optional("The metrics of the result in detail")
    mistakes: list[Mistake] | None = optional("Of a task with a head: the evaluation examples that are most wrong")
    predicted: Predicted | None = optional("Of a run that was started by `hfstrat train`")
    steps: int
    session_steps: int | None = Field(None, description="Steps since the last resume")
    best_step: int | None = Field(None, description="The step of the best evaluation, whose weights are the result")
    resumed_from: str | None = Field(None, description="The checkpoint that training was resumed from")
    setup_seconds: float = 0.0
    train_seconds: float = Field(description="Evaluations and checkpoints included")
    step_seconds: float | None = Field(None, description="Of training steps alone")
    total_seconds: float = 0.0
    tokens: int = Field(description="Tokens trained on, without padding")
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    curve: list[Point] = Field([], description="The evaluations during training")
    losses: list[LoggedLoss] = []
    speeds: list[Speed] = []
    plan: Plan = Plan()
    baselines: Baselines | None = Field(None, description="Of a language model from random weights")
    simple_models: list[SimpleModel] = Field([], description="Baselines of a task with a head")
    overfitting: list[Overfitting] = []
    reload: dict[str, Any] = Field({}, description="Options that the result has to be loaded with")
    measured: dict[str, Measured] = Field({}, description="Metrics with intervals, by the name of the examples")
    interval: str | None = Field(None, description="How the intervals are computed")
    verified: Verified | None = None
    answers: list[Answer] = []
    artifact: str | None = Field(None, description="The folder of the result")
    artifact_bytes: int | None = None
    quantization: Quantized | None = optional("Of a quantized base model")
    precomputed: Precomputed | None = optional("Where hidden states of frozen layers were computed once")
    vision_features: VisionFeatures | None = optional("Where the features of a frozen vision tower were computed once")
    not_precomputed: str | None = optional("Why hidden states of frozen layers were not computed once")
    head: ClassifierHead | None = optional("Of the strategy head")
    distillation: Distillation | None = optional("Of the strategy distill")
    comparison: Comparison | None = optional("Of the strategy distill")
    reference: Reference | None = optional("Of a preference objective with a reference")
    rewards: list[dict[str, float]] = optional("Of the objective grpo: the rewards of the sampled answers, by step")
    hub: HubCommit | None = optional("Where the result was pushed to the Hub")

    def with_parts(self, **parts: Any) -> Result:
        """A copy with some parts set to new values, which are validated."""
        return Result.model_validate({**self.model_dump(), **parts})


class Failure(Part):
    """How a run ended that did not finish."""

    status: str = Field(description="The name of the exit code")
    message: str = ""
    steps: int | None = optional("Where training had begun")
    curve: list[Point] | None = optional("The evaluations during training")
    losses: list[LoggedLoss] | None = optional("The training losses that were logged")


def _end(value: Any) -> str:
    status = value.get("status") if isinstance(value, dict) else getattr(value, "status", None)
    return "done" if status == "done" else "failed"


class Report(Part):
    """The content of `report.json`."""

    schema_version: int = SCHEMA_VERSION
    run: Run
    result: Annotated[Annotated[Result, Tag("done")] | Annotated[Failure, Tag("failed")], Discriminator(_end)]
    environment: Environment = Environment()

    @property
    def finished(self) -> Result:
        """The result of a finished run. Raises UserError where the run did not finish."""
        if isinstance(self.result, Failure):
            raise UserError(f"{self.run.recipe.output_dir}: this run did not finish ({self.result.status})")
        return self.result

    @property
    def reload(self) -> dict[str, Any]:
        """The options that the result has to be loaded with."""
        return self.result.reload if isinstance(self.result, Result) else {}


def read(folder: Path) -> Report | None:
    """The report of the run in `folder`; None if it has none.

    Raises:
        UserError: the file is not a report that this version can read.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: not a report that this version can read: {key}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a report of hfstrat: {error}") from None


def find(folder: Path) -> Iterator[tuple[Path, Report]]:
    """The folder and the report of each run below `folder`, sorted by path; files that are not readable reports are skipped."""
    for file in sorted(folder.rglob(FILE)):
        try:
            report = read(file.parent)
        except UserError:
            continue
        if report is not None:
            yield file.parent, report


def status(folder: Path) -> str | None:
    """How the run in `folder` ended: the name of its exit code; None if it has no report.

    Raises:
        UserError: the report is not valid JSON.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return str(found["result"]["status"])
    except (OSError, ValueError):
        raise UserError(f"{file}: not valid JSON") from None
    except (KeyError, TypeError):
        return None


def write(report: Report, folder: Path) -> Path:
    """Write report.json in one move, so that the file is always complete; returns its path."""
    file = folder / FILE
    partial = file.with_suffix(".partial")
    partial.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def parse(stored: Any) -> Report:
    """The report of the content of a report.json of this or an earlier version.

    Raises:
        ValueError: it is not a report (ValidationError names the key), or one of a later version.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("run"), dict) or not isinstance(stored.get("result"), dict):
        raise ValueError("`run` and `result` are expected")
    version = stored.get("schema_version", 0)
    if version > SCHEMA_VERSION:
        raise ValueError(f"schema_version {version} is of a later version of hfstrat; this one reads up to {SCHEMA_VERSION}")
    return Report.model_validate(stored if version else _from_version_0(stored))


RENAMED = {"artefact": "artifact", "artefact_bytes": "artifact_bytes", "bars": "baselines", "reason": "not_precomputed"}


def _from_version_0(stored: dict[str, Any]) -> dict[str, Any]:
    """A report of hfstrat 0.1 before `schema_version`: some keys of the result had other names."""
    result = {RENAMED.get(key, key): value for key, value in stored["result"].items()}
    if result.get("status") == "artefact-differs":
        result["status"] = "artifact-differs"
    details = [result.get("evaluation"), *((one.get("details") or {}) for one in result.get("measured", {}).values())]
    for one in filter(None, details):
        if largest := one.get("largest_label"):
            one["largest_label"] = {"label": largest["label"], "accuracy": largest["accuracy_of_always_saying_it"]}
    return {**stored, "schema_version": SCHEMA_VERSION, "result": result}
