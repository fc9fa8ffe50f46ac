"""The data of an image classification: every image decoded once and counted, labels collected from training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfstrat.data.classes import Classes, LabelEncoder, class_names, find_conflicts
from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_rows import FORMAT, ImageFormat, ImageSource, write_images
from hfstrat.data.prepare import divide, evaluation_fields
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import Selection, column
from hfstrat.data.stats import Statistics
from hfstrat.recipe.data import Data, Source

FEW = 10  # training images of a class, below which it is named
SHOWN = 5
WRITE_VERSION = 1  # of how images become rows: increase it where that changes


class ImageEncoder(LabelEncoder):
    """Images with labels.

    Args:
        processor: in the place of the tokenizer; rows depend on the number of its patches alone.
    """

    def __init__(self, processor: Any, names: list[str] | None = None, many: bool = False) -> None:
        super().__init__(processor)
        self.names, self.many, self.of_model = names or [], many, names is not None

    def digest_of_tokenizer(self) -> str:
        return ""

    def open(self, source: Source, data: Data, key: str) -> ImageSource:
        return ImageSource.open(source, data, key)

    def reader(self, source: DataSource) -> Callable[..., Any]:
        return ImageFormat.detect

    def shown(self, row: dict[str, Any]) -> str:
        return ImageRef(row["path"], row["member"]).name

    def some(self, rows: Selection, count: int | None) -> Selection:
        """Evenly spaced rows: folders of classes come one class after another."""
        if count is None or count >= len(rows):
            return rows
        return rows.select(np.linspace(0, len(rows) - 1, count).round().astype(np.int64))

    def what(self, options: dict[str, Any]) -> str:
        return "where its images are"

    def options(self, source: DataSource) -> dict[str, Any]:
        length = self.renderer.tokens
        return {"task": FORMAT, "classes": class_names(source), "length": length, "write_version": WRITE_VERSION}

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write_images(*source.read(), self.renderer.tokens, target)


@dataclass
class ImageClasses(Classes):
    """Rows with `path`, `member`, `image` (bytes of a table), `width`, `height`, `content`, `label`, `length`, `row`.

    `renderer` is the `ImageProcessor`.
    """

    def lines(self) -> list[str]:
        """The statistics as text, with the sizes of the images and classes with few of them."""
        few = [name for name, count in zip(self.label_names, self.counts, strict=True) if count < FEW]
        lines = [*super().lines(), f"{'images':<9} {self.sizes()}"]
        if few:
            named = ", ".join(few[:SHOWN]) + (f" and {len(few) - SHOWN} more" if len(few) > SHOWN else "")
            lines.append(
                f"{'labels':<9} warning: fewer than {FEW} training images of {named}; its scores will be mostly chance"
            )
        return lines

    def sizes(self) -> str:
        """The sizes of the training images, and what the model is given."""
        width, height = column(self.train, "width"), column(self.train, "height")
        areas = np.argsort(width.astype(np.int64) * height, kind="stable")
        small, middle, large = (f"{width[i]:,} x {height[i]:,}" for i in (areas[0], areas[len(areas) // 2], areas[-1]))
        found = f"all {small} pixels" if small == large else f"{small} to {large} pixels, median {middle}"
        changed = self.renderer.augmentation
        return f"{found}; the model is given {self.renderer.width} x {self.renderer.height}" + (
            f", training with {augmentation_words(changed)}" if changed is not None else ", without augmentation"
        )


def augmentation_words(wanted: Any) -> str:
    """The random changes of training images, in words."""
    parts = [f"random crops of {wanted.crop:.0%} or more"] if wanted.crop < 1 else []
    parts += ["mirroring"] if wanted.flip else []
    parts += [f"colors changed by up to {wanted.color:.0%}"] if wanted.color else []
    return ", ".join(parts) or "no random changes"


def prepare(
    data: Data,
    processor: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> ImageClasses:
    """The data of an image classification.

    Raises:
        UserError: data that cannot be read, or labels that `LabelEncoder` refuses.
    """
    encoder = ImageEncoder(processor)
    parts = divide(encoder, data, seed, max_eval_rows, held_out)
    fields, counts = parts.fields(data, seed, samples), encoder.count(parts.train.dataset())
    conflicts = find_conflicts(parts.train, encoder.shown)
    fields["duplicates"] |= {name.replace("text", "image"): value for name, value in conflicts.items()}
    return ImageClasses(**fields, label_names=tuple(encoder.names), many=encoder.many, counts=counts)


def prepare_eval(
    data: Data, processor: Any, names: list[str], many: bool, samples: int = 0, max_rows: int | None = None
) -> ImageClasses:
    """All rows of `data.train` as evaluation rows, by the labels that a classifier has. Raises UserError as `prepare` does."""
    encoder = ImageEncoder(processor, names, many)
    fields = evaluation_fields(encoder, data, samples, max_rows)
    return ImageClasses(**fields, label_names=tuple(names), many=many, counts=encoder.count(fields["eval"]))
