"""Loading the image processor of a model, with the size and the augmentation that the recipe sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data.image_batches import ImageProcessor, resize
from hfstrat.errors import UserError, first_line
from hfstrat.models.load import read_json, source_of
from hfstrat.tasks.image_classification.given import PATCH

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe

FAMILY = "vit"  # of a model with random weights, where none is named


def load(recipe: Recipe, family: str = "") -> ImageProcessor:
    """The image processor of the recipe's model. Raises UserError."""
    key, source, options, config = source_and_config(recipe)
    folder = Path(source).expanduser()
    if not source or folder.is_file() or (folder.is_dir() and not (folder / "preprocessor_config.json").is_file()):
        processor = of_family(str(config.get("model_type") or family or FAMILY), config)
    else:
        processor = from_source(source, options, key)
    wanted = recipe.image
    if wanted.image_size is not None:
        resize(processor, wanted.image_size)
    on = wanted.augmentation == "on" or (wanted.augmentation == "auto" and recipe.strategy.augments)
    changes = wanted.changes if on or wanted.views > 1 else None
    found = ImageProcessor(processor, patch_of(config), changes, recipe.seed, wanted.views)
    check_patches(found, config)
    return found


def source_and_config(recipe: Recipe) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Where the image processor is: the key of the recipe, the source, keywords for loading it; and the config of the model."""
    source, options = source_of(recipe.model)
    config = {**config_of(source), **getattr(recipe.strategy, "config", {})}
    if recipe.model.tokenizer:
        return "model.tokenizer", str(Path(recipe.model.tokenizer).expanduser()), {}, config
    return "model.name_or_path", source, options, config


def load_trained(folder: str) -> ImageProcessor:
    """The image processor in the folder of a result. Raises UserError."""
    return ImageProcessor(from_source(folder, {}, "model"), patch_of(config_of(folder)))


def from_source(source: str, options: dict[str, Any], key: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"{key}: {source}: cannot load an image processor: {first_line(error)}") from error


def of_family(family: str, config: dict[str, Any]) -> Any:
    """The image processor that transformers has for a family, with the image size of a config; mean and spread are its own."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available

    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(family)
    if not names:
        raise UserError(
            f"strategy.model_type: {family}: transformers has no image processor for it; set model.tokenizer to one"
        )
    processor = getattr(
        transformers, names["torchvision" if is_torchvision_available() and "torchvision" in names else "pil"]
    )()
    size = config.get("image_size")
    return resize(processor, size) if isinstance(size, int) else processor


def patch_of(config: dict[str, Any]) -> int:
    """Pixels of a side of the patches by which the cost of an image is counted; stages merge the first ones."""
    patch = config.get("patch_size")
    return patch if isinstance(patch, int) and patch > 0 and (patch >= 8 or "depths" not in config) else PATCH


def check_patches(processor: ImageProcessor, config: dict[str, Any]) -> None:
    """Refuse a size of which patches of a vision transformer cover only a part. Raises UserError."""
    patch = config.get("patch_size")
    if not isinstance(patch, int) or patch < 1 or "depths" in config:  # stages with windows pad their input
        return
    side = processor.height
    if side % patch:
        near = max(patch, round(side / patch) * patch)
        raise UserError(
            f"image.image_size: {side} is not a multiple of the model's patches of {patch} pixels, so that a part of the image "
            f"would be left out; set {near}"
        )


def config_of(source: str) -> dict[str, Any]:
    """The config of a model in a folder, a file or on the Hub; empty for no source. Raises UserError."""
    if not source:
        return {}
    path = Path(source).expanduser()
    if path.exists():
        return read_json(path / "config.json" if path.is_dir() else path)
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(source)[0])
    except Exception as error:
        raise UserError(f"model.name_or_path: {source}: {first_line(error)}") from error
