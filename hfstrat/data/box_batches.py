"""How images with boxes become tensors: boxes follow the random changes of their image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hfstrat.data.collate import in_full_precision
from hfstrat.data.image_batches import Change, ImageCollator, ImageProcessor, open_row
from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError

VISIBLE = 0.3  # share of a box in a random crop, below which the box is left out


class BoxCollator(ImageCollator):
    """Collates rows of images with boxes.

    Batches have `pixel_values` (float32 `[B, C, H, W]`), `boxes` (float32 `[B, M, 4]`: center, width and height as shares of
    the image), `class_labels` (int64 `[B, M]`, -100 where there is no box), `labels` (the same: what the Trainer counts), and
    `sizes` (int64 `[B, 2]`: height and width of the image in the data).

    Args:
        most: boxes of an image (M).
    """

    def __init__(self, processor: ImageProcessor, most: int) -> None:
        super().__init__(processor)
        self.most = max(1, most)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [open_row(row) for row in rows]
        sizes = torch.tensor([[image.size[1], image.size[0]] for image in images])
        found = [shares_of(row) for row in rows]
        if self.varies and all("epoch" in row for row in rows):
            changed = [self.changed(image, *one, row) for image, one, row in zip(images, found, rows, strict=True)]
            pixels, found = torch.stack([one[0] for one in changed]), [one[1:] for one in changed]
        else:
            pixels = self.processor.pixels(images)
        boxes = torch.zeros(len(rows), self.most, 4)
        classes = torch.full((len(rows), self.most), IGNORED)
        for index, (shares, labels) in enumerate(found):
            boxes[index, : len(labels)] = torch.as_tensor(centered(shares), dtype=torch.float32)
            classes[index, : len(labels)] = torch.as_tensor(labels, dtype=torch.long)
        return {"pixel_values": pixels, "boxes": boxes, "class_labels": classes, "labels": classes.clone(), "sizes": sizes}

    def changed(
        self, image: Any, shares: np.ndarray, labels: np.ndarray, row: dict[str, Any]
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Pixels, boxes and classes with random changes, which depend on the seed, the epoch and the row alone."""
        processor = self.processor
        assert processor.augmentation is not None
        source = np.random.default_rng((processor.seed, int(row["epoch"]), int(row["row"])))
        change = Change.drawn(image.size, processor.augmentation, source)
        view = change.of(image, (processor.width, processor.height))
        with in_full_precision():
            pixels = processor.processor(images=[view], return_tensors="pt", do_resize=False)["pixel_values"][0]
        return pixels, *moved(shares, labels, change, image.size)


def shares_of(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of a prepared row as corners in shares of the image, `[n, 4]`, and their classes, `[n]`."""
    boxes = np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)
    return boxes / np.array([row["width"], row["height"]] * 2), np.asarray(row["label"], dtype=np.int64)


def centered(boxes: np.ndarray) -> np.ndarray:
    """Corners as center, width and height, `[n, 4]`."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def moved(shares: np.ndarray, labels: np.ndarray, change: Change, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of an image after a change of it, and their classes; those of which a crop shows too little are left out.

    Args:
        shares: corners in shares of the image, `[n, 4]`.
        size: width and height of the image.
    """
    found = shares
    if change.box is not None:
        low, high = np.array(change.box[:2]) / size, np.array(change.box[2:]) / size
        found = (shares - np.tile(low, 2)) / np.tile(high - low, 2)
        inside = found.clip(0, 1)
        whole, seen = ((one[:, 2:] - one[:, :2]).prod(1) for one in (found, inside))
        kept = seen >= VISIBLE * whole
        found, labels = inside[kept], labels[kept]
    if change.mirrored:
        found = np.stack([1 - found[:, 2], found[:, 1], 1 - found[:, 0], found[:, 3]], axis=1)
    return found, labels


def to_square(processor: Any, size: int) -> Any:
    """Make a processor of transformers resize images to a square, in place: all images of a batch have one size then."""
    if not hasattr(processor, "size"):
        raise UserError(f"image.image_size: {type(processor).__name__} has no size, so it cannot be set; remove it")
    processor.size = {"height": size, "width": size}
    return processor


def side_of(processor: Any) -> int | None:
    """The side of the images that a processor gives, where its size is fixed."""
    size = dict(processor.size)
    return int(size["height"]) if size.get("height") and size.get("width") else None
