"""Pictures of the images of one row of a vision-language model, which `hfstrat check` and pages show beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_render import open_ref
from hfstrat.data.media_files import MediaRef

SIDE, GAP = 384, 8  # pixels
MOST = 8  # images that are drawn


def draw(data: Any, file: Path) -> str:
    """Draw the images of the first training row that has some into a picture, as they are read; returns a line about it."""
    row = next((data.train[i] for i in range(min(len(data.train), 1000)) if data.train[i]["images"]), None)
    if row is None:
        return ""
    strip(row["images"], SIDE).save(file)
    names = ", ".join(ImageRef(one["path"], one["member"] or "").name for one in row["images"][:MOST])
    return f"{file}: the images of row {row['row'] + 1}, {row['image_tokens']:,} of its {row['length']:,} tokens: {names}"


def strip(images: Sequence[Any], side: int) -> Any:
    """The first images of a row or of a prompt side by side, each of at most `side` pixels. Raises Unreadable."""
    from PIL import Image

    refs = [one if isinstance(one, MediaRef) else _ref(one) for one in images[:MOST]]
    opened = [open_ref(ref) for ref in refs]
    for image in opened:
        image.thumbnail((side, side))
    sheet = Image.new("RGB", (sum(i.width + GAP for i in opened) - GAP, max(i.height for i in opened)), "white")
    left = 0
    for image in opened:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    return sheet


def _ref(given: Any) -> MediaRef:
    """An image of a prepared row, or a path of a prompt."""
    return ImageRef(given["path"], given["member"] or "", given["data"]) if isinstance(given, dict) else ImageRef(str(given))
