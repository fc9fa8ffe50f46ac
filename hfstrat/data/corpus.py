"""The texts to train a tokenizer on: those of the training rows, without any held-out row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data import splits
from hfstrat.data.classification.labels import LabeledText
from hfstrat.data.formats import BadRow, RowFormat, hash_text
from hfstrat.data.sources import DataSource
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.data.formats import Example
    from hfstrat.recipe.schema import Recipe


@dataclass
class Corpus:
    """The training sources of a recipe before a tokenizer exists."""

    sources: list[DataSource]
    held_out: np.ndarray | None  # text hashes; None if evaluation rows have their own source

    def examples(self) -> Iterator[Example | LabeledText]:
        """The training rows, each once."""
        held = set() if self.held_out is None else set(self.held_out.tolist())
        return (example for example in _examples(self.sources) if hash_text(example.content) not in held)

    def texts(self) -> Iterator[str]:
        """Their text, without the markup of a template."""
        for example in self.examples():
            if isinstance(example, LabeledText):
                yield from filter(None, (example.text, example.pair))
            elif example.text is not None:
                yield example.text
            else:
                yield from (message["content"] for message in example.messages or [])

    def has_conversations(self) -> bool:
        """Whether any source has prompts or conversations."""
        formats = [row_format for _, row_format in map(DataSource.read, self.sources)]
        return any(isinstance(row_format, RowFormat) and row_format.kind != "text" for row_format in formats)


def open_corpus(recipe: Recipe, detect: Callable[..., Any]) -> Corpus:
    """The corpus of a recipe. If rows of `data.train` are to be held out, they are chosen here.

    Args:
        detect: how the task reads rows; see `DataSource`.
    """
    data, size, limit = recipe.data, recipe.data.eval_size, recipe.evaluation.max_rows
    sources = [DataSource.open(source, data, "data.train") for source in data.train]
    for source in sources:
        source.detect = detect
    if data.eval or data.eval_split:
        return Corpus(sources, None)
    if data.documents == "files":
        for source in sources:
            source.part = "head"
        return Corpus(sources, None)
    labels: list[str] = []
    hashes, seed = np.fromiter(_hashes(_examples(sources), labels), dtype=np.int64), data.drawn_by(recipe.seed)
    if labels:
        return Corpus(sources, splits.choose_stratified(hashes, labels, size, limit, seed))
    return Corpus(sources, splits.choose_held_out(hashes, size, limit, seed))


def held_out(recipe: Recipe, detect: Callable[..., Any]) -> np.ndarray | None:
    """Text hashes of the rows to hold out, if a new tokenizer must not see them; else None."""
    return None if recipe.strategy.new_tokenizer is None else open_corpus(recipe, detect).held_out


def _hashes(examples: Iterator[Example | LabeledText], labels: list[str]) -> Iterator[int]:
    """The text hashes of the rows that are not blank; their labels, if any, are appended to `labels`."""
    for example in examples:
        if example.has_target:
            if isinstance(example, LabeledText):
                labels.append(example.stratum)
            yield hash_text(example.content)


def _examples(sources: list[DataSource]) -> Iterator[Example | LabeledText]:
    for source in sources:
        rows, row_format = source.read()
        for index, row in enumerate(rows):
            try:
                yield row_format.example(row)
            except BadRow as error:
                raise UserError(f"{row_format.where(index)}: {error}") from None
