"""The texts to train a tokenizer on: those of the training rows, and of no row that is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data import splits
from hfstrat.data.classification import prepare
from hfstrat.data.classification.labels import Labelled
from hfstrat.data.formats import Reading
from hfstrat.data.messages import BadRow
from hfstrat.data.sources import Origin
from hfstrat.data.tokenize import hash_of
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.data.formats import Example
    from hfstrat.recipe.schema import Recipe


@dataclass
class Corpus:
    """The training sources of a recipe before there is a tokenizer."""

    origins: list[Origin]
    held_out: np.ndarray | None  # hashes of texts; None where evaluation rows come from elsewhere

    def examples(self) -> Iterator[Example | Labelled]:
        """Training rows only, each once."""
        held = set() if self.held_out is None else set(self.held_out.tolist())
        return (example for example in _examples(self.origins) if hash_of(example.words) not in held)

    def texts(self) -> Iterator[str]:
        """What is said in them, without the marks of a template."""
        for example in self.examples():
            if isinstance(example, Labelled):
                yield from filter(None, (example.text, example.pair))
            elif example.text is not None:
                yield example.text
            else:
                yield from (message["content"] for message in example.messages or [])

    def has_turns(self) -> bool:
        """Whether some source has prompts or conversations."""
        return any(isinstance(reading, Reading) and reading.kind != "text" for _, reading in map(Origin.read, self.origins))


def open_corpus(recipe: Recipe, reader: Callable[..., Any]) -> Corpus:
    """The corpus of a recipe; where rows of train are to be held out, it is decided here which.

    Args:
        reader: how the task reads rows, from the first of them (`Origin.told`).
    """
    data, size, limit = recipe.data, recipe.data.eval_size, recipe.evaluation.max_rows
    origins = [Origin.of(source, data, "data.train") for source in data.train]
    for origin in origins:
        origin.told = reader
    if data.eval or data.eval_split:
        return Corpus(origins, None)
    if data.documents == "files":
        for origin in origins:
            origin.part = "head"
        return Corpus(origins, None)
    labels: list[str] = []
    hashes, seed = np.fromiter(_hashes(_examples(origins), labels), dtype=np.int64), data.drawn_by(recipe.seed)
    if labels:
        return Corpus(origins, prepare.choose_held_out(hashes, labels, size, limit, seed))
    return Corpus(origins, splits.choose_held_out(hashes, size, limit, seed))


def held_out(recipe: Recipe, reader: Callable[..., Any]) -> np.ndarray | None:
    """Hashes of the texts to hold out for evaluation, where a new tokenizer must not see them; else None."""
    return None if recipe.strategy.new_tokenizer is None else open_corpus(recipe, reader).held_out


def _hashes(examples: Iterator[Example | Labelled], labels: list[str]) -> Iterator[int]:
    """Of the rows that say something; where they have labels these are gathered."""
    for example in examples:
        if has_words(example):
            if isinstance(example, Labelled):
                labels.append(example.stratum)
            yield hash_of(example.words)


def has_words(example: Example | Labelled) -> bool:
    return bool(example.words.strip()) if isinstance(example, Labelled) else example.says_something


def _examples(origins: list[Origin]) -> Iterator[Example | Labelled]:
    for origin in origins:
        rows, reading = origin.read()
        for index, row in enumerate(rows):
            try:
                yield reading.example(row)
            except BadRow as error:
                raise UserError(f"{reading.where(index)}: {error}") from None
