"""Predicting which class, or classes, an image has, by the models of AutoModelForImageClassification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.data.image_rows import OUR_COLUMNS, ImageFormat
from hfstrat.errors import UserError
from hfstrat.tasks.base import Quality, Rows, Score, Task, Values
from hfstrat.tasks.heads import names_of
from hfstrat.tasks.text_classification import Classifier, ClassMetrics, LabelText, chosen_labels

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.image_classes import ImageClasses
    from hfstrat.data.image_files import ImageRef
    from hfstrat.models.load import Base
    from hfstrat.models.pooling import Pooling
    from hfstrat.recipe.data import Data, Source
    from hfstrat.recipe.schema import Model as ModelSection
    from hfstrat.recipe.schema import Recipe

NAME = "image-classification"
THUMBNAIL, SHEET = 200, 1000  # pixels of the longer side of a picture on a page
PROCESSOR = "preprocessor_config.json"


class ImageRows(Rows):
    """Images with one class, or any number of them."""

    columns = OUR_COLUMNS
    noun = "image"
    framed = False

    @property
    def reader(self) -> Callable[..., Any]:
        return ImageFormat.detect

    def load_processor(self, recipe: Recipe, family: str = "") -> Any:
        from hfstrat.tasks.image_classification.processor import load

        return load(recipe, family)

    def load_trained(self, folder: str) -> Any:
        from hfstrat.tasks.image_classification.processor import load_trained

        return load_trained(folder)

    def check_processor(self, model: ModelSection, network: bool) -> None:
        from hfstrat.models import check

        source, key = (model.tokenizer, "model.tokenizer") if model.tokenizer else (model.name_or_path, "model.name_or_path")
        expected = "a folder or a Hub id with an image processor"
        folder = check.local_folder(key, source, None, PROCESSOR, expected, network and bool(model.tokenizer))
        if folder is not None and not self.has_processor(folder):
            raise UserError(
                f"{key}: {source} has no image processor ({PROCESSOR}); set model.tokenizer to the folder or Hub id of one"
            )

    def has_processor(self, folder: Path) -> bool:
        return (folder / PROCESSOR).is_file()

    def same_inputs(self, one: Any, other: Any) -> bool:
        return bool(one.processor.to_dict() == other.processor.to_dict())

    def check_source(self, source: Source, data: Data, key: str) -> bool:
        from hfstrat.data import image_rows

        image_rows.check_source(source, data, key, self.reader)
        return True

    def digest(self, source: Source, data: Data, key: str) -> str:
        from hfstrat.data.image_rows import ImageSource

        return ImageSource.open(source, data, key).digest()

    def as_text(self, row: dict[str, Any], tokenizer: Any, most: int | None = None) -> str:
        from hfstrat.data.image_files import ImageRef

        return ImageRef(row["path"], row["member"]).name

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

        return jpeg(open_row(example) if isinstance(example, dict) else ref_of(example).open(), THUMBNAIL)

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> ImageClasses:
        from hfstrat.data.image_classes import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> ImageClasses:
        from hfstrat.data.image_classes import prepare_eval

        many = config.problem_type == "multi_label_classification"
        return prepare_eval(data, tokenizer, names_of(config), many, samples, max_rows)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.image_batches import ImageCollator

        return ImageCollator(tokenizer, len(data.label_names) if data.many else None)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return dict(data.train[0])  # all images have the size of the model

    def inputs_of(self, data: Any, row: dict[str, Any], most: int) -> dict[str, Any]:
        from hfstrat.data.image_batches import open_row

        return {"pixel_values": data.renderer.pixels([open_row(row)])}

    def probe(self, data: Any, collate: Any) -> dict[str, Any]:
        return {"pixel_values": collate([data.eval[0], data.eval[len(data.eval) - 1]])["pixel_values"]}


class ImageModel(Classifier):
    """AutoModelForImageClassification."""

    peft_type = None  # PEFT has no type for it: its general class passes pixels on
    reads_tokens = False
    sees_images = True
    random_family = "vit"
    auto_class = "AutoModelForImageClassification"
    architecture = "ForImageClassification"

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None] | None:
        from hfstrat.models import unused_parameters

        return unused_parameters.use_all(base.model)  # such as the mask token of DINOv2

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        from hfstrat.models.transformers_source import families_of

        known, family = families_of(self.auto_class), str(config.get("model_type", ""))
        if known and family not in known:
            raise UserError(_no_image_model(path, family))

    def check_config(self, name: str, config: Any) -> None:
        from transformers import AutoModelForImageClassification

        if type(config) not in AutoModelForImageClassification._model_mapping:
            raise UserError(_no_image_model(name, config.model_type))

    def pooling(self, model: ModelSection, config: dict[str, Any]) -> tuple[Pooling | None, dict[str, Any]]:
        return None, {}

    def shapes(
        self, shapes: dict[str, Any], config: dict[str, Any], labels: int, pooled: bool = False
    ) -> tuple[dict[str, Any], bool] | None:
        return None  # transformers decides when the model is loaded

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
        theirs = from_source(str(Path(name).expanduser()) if Path(name).expanduser().exists() else name, {}, "strategy.teacher")
        for key in ("image_mean", "image_std", "rescale_factor", "do_normalize", "do_rescale"):
            ours, given = getattr(processor.processor, key, None), getattr(theirs, key, None)
            if ours != given:
                raise UserError(
                    f"strategy.teacher: {name}: its image processor has {key} {given}, and that of the student {ours}, so that "
                    f"the same pixels mean other colors; set model.tokenizer: {name}, or use another teacher"
                )
        fit_size(teacher, processor.height, processor.width)

    def random_config(self, family: str, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The settings of a random model with the size of the images."""
        from hfstrat.models.transformers_source import config_keys

        return {**settings, "image_size": tokenizer.height} if "image_size" in config_keys(family) else settings

    def write_config(self, base: Base, folder: Path) -> None:
        base.model.config.architectures = [type(base.model).__name__]  # of a checkpoint without a head it is the body's class
        super().write_config(base, folder)


def _no_image_model(name: str, family: str) -> str:
    return (
        f"model.name_or_path: {name} is a {family} model, for which transformers has no image classification; expected a model "
        "such as ViT, DINOv2, Swin, ConvNeXt or ResNet"
    )


@dataclass(frozen=True)
class ImageMetrics(ClassMetrics):
    """Loss (nats per image or, with several classes, per class), accuracy, F1, and what rankings by probability give."""

    names: ClassVar[tuple[str, ...]] = (
        *("loss", "accuracy", "balanced_accuracy", "macro_f1", "micro_f1"),
        *("auroc", "average_precision", "rows"),
    )

    @property
    def quality(self) -> Quality:
        return Quality("accuracy", True, "right", "rows")

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """As of `ClassMetrics`, and the probabilities `[B, classes]` in float32."""
        kept: list[Any] = []

        def outputs(**given: Any) -> Any:
            kept.append(model(**given))
            return kept[0]

        config, labels = getattr(model, "config", None), inputs["labels"]
        outputs.config = config  # type: ignore[attr-defined]
        found = super().sums(outputs, inputs)
        logits = kept[0]["logits"].float()
        return *found, logits.sigmoid() if labels.is_floating_point() else logits.softmax(-1)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        from hfstrat.tasks.image_classification.scores import by_class, score_of

        totals, marks, chances = sums
        values, details = super().measure((totals, marks))
        values |= score_of(marks, chances, len(self.labels))(np.ones(len(marks)))
        for row, more in zip(details["labels"], by_class(marks, chances, len(self.labels)), strict=False):
            row |= more
        return values, details

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.image_classification.scores import score_of

        totals, marks, chances = sums
        plain, ranked = super().score((totals, marks), extra), score_of(marks, chances, len(self.labels))
        return lambda weights: plain(weights) | ranked(weights)

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        return super().columns(sums[:2])


class ImageText(LabelText):
    """Predictions are class names with probabilities."""

    pipeline = NAME
    unit = "image"
    processor = ("processor", "AutoImageProcessor")

    def outputs(self, model: Any, texts: Any, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        """The classes of an image.

        Args:
            texts: the `ImageProcessor`.
            prompt: an `ImageRef`, or the path of a file.
        """
        import torch

        from hfstrat.data.image_files import Unreadable

        ref, was_training = ref_of(prompt), model.training
        try:
            image = ref.open()
        except Unreadable as error:
            raise UserError(f"{ref.name}: {error}") from None
        weights = next(model.parameters())
        pixels = texts.pixels([image]).to(weights.device, weights.dtype if dtype == torch.float32 else torch.float32)
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(weights.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(pixel_values=pixels).logits[0].float()
        finally:
            model.train(was_training)
        return chosen_labels(model.config, logits)

    def prompt(self, prompt: Any) -> str:
        return ref_of(prompt).name

    def metrics(self, metrics: Values) -> str:
        more = f", balanced accuracy {metrics['balanced_accuracy']:.1%}" if "balanced_accuracy" in metrics else ""
        return super().metrics(metrics) + more

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.image_classification.scores import lines_of

        return [*super().details(details), *lines_of(details)]

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        lines = [
            "from transformers.image_utils import load_image",
            "",
            'inputs = processor(load_image("image.jpg"), return_tensors="pt")',
            "logits = model(**inputs).logits",
        ]
        return [*lines, *super().example(chats, sentence, options, config)[2:]]


def ref_of(prompt: Any) -> ImageRef:
    """An image as it is found, from itself or the path of a file."""
    from hfstrat.data.image_files import ImageRef

    return ImageRef(str(Path(prompt).expanduser())) if isinstance(prompt, str) else prompt


TEXT_ONLY = ("max_length", "overflow", "template", "train_on", "chat_template_kwargs", "documents")


def check_images(recipe: Recipe) -> None:
    """Refuse settings that are for texts, in a task of images. Raises UserError."""
    from hfstrat.data.image_files import check_installed

    check_installed(recipe.task)
    for key in TEXT_ONLY:
        if getattr(recipe.data, key) != type(recipe.data).model_fields[key].default:
            raise UserError(f"data.{key}: it is for texts; remove it for task: {recipe.task}")
    model = recipe.model
    for key in ("add_tokens", "pooling", "quantization"):
        if getattr(model, key):
            raise UserError(f"model.{key}: it is for models of text; remove it for task: {recipe.task}")
    if model.gguf_file:
        raise UserError("model.name_or_path: a .gguf file is read for task: causal-lm only; give a model folder or a Hub id")
    for key in ("metrics", "choices", "lm_eval"):
        if getattr(recipe.evaluation, key):
            raise UserError(f"evaluation.{key}: it is for models that generate text; remove it for {recipe.task}")
    if recipe.evaluation.control not in ("auto", "off"):
        raise UserError(f"evaluation.control: it is a language model's loss; remove it for {recipe.task}")
    if recipe.training.must_pack:
        given = str(recipe.training.packing).lower()
        raise UserError(f"training.packing: {given}: examples of {recipe.task} are not packed; set auto or false")
    if recipe.training.train_sampling_strategy == "group_by_length":
        raise UserError("training.train_sampling_strategy: group_by_length: images have no length; set auto or random")
    if recipe.image.augmentation == "on" and not recipe.strategy.takes_augmented:
        raise UserError(
            f"image.augmentation: strategy {recipe.strategy.name} computes the features of each image once, so that they "
            "cannot vary; set off or auto"
        )


class ImageClassification(Task):
    """The task `image-classification`."""

    name = NAME
    rows = ImageRows()
    model = ImageModel()
    metrics = ImageMetrics()
    text = ImageText()

    def check(self, recipe: Recipe) -> None:
        check_images(recipe)
