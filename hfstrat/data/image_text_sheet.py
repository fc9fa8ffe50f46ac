"""A picture of one training row of a vision-language model: what `hfstrat check` shows beside its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_text_batches import images_of

SIDE, GAP = 384, 8  # pixels
MOST = 8  # images that are drawn


def draw(data: Any, file: Path) -> str:
    """Draw the images of the first training row that has some into a picture, as they are read; returns a line about it."""
    from PIL import Image

    row = next((data.train[i] for i in range(min(len(data.train), 1000)) if data.train[i]["images"]), None)
    if row is None:
        return ""
    images = images_of({"images": row["images"][:MOST]})
    for image in images:
        image.thumbnail((SIDE, SIDE))
    sheet = Image.new("RGB", (sum(i.width + GAP for i in images) - GAP, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    sheet.save(file)
    names = ", ".join(ImageRef(one["path"], one["member"] or "").name for one in row["images"][:MOST])
    return f"{file}: the images of row {row['row'] + 1}, {row['image_tokens']:,} of its {row['length']:,} tokens: {names}"
