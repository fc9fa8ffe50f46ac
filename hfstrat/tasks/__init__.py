"""The tasks by name. A new task is one file and one name here (and in `Recipe.task`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfstrat.data.columns import NOTHING_LIKE
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks.audio_classification import AudioClassification
from hfstrat.tasks.base import Task
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.image_classification import ImageClassification
from hfstrat.tasks.image_text_to_text import ImageTextToText
from hfstrat.tasks.object_detection import ObjectDetection
from hfstrat.tasks.regression import Regression
from hfstrat.tasks.text_classification import TextClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(CausalLM(), TextClassification(), Regression()),
        *(ImageClassification(), ObjectDetection(), ImageTextToText(), AudioClassification()),
    )
}

__all__ = [
    "TASKS",
    "AudioClassification",
    "CausalLM",
    "ImageClassification",
    "ImageTextToText",
    "ObjectDetection",
    "Regression",
    "Task",
    "TextClassification",
    "task_of_files",
    "task_of_rows",
]


def task_of_files(folder: str | Path) -> Task:
    """The task that the files of a saved model or adapter name, causal-lm where they name none."""
    from hfstrat.models.load import read_json

    path = Path(folder).expanduser()
    kind = read_json(path / "adapter_config.json").get("task_type")
    config, is_pooled = read_json(path / "config.json"), (path / "modules.json").is_file()  # of sentence-transformers
    architecture = str((config.get("architectures") or [""])[0])
    for task in TASKS.values():
        of_adapter = kind is not None and kind == task.model.peft_type
        named = of_adapter or (kind is None and architecture.endswith(task.model.architecture))
        if (not task.text.generates and task.model.reads_tokens if is_pooled else named) and task.model.fits(config):
            return task
    return TASKS[CausalLM.name]


def task_of_rows(
    rows: list[dict[str, Any]], source: str, class_names: dict[str, list[str]] | None = None, data: Data | None = None
) -> Task:
    """The task detected from the columns of the first rows: a task with labels if there are any.

    Args:
        data: of one source, with the columns and the format that are set.

    Raises:
        UserError: columns that fit no task: the answer of the first task for which all of its columns can be mapped.
    """
    data = data or Data.model_validate({"train": source})
    wanted, columns = (data.of(data.train[0], name) for name in ("format", "columns"))
    problems = []
    for task in sorted(TASKS.values(), key=lambda task: (task.text.generates, not task.model.sees_images)):
        try:
            reading = task.rows.read_format(rows, source, data, wanted, columns, class_names)
        except UserError as error:
            problems.append(error)
            continue
        if task.rows.fits(reading, rows):
            return task
    mappable = (problem for problem in problems if NOTHING_LIKE not in str(problem))
    others = ". Or, to predict labels or numbers, map columns to text and label, or to text and score"
    raise next(mappable, None) or UserError(f"{problems[-1]}{others}" if problems else f"{source}: fits no task")
