"""`hfstrat predict`: what a classifier says of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.cli.generate import lines
from hfstrat.errors import UserError
from hfstrat.tasks.artifact import check_output, check_task, load
from hfstrat.tasks.text_classification import TextClassification

LENGTH = 1024  # tokens of a text, at most, where no run says it


def predict(target: str, given: list[str], file: Path | None, output: Path | None, form: str = "recorded") -> None:
    """Label texts on the terminal, or into a .jsonl with `text`, `labels` and `scores`.

    Raises:
        UserError: no texts, a file that cannot be read, an output that exists, or no classifier.
    """
    asked: list[Any] = [*given, *(rows_of(file) if file else [])]
    if not asked:
        raise UserError("predict: no text; give --text TEXT or --file FILE")
    check_output(output)
    check_task(target, (TextClassification.name,), "this is no classifier: `hfstrat generate` gives its answers")
    model, tokenizer, report = load(target, form, spreads=True)
    import torch

    from hfstrat.data.classification.tokenize import Texts
    from hfstrat.tasks.text_classification.text import in_words, labels_of

    texts = Texts(tokenizer, report.run.recipe.data.max_length if report else 1024)
    with lines(output) as say:
        for row in asked:
            found = labels_of(model, texts, row, torch.float32)  # as the weights are, without autocast
            words = TextClassification().text.prompt(row)
            if output:
                whole = row if isinstance(row, dict) else {"text": row}
                labels, scores = [label for label, _ in found], [chance for _, chance in found]
                say(json.dumps({**whole, "labels": labels, "scores": scores}, ensure_ascii=False))
            else:
                say(f"{in_words(found)}\t{' '.join(words.split())}" if len(asked) > 1 else in_words(found))
    if output:
        print(f"{output}: {len(asked)} rows")


def rows_of(file: Path) -> list[Any]:
    """The lines of a .txt, or the texts and pairs of any other file with rows; labels there are ignored."""
    from hfstrat.data import readers, sources
    from hfstrat.data.classification.labels import PAIRS, TEXTS

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
