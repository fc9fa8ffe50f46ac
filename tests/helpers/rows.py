"""What each command makes of the rows of a file: how many it uses, or the sentence by which it refuses them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from conftest import make_tokenizer

from hfstrat.advisor.data import survey
from hfstrat.cli.inference import _read_texts
from hfstrat.data import features, readers, sources
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS

CLASSES, LANGUAGE, NUMBERS = "text-classification", "causal-lm", "regression"
TEXTS = [f"the cat sat on mat {number}" for number in range(24)]
KEYS = re.compile(r"^(--data|data\.train|data\.eval|data\.columns|data\.format): ")


@cache
def tokenizer() -> Any:
    return make_tokenizer(chat=False)


def outcome(call: Any) -> int | str:
    """The number that a call returns, or its refusal without the setting at its beginning."""
    try:
        return int(call())
    except UserError as error:
        return KEYS.sub("", str(error))


def of_commands(file: Path, task: str) -> dict[str, int | str]:
    """What the preflight checks, the preparation of `check` and `train`, and `advise` make of a file, by command."""
    data = Data.model_validate({"train": str(file), "eval_size": 4, "max_length": 512, "template": "plain"})
    return {
        "preflight": outcome(lambda: checked(file, data, task)),
        "train": outcome(lambda: prepared(file, data, task)),
        "advise": outcome(lambda: survey(data, task, 2048, None).rows),
    }


def checked(file: Path, data: Data, task: str) -> int:
    """The first rows as preflight reads them."""
    files = sources.local_files(str(file), "data.train") or []
    rows = [row for each in files for row in readers.read_head(each)]
    reading = TASKS[task].rows.read_format(rows, str(file), data, class_names=features.class_names(files))
    for number, row in enumerate(rows):
        try:
            reading.example(row)
        except BadRow as error:
            raise UserError(f"{reading.where(number)}: {error}") from None
    return len(rows)


def prepared(file: Path, data: Data, task: str) -> int:
    found = TASKS[task].rows.prepare(data, tokenizer(), 0)
    return found.statistics["train"].rows_kept


def predicted(file: Path) -> int | str:
    return outcome(lambda: len(_read_texts(file, None)))
