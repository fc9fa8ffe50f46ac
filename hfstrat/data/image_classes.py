"""The data of an image classification: see `media_classes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hfstrat.data import media_classes
from hfstrat.data.image_files import IMAGE
from hfstrat.data.image_rows import ImageFormat, ImageMeasure, ImageSource
from hfstrat.data.media_classes import MediaClasses, MediaEncoder
from hfstrat.data.splits import column
from hfstrat.recipe.data import Data


class ImageEncoder(MediaEncoder):
    """Images with labels; rows depend on the number of patches alone."""

    reading: ClassVar[Any] = ImageFormat
    opens = ImageSource

    @property
    def measure(self) -> ImageMeasure:
        return ImageMeasure(self.renderer.tokens)


@dataclass
class ImageClasses(MediaClasses):
    """Rows with `image` (bytes of a table), `width` and `height`; `renderer` is the `ImageProcessor`."""

    kind, title = IMAGE, "images"

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
    """The data of an image classification. Raises UserError as `media_classes.prepare` does."""
    return media_classes.prepare(ImageClasses, ImageEncoder(processor), data, seed, samples, max_eval_rows, held_out)


def prepare_eval(
    data: Data, processor: Any, names: list[str], many: bool, samples: int = 0, max_rows: int | None = None
) -> ImageClasses:
    """All rows of `data.train` as evaluation rows, by the labels that a classifier has. Raises UserError as `prepare` does."""
    return media_classes.prepare_eval(ImageClasses, ImageEncoder(processor, names, many), data, samples, max_rows)
