"""Loading the image processor of a detector: images become squares, so that all of a batch have one size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data.box_batches import side_of, to_square
from hfstrat.data.image_batches import ImageProcessor
from hfstrat.errors import UserError
from hfstrat.tasks.image_classification.processor import config_of, from_source, of_family, patch_of, source_and_config

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe

SIDE = 640  # pixels, where neither the recipe nor the processor has a fixed size
SIMILAR = {"rf_detr": "deformable_detr"}  # families whose own processor needs torchvision: one that gives the same pixels


def load(recipe: Recipe, family: str = "") -> ImageProcessor:
    """The image processor of the recipe's model. Raises UserError."""
    key, source, options, config = source_and_config(recipe)
    family = str(config.get("model_type") or family)
    folder = Path(source).expanduser()
    if not source or folder.is_file() or (folder.is_dir() and not (folder / "preprocessor_config.json").is_file()):
        processor = of_family(SIMILAR.get(family, family), {})
    else:
        processor = from_source(source, options, key)
    if not hasattr(processor, "post_process_object_detection"):
        raise UserError(
            f"{key}: {source}: its image processor ({type(processor).__name__}) is none of a detector; set model.tokenizer to "
            "the folder or Hub id of one"
        )
    wanted = recipe.image
    side = wanted.image_size or side_of(processor) or SIDE
    if wanted.image_size is not None or side_of(processor) is None:
        to_square(processor, side)
    check_patches(side, config)
    on = wanted.augmentation == "on" or (wanted.augmentation == "auto" and recipe.strategy.augments)
    return ImageProcessor(processor, patch_of(_of_backbone(config)), wanted.changes if on else None, recipe.seed)


def load_trained(folder: str) -> ImageProcessor:
    """The image processor in the folder of a result. Raises UserError."""
    return ImageProcessor(from_source(folder, {}, "model"), patch_of(_of_backbone(config_of(folder))))


def _of_backbone(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("backbone_config")
    return inner if isinstance(inner, dict) and inner.get("patch_size") else config


def check_patches(side: int, config: dict[str, Any]) -> None:
    """Refuse a size of which patches, or windows of them, cover only a part. Raises UserError."""
    inner = _of_backbone(config)
    patch, windows = inner.get("patch_size"), inner.get("num_windows", 1)
    if not isinstance(patch, int) or patch < 1 or not isinstance(windows, int):
        return
    unit = patch * max(1, windows)
    if side % unit:
        near = max(unit, round(side / unit) * unit)
        raise UserError(
            f"image.image_size: {side} is not a multiple of {unit}, the patches of the backbone of {patch} pixels"
            f"{f' in {windows} windows' if windows > 1 else ''}, so that a part of the image would be left out; set {near}"
        )
