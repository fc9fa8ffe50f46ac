"""Predicting which class, or classes, an image has, by the models of AutoModelForImageClassification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hfstrat.data.image_files import IMAGE
from hfstrat.data.image_rows import OUR_COLUMNS, ImageFormat, ImageSource
from hfstrat.errors import UserError
from hfstrat.tasks.media import MediaMetrics, MediaModel, MediaRows, MediaTask, MediaText, check_augmentation, ref_of

if TYPE_CHECKING:
    import torch

    from hfstrat.data.media_files import MediaRef
    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Recipe

NAME = "image-classification"
THUMBNAIL, SHEET = 200, 1000  # pixels of the longer side of a picture on a page


class ImageRows(MediaRows):
    """Images with one class, or any number of them."""

    columns = OUR_COLUMNS
    noun = "image"
    kind, opens = IMAGE, ImageSource
    processor_name = "an image processor"

    @property
    def reader(self) -> Callable[..., Any]:
        return ImageFormat.detect

    def given(self, config: dict[str, Any], shapes: dict[str, Any], processor: dict[str, Any], recipe: Recipe) -> Any:
        from hfstrat.tasks.image_classification.given import given

        return given(config, shapes, processor, recipe)

    def load_processor(self, recipe: Recipe, family: str = "") -> Any:
        from hfstrat.tasks.image_classification.processor import load

        return load(recipe, family)

    def load_trained(self, folder: str, recipe: Recipe | None = None) -> Any:
        from hfstrat.tasks.image_classification.processor import load_trained

        return load_trained(folder)

    def size_of(self, row: dict[str, Any]) -> str:
        return f"{row['width']:,} x {row['height']:,} pixels"

    def draw(self, data: Any, file: Path) -> str:
        from hfstrat.data.contact_sheet import draw

        return draw(data, file)

    def sheet(self, data: Any) -> bytes:
        from hfstrat.data.contact_sheet import jpeg, sheet_of

        return jpeg(sheet_of(data)[0], SHEET)

    def picture(self, example: Any) -> bytes:
        from hfstrat.data.contact_sheet import jpeg
        from hfstrat.data.image_batches import open_row

        return jpeg(open_row(example) if isinstance(example, dict) else ref_of(example, IMAGE).open(), THUMBNAIL)

    @property
    def preparing(self) -> Any:
        from hfstrat.data import image_classes

        return image_classes

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.image_batches import ImageCollator

        return ImageCollator(tokenizer, len(data.label_names), data.many)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return dict(data.train[0])  # all images have the size of the model

    def inputs_of(self, data: Any, row: dict[str, Any], most: int) -> dict[str, Any]:
        from hfstrat.data.image_batches import open_row

        return {"pixel_values": data.renderer.pixels([open_row(row)])}

    def probe(self, data: Any, collate: Any) -> dict[str, Any]:
        return {"pixel_values": collate([data.eval[0], data.eval[len(data.eval) - 1]])["pixel_values"]}


class ImageModel(MediaModel):
    """AutoModelForImageClassification."""

    sees_images = True
    random_family = "vit"
    auto_class = "AutoModelForImageClassification"
    architecture = "ForImageClassification"
    what, expected = "image classification", "ViT, DINOv2, Swin, ConvNeXt or ResNet"

    def stack(self, name: str, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> Any:
        from hfstrat.tasks.image_classification.given import stack

        return stack(name, shapes, config, labels)

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Give the model position embeddings for the size of the images."""
        from hfstrat.models.positions import fit_size

        vars(base.model.config).pop("label_thresholds", None)  # of an earlier training
        if line := fit_size(base.model, tokenizer.height, tokenizer.width):
            base.say(line)

    def check_teacher(self, teacher: Any, section: Any, processor: Any) -> None:
        from hfstrat.models.positions import fit_size
        from hfstrat.tasks.image_classification.processor import from_source

        name = section.name_or_path
        source = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        theirs = from_source(source, section.options, "strategy.teacher")
        for key in ("image_mean", "image_std", "rescale_factor", "do_normalize", "do_rescale"):
            ours, given = getattr(processor.processor, key, None), getattr(theirs, key, None)
            if ours != given:
                raise UserError(
                    f"strategy.teacher: {name}: its image processor has {key} {given}, and that of the student {ours}, so that "
                    f"the same pixels mean other colors; set model.tokenizer: {name}, or use another teacher"
                )
        fit_size(teacher, processor.height, processor.width)

    def random_inputs(self, family: str, recipe: Recipe) -> dict[str, Any]:
        """The size of the images, where the recipe sets one."""
        from hfstrat.models.transformers_source import config_keys

        size = recipe.image.image_size
        return {"image_size": size} if size is not None and "image_size" in config_keys(family) else {}

    def random_config(self, family: str, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The settings of a random model with the size of the images."""
        from hfstrat.models.transformers_source import config_keys

        return {**settings, "image_size": tokenizer.height} if "image_size" in config_keys(family) else settings


@dataclass(frozen=True)
class ImageMetrics(MediaMetrics):
    """Metrics of classes of images."""

    def for_training(self, recipe: Recipe, data: Any) -> Self:
        return replace(super().for_training(recipe, data), mixes=bool(recipe.image.mixup) and not data.many)


class ImageText(MediaText):
    """Predictions are class names with probabilities."""

    pipeline = NAME
    unit = "image"
    kind = IMAGE
    processor = ("processor", "AutoImageProcessor")

    def inputs(self, processor: Any, ref: MediaRef) -> dict[str, torch.Tensor]:
        return {"pixel_values": processor.pixels([ref.open()])}

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        lines = [
            "from transformers.image_utils import load_image",
            "",
            'inputs = processor(load_image("image.jpg"), return_tensors="pt")',
            "logits = model(**inputs).logits",
        ]
        return [*lines, *super().example(chats, sentence, options, config)[2:]]


class ImageTask(MediaTask):
    """A task whose examples are images."""

    def check(self, recipe: Recipe) -> None:
        from hfstrat.data.image_files import check_installed

        check_installed(self.name)
        super().check(recipe)
        if recipe.training.train_sampling_strategy == "group_by_length":
            raise UserError("training.train_sampling_strategy: group_by_length: images have no length; set auto or random")
        check_augmentation("image", recipe, "image")


class ImageClassification(ImageTask):
    """The task `image-classification`."""

    name = NAME
    rows = ImageRows()
    model = ImageModel()
    metrics = ImageMetrics()
    text = ImageText()

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        check_views(recipe)
        if recipe.image.mixup and recipe.training.class_weights == "focal":
            raise UserError(
                f"image.mixup: {recipe.image.mixup:g}: the focal loss is for one class per image, and a mixed image has two; "
                "set class_weights: balanced, or mixup: 0"
            )


def check_views(recipe: Recipe) -> None:
    """Refuse views of images where they would not be used. Raises UserError."""
    wanted, given = recipe.image, f"image.views: {recipe.image.views}"
    if wanted.views == 1:
        return
    if not recipe.strategy.takes_views:
        raise UserError(f"{given}: they are for strategy head, and not for {recipe.strategy.name}; remove it")
    if wanted.augmentation == "off":
        raise UserError(
            f"{given}: views are changes of the images, and augmentation is off; set augmentation: auto, or views: 1"
        )
    if wanted.changes._replace(mixup=0.0) == (1, False, 0, 0):
        raise UserError(
            f"{given}: without crop, flip and color all views of an image are the same; set one of them, or views: 1"
        )
    if wanted.mixup:
        raise UserError(f"image.mixup: {wanted.mixup:g}: views are of one image each; set mixup: 0, or views: 1")
