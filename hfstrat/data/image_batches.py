"""How images become tensors: transformers' image processor of a model, random changes in training, and batches of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from hfstrat.data.collate import TokenCollator, in_full_precision
from hfstrat.data.image_files import ImageRef
from hfstrat.data.media_files import Unreadable
from hfstrat.errors import UserError
from hfstrat.recipe.images import Augmentation

if TYPE_CHECKING:
    from PIL.Image import Image

MIXED = 1  # begins another sequence of random numbers than that of the changes of the image
RATIO = 4 / 3  # of the sides of a random crop, at most


class ImageProcessor:
    """The image processor of a model, in the place of a tokenizer.

    Args:
        processor: of transformers.
        patch: pixels of a side of the model's patches, which give the `tokens` of an image.
        augmentation: of training images; None for none.
        seed: of the augmentation.
        views: fixed ones of each training image, in the place of others in each epoch; 1: none.
    """

    pad_token_id = eos_token = None
    max_length = 0
    template = ""

    def __init__(
        self, processor: Any, patch: int, augmentation: Augmentation | None = None, seed: int = 0, views: int = 1
    ) -> None:
        from PIL import Image

        self.processor, self.augmentation, self.seed, self.views = processor, augmentation, seed, views
        shapes = {tuple(self.pixels([Image.new("RGB", size)]).shape[-2:]) for size in ((48, 64), (64, 48), (64, 64))}
        if len(shapes) > 1:
            raise UserError(
                f"model.name_or_path: its image processor ({type(processor).__name__}) gives images of different sizes, which "
                "do not fit into a batch; set image.image_size"
            )
        self.height, self.width = shapes.pop()
        self.tokens = max(1, (self.height // patch) * (self.width // patch))

    @property
    def tokenizer(self) -> Self:
        """Where the renderer of a text has its tokenizer."""
        return self

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        self.processor.save_pretrained(folder)

    def pixels(self, images: Sequence[Image]) -> torch.Tensor:
        """`pixel_values` `[B, C, H, W]` in float32, as in a pipeline of transformers."""
        with in_full_precision():
            return self.processor(images=list(images), return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    def augmented(self, image: Image, row: int, epoch: int) -> torch.Tensor:
        """`pixel_values` `[C, H, W]` of an image with random changes, which depend on the seed, the epoch and the row alone."""
        assert self.augmentation is not None
        changed = augment(image, self.augmentation, (self.width, self.height), np.random.default_rng((self.seed, epoch, row)))
        with in_full_precision():
            found = self.processor(images=[changed], return_tensors="pt", do_resize=False, do_center_crop=False)
        return found["pixel_values"][0]  # type: ignore[no-any-return]


class Change(NamedTuple):
    """Random changes of one image: the part that is kept (left, top, right, bottom in pixels; None for all of it), whether it
    is mirrored, and the factors of brightness, contrast and saturation."""

    box: tuple[float, float, float, float] | None
    mirrored: bool
    factors: tuple[float, ...]

    @classmethod
    def drawn(cls, size: tuple[int, int], wanted: Augmentation, source: np.random.Generator) -> Self:
        """Changes for an image of this size (width, height).

        Every number is drawn, whether it is used or not, so that one change does not depend on another.
        """
        area, ratio, left, top, mirrored, *factors = source.random(8)
        kept = 1 - area * (1 - wanted.crop)
        box = crop_box(*size, kept, RATIO ** (2 * ratio - 1), (left, top)) if wanted.crop < 1 else None
        colors = tuple(1 + wanted.color * (2 * factor - 1) for factor in factors) if wanted.color else ()
        return cls(box, bool(wanted.flip and mirrored < 0.5), colors)

    def of(self, image: Image, size: tuple[int, int]) -> Image:
        """The image with these changes, in `size` (width, height)."""
        from PIL import Image as pillow
        from PIL import ImageEnhance, ImageOps

        image = image.resize(size, pillow.Resampling.BICUBIC, box=self.box)
        if self.mirrored:
            image = ImageOps.mirror(image)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(kinds, self.factors, strict=False):
            image = enhancer(image).enhance(factor)
        return image


def augment(image: Image, wanted: Augmentation, size: tuple[int, int], source: np.random.Generator) -> Image:
    """A random crop of the image, resized to `size` (width, height), perhaps mirrored, in other colors."""
    return Change.drawn(image.size, wanted, source).of(image, size)


def crop_box(
    width: int, height: int, share: float, ratio: float, place: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop with this share of the area and this ratio of its sides, as far as it fits.

    Args:
        place: of the crop among those that fit, from 0 to 1 in both directions.
    """
    wide = min(width, (share * width * height * ratio) ** 0.5)
    high = min(height, (share * width * height / ratio) ** 0.5)
    left, top = (width - wide) * place[0], (height - high) * place[1]
    return left, top, min(width, left + wide), min(height, top + high)


class ImageCollator(TokenCollator):
    """Collates rows of images: `pixel_values` float32 `[B, C, H, W]` and `labels` as `ClassCollator` has them.

    Rows with an `epoch` are those of training, which are augmented. With `mixup` (arXiv 1710.09412) each of them has a
    `partner` and a `share`: pixels are `share` of its own and the rest of the partner's, and so are labels, float32
    `[B, classes]`.

    Args:
        classes: their number; 0 for boxes, whose batches have other labels.
        many: whether a row may have several.
    """

    pads = packs = False
    sizes_batches = True
    multiple, pad_token_id = 1, 0

    def __init__(self, processor: ImageProcessor, classes: int = 0, many: bool = False) -> None:
        self.processor, self.classes, self.views = processor, classes, processor.views
        self.varies, self.labels = processor.augmentation is not None and self.views == 1, classes if many else None
        self.changes = [*processor.augmentation, processor.seed] if self.views > 1 and processor.augmentation else None
        self.size = [processor.height, processor.width]  # what cached features depend on, as is the next
        self.settings = sorted(f"{key}={value}" for key, value in processor.processor.to_dict().items())

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.processor.augmentation is None or not all("epoch" in row for row in rows):
            pixels = self.processor.pixels([open_row(row) for row in rows])
            return {"pixel_values": pixels, "labels": self.encode_labels([row["label"] for row in rows])}
        pixels, marks = self._augmented(rows), self.encode_labels([row["label"] for row in rows])
        if not all("partner" in row for row in rows):
            return {"pixel_values": pixels, "labels": marks}
        partners = [row["partner"] for row in rows]
        shares = torch.tensor([row["share"] for row in rows], dtype=torch.float32)
        pixels = _mixed(pixels, self._augmented(partners), shares)
        theirs = self.encode_labels([row["label"] for row in partners])
        if self.labels is None:
            marks, theirs = (torch.nn.functional.one_hot(each, self.classes).float() for each in (marks, theirs))
        return {"pixel_values": pixels, "labels": _mixed(marks, theirs, shares)}

    def _augmented(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        found = [self.processor.augmented(open_row(row), int(row["row"]), int(row["epoch"])) for row in rows]
        return torch.stack(found)

    def of_epoch(self, rows: Any, place: int, epoch: int) -> dict[str, Any]:
        row, wanted = super().of_epoch(rows, place, epoch), self.processor.augmentation
        if wanted is None or not wanted.mixup:
            return row
        source = np.random.default_rng((self.processor.seed, epoch, int(row["row"]), MIXED))
        partner, drawn = int(source.integers(len(rows))), float(source.beta(wanted.mixup, wanted.mixup))
        share = max(drawn, 1 - drawn)  # each image is the larger part of its own row, and the smaller one of others
        return {**row, "partner": super().of_epoch(rows, partner, epoch), "share": share}

    def with_teacher(self, has_types: bool) -> Self:
        """The same: a teacher is given the pixels of the student."""
        return self


def _mixed(ours: torch.Tensor, theirs: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Rows of two tensors `[B, ...]`, `shares` `[B]` of the first and the rest of the second."""
    each = shares.reshape(-1, *(1,) * (ours.dim() - 1))
    return each * ours + (1 - each) * theirs


def open_row(row: dict[str, Any]) -> Image:
    """The image of a prepared row. Raises UserError where it cannot be read any more."""
    ref = ImageRef(row["path"], row["member"], row["image"])
    try:
        return ref.open()
    except Unreadable as error:
        raise UserError(f"{ref.name}: {error}; it could be read when the data were prepared") from None


def resize(processor: Any, size: int) -> Any:
    """Set the size of the images that a processor of transformers makes, in place; a crop keeps its share. Raises UserError."""
    now, crop = dict(processor.size), getattr(processor, "crop_size", None)
    square = {"height": size, "width": size}
    if {"height", "width"} <= now.keys():
        before = now["height"]
        processor.size = square
    elif "shortest_edge" in now:
        before = crop["height"] if crop and getattr(processor, "do_center_crop", False) else now["shortest_edge"]
        processor.size = {"shortest_edge": round(size * now["shortest_edge"] / before)}
    else:
        raise UserError(f"image.image_size: {type(processor).__name__} has the size {now}, which cannot be changed; remove it")
    if crop:
        processor.crop_size = square
    return processor
