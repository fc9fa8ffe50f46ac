"""`hfstrat predict`: labels or numbers for texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.cli.generate import lines
from hfstrat.errors import UserError
from hfstrat.tasks import TASKS
from hfstrat.tasks.artifact import check_output, check_task, load, task_of
from hfstrat.tasks.text_classification.text import LabelText

NO_CLASSIFIER = "this model generates text: use `hfstrat generate`"
LENGTH = 1024  # tokens of a text, at most, where no run says it


def predict(target: str, given: list[str], file: Path | None, output: Path | None, form: str = "recorded") -> None:
    """Print labels or numbers for texts, or write a .jsonl with `text` and `labels` with `scores`, or `values`.

    Raises:
        UserError: no texts, a file that cannot be read, an output that exists, or no classifier.
    """
    asked: list[Any] = [*given, *(rows_of(file) if file else [])]
    if not asked:
        raise UserError("predict: no text; give --text TEXT or --file FILE")
    check_output(output)
    check_task(target, tuple(name for name, task in TASKS.items() if not task.text.generates), NO_CLASSIFIER)
    model, tokenizer, report = load(target, form, spreads=True)
    import torch

    from hfstrat.data.labeled import Texts

    task = task_of(target).text
    assert isinstance(task, LabelText)
    texts = Texts(tokenizer, report.run.recipe.data.max_length if report else LENGTH)
    with lines(output) as say:
        for row in asked:
            found = task.outputs(model, texts, row, torch.float32)  # as the weights are, without autocast
            if output:
                whole = row if isinstance(row, dict) else {"text": row}
                say(json.dumps({**whole, **task.record(found)}, ensure_ascii=False))
            else:
                words = " ".join(task.prompt(row).split())
                say(f"{task.line(found)}\t{words}" if len(asked) > 1 else task.line(found))
    if output:
        print(f"{output}: {len(asked)} rows")


def rows_of(file: Path) -> list[Any]:
    """The lines of a .txt, or the texts and pairs of any other file with rows; labels there are ignored."""
    from hfstrat.data import readers, sources
    from hfstrat.data.labeled import PAIRS, TEXTS

    path = sources.local_file(str(file), "--file")
    if path is None:
        raise UserError(f"--file: {file}: no such file")
    if readers.file_kind(path) == "text":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found: list[Any] = []
    for number, row in enumerate(readers.read(path), 1):
        pair = next((pair for pair in PAIRS if set(pair) <= row.keys()), None)
        text = next((name for name in TEXTS if name in row), None)
        if pair is None and text is None:
            raise UserError(
                f"{file}: row {number} has no column such as text, or premise and hypothesis; it has {', '.join(row)}"
            )
        one, *two = pair or (str(text),)
        found.append({"text": row[one]} | ({"text_pair": row[two[0]]} if two else {}))
    return found
