"""A picture of the first training images as the model is given them, augmentation included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

ROWS, VIEWS, GAP = 8, 4, 4  # images, epochs of each, and pixels between them
BAND = 14  # pixels below each row for its label
LEAST, MOST = 64, 224  # pixels of a side in the picture
QUALITY = 80  # of a JPEG
PAPER, INK = (255, 255, 255), (40, 40, 40)


def draw(data: Any, file: Path) -> str:
    """Write a PNG with a row for each of some training images, spread over the data: the file's image, then what the model is
    given in the first epochs (once without augmentation).

    Args:
        data: an `ImageClasses`.

    Returns:
        A line about it.
    """
    sheet, count = sheet_of(data)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return f"{file}: {count} training images, each as it is in the data and as the model is given it"


def sheet_of(data: Any) -> tuple[Any, int]:
    """The picture, and how many training images it has."""
    from PIL import Image, ImageDraw, ImageOps

    from hfstrat.data.image_batches import ImageCollator, open_row

    processor = data.renderer
    collate = ImageCollator(processor, len(data.label_names), data.many)
    views = VIEWS if collate.varies else min(VIEWS, collate.views)
    places = np.unique(np.linspace(0, len(data.train) - 1, min(ROWS, len(data.train))).astype(int))
    side = min(MOST, max(LEAST, processor.height))
    sheet = Image.new("RGB", ((views + 1) * (side + GAP) + GAP, len(places) * (side + BAND + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, place in enumerate(places.tolist()):
        row, top = data.train[place], GAP + number * (side + BAND + GAP)
        first = 0 if collate.varies else 1  # the first of several views is the image itself
        given = [collate([row])] * first + [collate([collate.of_epoch(data.train, place, n)]) for n in range(first, views)]
        pixels = [batch["pixel_values"][0] for batch in given]
        images = [ImageOps.pad(open_row(row), (side, side), color=PAPER)]
        images += [seen(one.numpy(), processor.processor).resize((side, side), Image.Resampling.NEAREST) for one in pixels]
        for column, image in enumerate(images):
            sheet.paste(image, (GAP + column * (side + GAP), top))
        labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
        pen.text((GAP, top + side), ", ".join(data.label_names[one] for one in labels), fill=INK)
    return sheet, len(places)


def jpeg(image: Any, most: int) -> bytes:
    """An RGB image as a JPEG whose longer side has at most so many pixels."""
    import io

    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((most, most))
    small.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


def seen(pixels: np.ndarray, processor: Any) -> Any:
    """The image of what a model is given, `[C, H, W]`, with the normalization undone."""
    from PIL import Image

    values = pixels.transpose(1, 2, 0).astype(np.float64)
    if getattr(processor, "do_normalize", False):
        values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if getattr(processor, "do_rescale", False):
        values = values / processor.rescale_factor
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
