"""Images of files, archives and tables: how their bytes are found, and how they become RGB.

The rules are those of `transformers.image_utils.load_image`, so that a pipeline sees the image that the model was trained
on: the EXIF rotation is applied, then Pillow converts to RGB (grayscale is repeated, palettes are looked up, CMYK is inverted
without a color profile, an alpha channel is dropped), and of several frames the first one is used. One rule is added: 16-bit
grayscale is scaled to 8 bits. Pillow is imported when the first image is opened.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, NamedTuple

from hfstrat.data.media_files import Kind, MediaRef, Unreadable
from hfstrat.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 89_478_485  # Pillow's own limit, from which it suspects a decompression bomb
MAX_RATIO = 200  # of the sides; the shorter one becomes that of the model
SIXTEEN = 257  # 65,535 / 255
GRAY = "have a grayscale image, which becomes RGB"
CHANGES = {  # by Pillow's mode, in the words of `Statistics.changes`
    **dict.fromkeys(("1", "L"), GRAY),
    "LA": "have a grayscale image with an alpha channel, which is dropped",
    "P": "have a palette image, which becomes RGB",
    "PA": "have a palette image with an alpha channel, which is dropped",
    "CMYK": "have a CMYK image, which becomes RGB without a color profile",
    "YCbCr": "have a YCbCr image, which becomes RGB",
    "LAB": "have a LAB image, which becomes RGB",
    "HSV": "have an HSV image, which becomes RGB",
    **dict.fromkeys(("RGBA", "RGBa", "RGBX"), "have an alpha channel, which is dropped"),
}
DEEP = "have 16-bit pixels, which are scaled to 8 bits (a pipeline of transformers clips them instead)"
FRAMES = "have several frames, of which the first is used"
ROTATED = "have an EXIF rotation, which is applied"
ORIENTATION = 0x0112  # the EXIF tag


class ImageRef(MediaRef):
    """Where an image is."""

    def open(self) -> Image.Image:
        """The image in RGB. Raises Unreadable."""
        return decode(self.read()).image


IMAGE = Kind(
    "image",
    "images",
    "image",
    ("image", "img", "file_name"),
    ("img", "picture", "photo", "file_name", "filename", "file", "path", "filepath", "image_path", "image_file", "jpg"),
    SUFFIXES,
    "Image",
    ImageRef,
)


class Decoded(NamedTuple):
    """An image in RGB, and what was changed, in words."""

    image: Image.Image
    changes: list[str]


def check_installed(task: str) -> None:
    """Raises UserError where Pillow is not installed. Imports nothing."""
    import importlib.util

    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"task: {task} needs Pillow: pip install 'hfstrat[vision]'")


def decode(data: bytes) -> Decoded:
    """The image of a file's bytes, decoded completely. Raises Unreadable."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata, and sizes that are checked here
            image = Image.open(io.BytesIO(data))
            check_size(*image.size)
            changes = [FRAMES] if getattr(image, "n_frames", 1) > 1 else []
            image.seek(0)
            image.load()
            rotation = image.getexif().get(ORIENTATION, 1)
            changes += [ROTATED] if isinstance(rotation, int) and 1 < rotation <= 8 else []
            rotated = ImageOps.exif_transpose(image) or image
            return Decoded(*_to_rgb(rotated, changes))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image of a format that Pillow reads") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"it has more than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # the decoders of the formats fail in any way
        raise Unreadable(f"it cannot be decoded: {first_line(error)}") from None


def check_size(width: int, height: int) -> None:
    """Refuse an image with too many pixels, or with sides that differ too much. Raises Unreadable."""
    if width < 1 or height < 1:
        raise Unreadable("it has no pixels")
    if width * height > MAX_PIXELS:
        raise Unreadable(f"it has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise Unreadable(f"it has {width:,} x {height:,} pixels: one side is more than {MAX_RATIO} times the other")


def _to_rgb(image: Image.Image, changes: list[str]) -> tuple[Image.Image, list[str]]:
    if image.mode == "RGB":
        return image, changes
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_16_bits(image), [*changes, DEEP]
    found = "have an alpha channel, which is dropped" if "transparency" in image.info and image.mode == "P" else ""
    changes = [*changes, found or CHANGES.get(image.mode, f"have a {image.mode} image, which becomes RGB")]
    return image.convert("RGB"), changes


def _from_16_bits(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise Unreadable(f"its pixels are numbers of 32 bits (mode {image.mode}), whose range is unknown; save it with 8 bits")
    return Image.fromarray((values.astype(np.float64) / SIXTEEN).round().astype(np.uint8)).convert("RGB")
