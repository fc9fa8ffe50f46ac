"""Pictures of boxes: training examples as the model is given them, and predictions."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BAND = 12  # pixels of a name above its box
LEAST, MOST = 160, 400  # pixels of a side in the picture of examples
ROWS, VIEWS, GAP = 6, 3, 4  # images, epochs of each, and pixels between them
PAPER = (255, 255, 255)


def color_of(label: int, classes: int) -> tuple[int, int, int]:
    """A color for each class, far from those of the others."""
    red, green, blue = colorsys.hsv_to_rgb(label / max(1, classes), 0.9, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(image: Any, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str], classes: int) -> Any:
    """The image (RGB) with its boxes (corners in pixels) and a text at each."""
    from PIL import ImageDraw

    drawn = image.copy()
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(image.size) / 400))
    for box, label, text in zip(boxes, labels, texts, strict=True):
        color = color_of(label, classes)
        left, top, right, bottom = box
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=width)
        if text:
            place = (left + width, top - BAND if top >= BAND else top + width)
            pen.rectangle(pen.textbbox(place, text), fill=color)
            pen.text(place, text, fill=PAPER)
    return drawn


def draw_examples(data: Any, file: Path) -> str:
    """Write a PNG with a row for each of some training images: as it is in the data, then what the model is given in the first
    epochs (once without augmentation), with boxes.

    Args:
        data: `Boxes`.

    Returns:
        A line about it.
    """
    from PIL import Image

    from hfstrat.data.box_batches import BoxCollator
    from hfstrat.data.contact_sheet import seen
    from hfstrat.data.image_batches import open_row

    processor, classes = data.renderer, len(data.label_names)
    collate = BoxCollator(processor, data.most)
    views = VIEWS if collate.varies else 1
    places = np.unique(np.linspace(0, len(data.train) - 1, min(ROWS, len(data.train))).astype(int))
    side = min(MOST, max(LEAST, processor.height))
    sheet = Image.new("RGB", ((views + 1) * (side + GAP) + GAP, len(places) * (side + GAP) + GAP), PAPER)
    for number, place in enumerate(places.tolist()):
        row, top = data.train[place], GAP + number * (side + GAP)
        batch = collate([row | ({"epoch": epoch} if collate.varies else {}) for epoch in range(views)])
        images = [_fitted(open_row(row), np.asarray(row["boxes"]).reshape(-1, 4), row["label"], side, data.label_names)]
        for pixels, boxes, labels in zip(batch["pixel_values"], batch["boxes"], batch["class_labels"], strict=True):
            there = labels >= 0
            low, high = boxes[there, :2] - boxes[there, 2:] / 2, boxes[there, :2] + boxes[there, 2:] / 2
            corners = np.concatenate([low, high], axis=1) * side
            image = seen(pixels.numpy(), processor.processor).resize((side, side))
            images.append(draw_boxes(image, corners.tolist(), labels[there].tolist(), [""] * int(there.sum()), classes))
        for column, image in enumerate(images):
            sheet.paste(image, (GAP + column * (side + GAP), top))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return f"{file}: {len(places)} training images, each as it is in the data and as the model is given it, with boxes"


def _fitted(image: Any, boxes: np.ndarray, labels: list[int], side: int, names: tuple[str, ...]) -> Any:
    """The image of the data in a square, with its boxes and the names of their classes."""
    from PIL import Image

    scale = side / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    drawn = draw_boxes(small, (boxes * scale).tolist(), labels, [names[label] for label in labels], len(names))
    square = Image.new("RGB", (side, side), PAPER)
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square
