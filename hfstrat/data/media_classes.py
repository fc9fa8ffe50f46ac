"""The data of a classification of images or recordings: every file decoded once and counted, labels collected from training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from hfstrat.data.classes import Classes, LabelEncoder, class_names, find_conflicts
from hfstrat.data.media_files import Kind
from hfstrat.data.media_rows import Measure, MediaSource, write
from hfstrat.data.prepare import divide, evaluation_fields
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import Selection
from hfstrat.data.stats import Statistics
from hfstrat.recipe.data import Data, Source

FEW = 10  # training examples of a class, below which it is named
SHOWN = 5
WRITE_VERSION = 1  # of how files become rows: increase it where that changes
Made = TypeVar("Made", bound="MediaClasses")


class MediaEncoder(LabelEncoder):
    """Files with labels.

    Args:
        processor: in the place of the tokenizer; rows depend on what `options` has of it alone.
    """

    reading: ClassVar[Any]  # how rows are read: a `MediaFormat`, or another class with `detect`
    opens: ClassVar[type[MediaSource]]

    def __init__(self, processor: Any, names: list[str] | None = None, many: bool = False) -> None:
        super().__init__(processor)
        self.names, self.many, self.of_model = names or [], many, names is not None

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """What is stored of each file."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What `measure` depends on."""
        return {"length": self.renderer.tokens}

    def digest_of_tokenizer(self) -> str:
        return ""

    def open(self, source: Source, data: Data, key: str) -> MediaSource:
        return self.opens.open(source, data, key)

    def reader(self, source: DataSource) -> Callable[..., Any]:
        return self.reading.detect

    def shown(self, row: dict[str, Any]) -> str:
        return self.opens.kind.ref(row["path"], row["member"]).name

    def some(self, rows: Selection, count: int | None) -> Selection:
        """Evenly spaced rows: folders of classes come one class after another."""
        if count is None or count >= len(rows):
            return rows
        return rows.select(np.linspace(0, len(rows) - 1, count).round().astype(np.int64))

    def what(self, options: dict[str, Any]) -> str:
        return f"where its {self.opens.kind.plural} are"

    def options(self, source: DataSource) -> dict[str, Any]:
        return {"task": self.reading.format, "classes": class_names(source), **self.inputs, "write_version": WRITE_VERSION}

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write(*source.read(), self.measure, target)


@dataclass
class MediaClasses(Classes):
    """Rows with `path`, `member`, the bytes of a table in a column of the kind, `content`, `label`, `length`, `row`.

    `renderer` is the processor.
    """

    kind: ClassVar[Kind]
    title: ClassVar[str]  # of the line about the files

    def lines(self) -> list[str]:
        """The statistics as text, with what the files are like and classes with few of them."""
        few = [name for name, count in zip(self.label_names, self.counts, strict=True) if count < FEW]
        lines = [*super().lines(), f"{self.title:<9} {self.sizes()}"]
        if few:
            named = ", ".join(few[:SHOWN]) + (f" and {len(few) - SHOWN} more" if len(few) > SHOWN else "")
            lines.append(
                f"{'labels':<9} warning: fewer than {FEW} training {self.kind.plural} of {named}; its scores will be mostly "
                "chance"
            )
        return lines

    @abstractmethod
    def sizes(self) -> str:
        """What the training files are like, and what the model is given."""


def prepare(
    made: type[Made],
    encoder: MediaEncoder,
    data: Data,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Made:
    """The data of a classification of files.

    Raises:
        UserError: data that cannot be read, or labels that `LabelEncoder` refuses.
    """
    parts = divide(encoder, data, seed, max_eval_rows, held_out)
    fields, counts = parts.fields(data, seed, samples), encoder.count(parts.train.dataset())
    conflicts = find_conflicts(parts.train, encoder.shown)
    fields["duplicates"] |= {name.replace("text", made.kind.noun): value for name, value in conflicts.items()}
    return made(**fields, label_names=tuple(encoder.names), many=encoder.many, counts=counts)


def prepare_eval(made: type[Made], encoder: MediaEncoder, data: Data, samples: int = 0, max_rows: int | None = None) -> Made:
    """All rows of `data.train` as evaluation rows, by the labels of the encoder. Raises UserError as `prepare` does."""
    fields = evaluation_fields(encoder, data, samples, max_rows)
    counts = encoder.count(fields["eval"])
    return made(**fields, label_names=tuple(encoder.names), many=encoder.many, counts=counts)
