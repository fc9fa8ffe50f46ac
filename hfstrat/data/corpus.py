"""The texts to train a tokenizer on: those of the training rows, and of no row that is held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfstrat.data import parts
from hfstrat.data.preparation import Origin
from hfstrat.data.tokenise import hash_of
from hfstrat.data.turns import BadRow
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.config import Recipe
    from hfstrat.data.formats import Example


@dataclass
class Corpus:
    """The training sources of a recipe before there is a tokenizer."""

    origins: list[Origin]
    held_out: np.ndarray | None  # hashes of texts; None where evaluation rows come from elsewhere

    def examples(self) -> Iterator[Example]:
        """Training rows only, each once."""
        held = set() if self.held_out is None else set(self.held_out.tolist())
        return (example for example in _examples(self.origins) if hash_of(example.words) not in held)

    def texts(self) -> Iterator[str]:
        """What is said in them, without the marks of a template."""
        for example in self.examples():
            if example.text is not None:
                yield example.text
            else:
                yield from (message["content"] for message in example.messages or [])

    def has_turns(self) -> bool:
        """Whether some source has prompts or conversations."""
        return any(origin.read()[1].kind != "text" for origin in self.origins)


def open_corpus(recipe: Recipe) -> Corpus:
    """The corpus of a recipe; where rows of train are to be held out, it is decided here which."""
    data = recipe.data
    origins = [Origin.of(source, data, "data.train") for source in data.train]
    if data.eval or data.eval_split:
        return Corpus(origins, None)
    if data.documents == "files":
        for origin in origins:
            origin.part = "head"
        return Corpus(origins, None)
    hashes = np.fromiter((hash_of(e.words) for e in _examples(origins) if e.says_something), dtype=np.int64)
    seed = data.drawn_by(recipe.seed)
    return Corpus(origins, parts.choose_held_out(hashes, data.eval_size, recipe.evaluation.max_rows, seed))


def _examples(origins: list[Origin]) -> Iterator[Example]:
    for origin in origins:
        rows, reading = origin.read()
        for index, row in enumerate(rows):
            try:
                yield reading.example(row)
            except BadRow as error:
                raise UserError(f"{reading.where(index)}: {error}") from None
