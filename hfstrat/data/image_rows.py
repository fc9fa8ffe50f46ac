"""Rows of one image with labels: how they are read, and what is stored of an image. See `media_rows`."""

from __future__ import annotations

from dataclasses import dataclass

from hfstrat.data.image_files import IMAGE, decode
from hfstrat.data.labeled import LABELS
from hfstrat.data.media_rows import Measure, Measured, MediaFormat, MediaSource

FORMAT = "image-classification"
OUR_COLUMNS = sorted({*IMAGE.names, *LABELS})


@dataclass
class ImageFormat(MediaFormat):
    """How the rows of one source are read: `columns` are our names of the image and the label."""

    format = FORMAT
    media = IMAGE


@dataclass
class ImageSource(MediaSource):
    """One source of images."""

    kind = IMAGE


class ImageMeasure(Measure):
    """The size of each image.

    Args:
        length: of an image in the units of `length`: patches.
    """

    kind = IMAGE
    fields = (("width", "int32"), ("height", "int32"))

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, data: bytes) -> Measured:
        found = decode(data)
        return Measured(self.length, found.image.size, tuple(found.changes))
