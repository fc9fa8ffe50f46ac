"""What vision transformers are given of images, and their sizes, from configs alone: for predictions of memory and time."""

from __future__ import annotations

import io
from math import prod
from typing import Any, NamedTuple

from hfstrat.data.image_files import ImageRef, check_size
from hfstrat.data.media_files import Unreadable
from hfstrat.errors import UserError, first_line
from hfstrat.models.parameter_names import BLOCK, CLASS_HEAD, config_size
from hfstrat.models.stack import Stack, Stem, linear
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.section import Shapes
from hfstrat.tasks.base import Given

SIDE = 224  # of most image processors
PATCH = 16  # pixels, where a config has none: about what a convolution network makes of 16 x 16 pixels
EXTRA = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # ends of names: positions beside the patches
FROM_SCRATCH = "vit"
SMALLEST_SIDE, PATCHES = 32, (16, 14, 8, 4)  # of a model from scratch: its images, and sides of patches from coarse to fine
LEAST_PATCHES = 8  # in a row
MUCH_LARGER = 2  # times the sides of the images, from which on a smaller input is proposed in words
TOWERS = ("vision_model.",)  # of a model of images and texts, of which the classifier is made


class Header(NamedTuple):
    """Width and height of an image as they are stored."""

    width: int
    height: int

    @property
    def words(self) -> str:
        return f"{self.width:,} x {self.height:,}"


class GivenImages(Given):
    """Images of one size.

    Args:
        height, width: in pixels.
        patch: side of a patch.
        extra: positions beside the patches.
        is_set: whether the recipe sets the size.
    """

    def __init__(self, height: int, width: int, patch: int, extra: int, sections: dict[str, Any], is_set: bool = False) -> None:
        self.height, self.width, self.patch, self.extra, self.sections = height, width, patch, extra, sections
        self.is_set = is_set

    @property
    def each(self) -> int:
        return max(1, (self.height // self.patch) * (self.width // self.patch)) + self.extra

    def header(self, ref: Any) -> Header:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(ref.read()) if ref.member or ref.data is not None else ref.path) as image:
                check_size(*image.size)
                return Header(*image.size)
        except Unreadable:
            raise
        except UnidentifiedImageError:
            raise Unreadable("not an image of a format that Pillow reads") from None
        except MemoryError:
            raise
        except Exception as error:  # the decoders of the formats fail in any way
            raise Unreadable(f"it cannot be read: {first_line(error)}") from None

    def decode(self, ref: Any) -> None:
        import numpy as np

        image = ImageRef(*ref).open().resize((self.width, self.height))
        np.asarray(image, dtype=np.float32)

    def positions(self, header: Header) -> int:
        return self.each

    def lines(self, headers: list[Header]) -> list[str]:
        by_area = sorted(headers, key=prod)
        small, middle, large = by_area[0], by_area[len(by_area) // 2], by_area[-1]
        same = small[:2] == large[:2]
        sizes = f"all {small.words} pixels" if same else f"{small.words} to {large.words} pixels, median {middle.words}"
        more = f" and {self.extra} more" if self.extra else ""
        found = [
            f"{sizes}; the model is given {self.width} x {self.height}: {self.each:,} positions, patches of {self.patch} x "
            f"{self.patch}{more}"
        ]
        smaller = self._multiple(MUCH_LARGER * max(middle))
        if not self.is_set and smaller < min(self.height, self.width):
            share = self.each / GivenImages(smaller, smaller, self.patch, self.extra, {}).each
            found.append(
                f"the images are small: image.image_size={smaller} has {share:.2g} times fewer positions, and takes about as "
                "much less time; how accuracy changes has to be measured"
            )
        return found

    def _multiple(self, side: int) -> int:
        """The nearest multiple of a patch from this side on."""
        return -(-side // self.patch) * self.patch

    def scratch(self, headers: list[Any], parameters: float) -> tuple[Given, str, dict[str, Any]]:
        middle = sorted(max(header) for header in headers)[len(headers) // 2]
        side = min(self.height, max(SMALLEST_SIDE, -(-middle // PATCH) * PATCH)) // 2 * 2
        if self.is_set:
            side = self.height
        fitting = [patch for patch in PATCHES if side % patch == 0]
        patch = next((patch for patch in fitting if side // patch >= LEAST_PATCHES), fitting[-1] if fitting else self.patch)
        section = {"image": {**self.sections.get("image", {}), "image_size": side}}
        return GivenImages(side, side, patch, 1, section), FROM_SCRATCH, {"image_size": side, "patch_size": patch}


def given(config: dict[str, Any], shapes: Shapes, processor: dict[str, Any], recipe: Recipe) -> GivenImages:
    """What a model is given of images. Raises UserError for a size of which patches cover only a part."""
    full = {**config, **(config.get("vision_config") or {})}
    wanted = recipe.image.image_size
    height, width = (wanted, wanted) if wanted else size_of(processor, full)
    patch = full.get("patch_size")
    patch = patch if isinstance(patch, int) and patch > 0 else PATCH
    if not is_staged(full) and (height % patch or width % patch) and wanted:
        near = max(patch, round(height / patch) * patch)
        raise UserError(f"image.image_size: {height} is not a multiple of the model's patches of {patch} pixels; set {near}")
    section = recipe.image.model_dump(exclude_unset=True)
    return GivenImages(height, width, patch, extra_positions(shapes), {"image": section} if section else {}, bool(wanted))


def size_of(processor: dict[str, Any], config: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the images that an image processor makes, by its preprocessor_config.json."""
    crops = bool(processor.get("do_center_crop")) and processor.get("crop_size")
    size = processor.get("crop_size") if crops else processor.get("size")
    size = size or config.get("image_size") or SIDE
    if isinstance(size, dict):
        side = int(size.get("shortest_edge") or size.get("longest_edge") or SIDE)
        return int(size.get("height", side)), int(size.get("width", side))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def is_staged(config: dict[str, Any]) -> bool:
    """Whether a model has stages of different widths: a network of convolutions, or a hierarchy of windows."""
    return not isinstance(config.get("patch_size"), int) or "depths" in config or not config_size(config, "layers")


def stack(name: str, shapes: Shapes, config: dict[str, Any], labels: int) -> Stack:
    """A vision transformer. Raises UserError for other models."""
    full, family = {**config, **(config.get("vision_config") or {})}, str(config.get("model_type"))
    if is_staged(full):
        raise UserError(
            f"--model: {name}: {family} has stages of different widths and resolutions, so that its memory and time do not "
            "follow from its shapes; measure them: hfstrat compare --model MODEL --data DATA --budget 5min"
        )
    tower = next((tower for tower in TOWERS if any(name.startswith(tower) for name in shapes)), "")
    body = {name: shape for name, shape in shapes.items() if name.startswith(tower) and not CLASS_HEAD.search(name)}
    width = config_size(full, "width")
    pooled = 2 * width if family.startswith("dinov2") else width  # DINOv2: CLS and the mean of the patches
    patches = next((shape for name, shape in body.items() if len(shape) == 4 and not BLOCK.search(name)), ())
    sizes = {
        "hidden_size": width,
        "intermediate_size": config_size(full, "inner") or round(float(full.get("mlp_ratio") or 4) * width),
        "num_hidden_layers": config_size(full, "layers"),
        "num_attention_heads": config_size(full, "heads"),
        "dropout": full.get("hidden_dropout_prob") or 0.0,
        "attention_dropout": full.get("attention_probs_dropout_prob") or full.get("attention_dropout") or 0.0,
    }
    return Stack(sizes, body, linear("classifier", labels, pooled), Stem(2.0 * prod(patches), float(prod(patches[1:]))))


def extra_positions(shapes: Shapes) -> int:
    """Positions beside the patches: class, distillation and register tokens."""
    return sum(int(prod(shape[:-1])) for name, shape in shapes.items() if name.endswith(EXTRA))
