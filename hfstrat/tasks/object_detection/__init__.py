"""Finding objects of some classes in images, by the models of AutoModelForObjectDetection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from hfstrat.data.box_format import OUR_COLUMNS, BoxFormat
from hfstrat.data.box_rows import BoxSource
from hfstrat.errors import UserError
from hfstrat.tasks.base import Metrics, Quality, Score, Values, check_one_stack
from hfstrat.tasks.heads import continued, names_of
from hfstrat.tasks.image_classification import ImageModel, ImageRows, ImageTask, ImageText
from hfstrat.tasks.media import outputs_of
from hfstrat.tasks.object_detection.families import check_family

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.box_classes import Boxes
    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe

NAME = "object-detection"
THRESHOLD = 0.5  # of a score, from which a box is predicted, as in a pipeline
INPUTS = ("pixel_values",)  # of a forward pass; a batch has the boxes too


class Found(NamedTuple):
    """A predicted box: its corners in pixels of the image."""

    label: str
    score: float
    box: tuple[float, float, float, float]


class BoxRows(ImageRows):
    """Images with any number of boxes."""

    columns = OUR_COLUMNS
    opens = BoxSource

    @property
    def reader(self) -> Callable[..., Any]:
        return BoxFormat.detect

    def load_processor(self, recipe: Recipe, family: str = "") -> Any:
        from hfstrat.tasks.object_detection.processor import load

        return load(recipe, family)

    def load_trained(self, folder: str, recipe: Recipe | None = None) -> Any:
        from hfstrat.tasks.object_detection.processor import load_trained

        return load_trained(folder)

    def draw(self, data: Any, file: Path) -> str:
        from hfstrat.data.box_drawing import draw_examples

        return draw_examples(data, file)

    @property
    def preparing(self) -> Any:
        from hfstrat.data import box_classes

        return box_classes

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Boxes:
        found: Boxes = self.preparing.prepare_eval(data, tokenizer, names_of(config), samples, max_rows)
        return found

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.box_batches import BoxCollator

        return BoxCollator(tokenizer, data.most)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        counts = [len(labels) for labels in data.train["label"][:]]
        return dict(data.train[counts.index(max(counts))])


class Detector(ImageModel):
    """AutoModelForObjectDetection."""

    random_family = "rt_detr_v2"
    auto_class = "AutoModelForObjectDetection"
    has_predicted_costs = False
    costs_unknown = "a detector consists of parts of different widths, whose cost depends on the sizes of the images"
    architecture = "ForObjectDetection"
    config_keys = ("id2label", "label2id")

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        check_family(path, str(config.get("model_type", "")))

    def check_config(self, name: str, config: Any) -> None:
        check_family(name, config.model_type)

    def config_options(self, data: Any, tokenizer: Any) -> dict[str, Any]:
        return {name: value for name, value in super().config_options(data, tokenizer).items() if name in self.config_keys}

    def problem_type(self, data: Any) -> str:
        return ""

    def stored_outputs(self, config: Any, pooling: Any = None) -> dict[str, Any]:
        return {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}

    def split_missing(self, model: Any, missing: list[str]) -> tuple[list[str], list[str]]:
        from hfstrat.models.blocks import head_modules

        return head_modules(model), missing

    def fit_outputs(self, base: Base, config: Any, data: PreparedData | None) -> None:
        """Continue the class layers of the checkpoint for classes of the same name; others are new."""
        from hfstrat.models.class_outputs import set_names
        from hfstrat.tasks.object_detection.class_layers import arrange

        names = list(data.label_names if data is not None else names_of(config))
        sources, lines = continued(names_of(config), names, "the checkpoint")
        for line in lines:
            base.say(line)
        base.new_head = None in sources
        if sources == list(range(base.model.config.num_labels)):
            set_names(base.model, names)
        else:
            arrange(base.model, sources, names)

    def fit_adapter(self, base: Base, source: str) -> Callable[[Any], None]:
        from hfstrat.tasks.heads import adapter_config

        ours, config = names_of(base.model.config), adapter_config(base, source)
        theirs = ours if config is None else names_of(config)
        if theirs != ours:
            raise UserError(
                f"strategy.adapter: {source} detects {', '.join(theirs)}, and the data have {', '.join(ours)}; a detector's "
                "adapter is continued on the same classes only"
            )
        return lambda model: None

    def adapt(self, base: Base, tokenizer: Any) -> None:
        base.backbone = backbone_of(base.model)

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None] | None:
        """Make the model return the sums of its loss; the model as transformers defines it is saved."""
        from hfstrat.tasks.object_detection.loss import bind

        queries = queries_of(base.model.config)
        if queries is not None and data.most > queries:
            raise UserError(
                f"model.name_or_path: an image of the data has {data.most} boxes, but this model has {queries} queries, so "
                "that it cannot find all of them; use a model with more, or remove the image"
            )
        return bind(base.model)

    def random_config(self, family: str, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The settings of a random model; YOLOS has its image size in the config."""
        if family == "yolos":
            return {**settings, "image_size": [tokenizer.height, tokenizer.width]}
        return settings

    def load_options(self, folder: str) -> dict[str, Any]:
        from transformers import AutoConfig

        return {"config": AutoConfig.from_pretrained(folder)}


def queries_of(config: Any) -> int | None:
    """How many objects a model can find in an image."""
    found = getattr(config, "num_queries", None) or getattr(config, "num_detection_tokens", None)
    return int(found) if found else None


def backbone_of(model: Any) -> str:
    """The name of the module that makes features of an image, which a detector has below its encoder and decoder."""
    body, found = model.base_model_prefix, ""
    inner: Any = getattr(model, body, None)
    if inner is None:
        return ""
    found = body
    while getattr(inner, "backbone", None) is not None:
        inner, found = inner.backbone, f"{found}.backbone"
    return found


@dataclass(frozen=True)
class BoxMetrics(Metrics):
    """Loss of the last layer per box, and the average precision of COCO.

    `processor` turns outputs into boxes, `most` are boxes of an image at most, `step_images` are images of an optimizer step.
    """

    processor: Any = None
    most: int = 1
    step_images: int | None = None

    names: ClassVar[tuple[str, ...]] = ("loss", "map", "map50", "map75", "rows")
    of_distributions: ClassVar[bool] = False
    can_overfit: ClassVar[bool] = False  # the loss in training is a sum over the layers of the decoder
    has_baselines: ClassVar[bool] = False

    @property
    def quality(self) -> Quality:
        return Quality("map", True, "map", "rows")

    def for_data(self, data: PreparedData) -> Self:
        boxes: Any = data
        return replace(super().for_data(data), processor=data.renderer.processor, most=boxes.most)

    def for_training(self, recipe: Recipe, data: PreparedData) -> Self:
        found = super().for_training(recipe, data)
        return replace(found, step_images=recipe.training.global_batch_size)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        import torch

        from hfstrat.data.render import IGNORED
        from hfstrat.tasks.object_detection.loss import scaled

        whole = num_items_in_batch is not None
        boxes = torch.as_tensor(num_items_in_batch if whole else (labels != IGNORED).sum()).to(outputs["loss"])
        return scaled(outputs["loss"], boxes, self.step_images if whole and self.step_images else len(labels))

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Loss and boxes `[B, 2]`; score, class and corners of detections `[B, K, 6]`; class and corners of boxes `[B, M, 5]`.

        What fills up has a score of -1 and the class -1.
        """
        import torch

        from hfstrat.tasks.object_detection.detections import detections_of, truth_of
        from hfstrat.tasks.object_detection.loss import image_sums, targets_of

        outputs = model(**{name: inputs[name] for name in INPUTS})
        logits, boxes = outputs["logits"].float(), outputs["pred_boxes"].float()
        targets = targets_of(inputs["boxes"], inputs["class_labels"])
        config = getattr(model, "module", model).config
        totals = torch.stack(
            [image_sums(config, logits, boxes, targets), (inputs["class_labels"] >= 0).sum(1).to(logits)], dim=1
        )
        found = detections_of(self.processor, logits, boxes, inputs["sizes"])
        return totals, found, truth_of(inputs["boxes"], inputs["class_labels"], inputs["sizes"])

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        from hfstrat.tasks.object_detection.scores import Detections, details_of

        totals, found, true = sums
        detections = Detections(found, true, len(self.labels))
        values = {"loss": _per_box(totals, np.ones(len(totals))), "rows": float(len(totals))}
        values |= detections.score(np.ones(len(totals)))
        return values, {"labels": details_of(detections, self.labels, len(totals))}

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.object_detection.scores import MOST_NAMED, MOST_RANKED, Detections

        totals, found, true = sums
        detections = Detections(found, true, len(self.labels))
        named = self.labels if len(self.labels) <= MOST_NAMED and detections.count <= MOST_RANKED else ()

        def score(weights: np.ndarray) -> dict[str, float]:
            resampled = detections.count > MOST_RANKED and (weights != 1).any()
            ranked = {} if resampled else detections.score(weights, named)
            return {"loss": _per_box(totals, weights), **ranked}

        return score

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        import numpy as np

        return {"nll": sums[0][:, 0].astype(np.float64), "items": sums[0][:, 1].astype(np.float64)}


def _per_box(totals: np.ndarray, weights: np.ndarray) -> float:
    loss, boxes = weights @ totals.astype("float64")
    return float(loss / max(boxes, 1.0))


class BoxText(ImageText):
    """Predictions are boxes with a class and a score."""

    pipeline = NAME
    unit = "box"
    finds_boxes = True

    def outputs(  # type: ignore[override]
        self, model: Any, texts: Any, prompt: Any, dtype: torch.dtype, threshold: float = THRESHOLD
    ) -> list[Found]:
        """The boxes of an image whose score is above the threshold, the best first.

        Args:
            texts: the `ImageProcessor`.
            prompt: an `ImageRef`, or the path of a file.
        """
        import torch

        from hfstrat.data.media_files import Unreadable
        from hfstrat.tasks.object_detection.detections import kept_of

        ref = self.ref_of(prompt)
        try:
            image = ref.open()
        except Unreadable as error:
            raise UserError(f"{ref.name}: {error}") from None
        outputs = outputs_of(model, {"pixel_values": texts.pixels([image])}, dtype)
        size = torch.tensor([[image.size[1], image.size[0]]])
        scores, labels, boxes = kept_of(texts.processor, outputs["logits"], outputs["pred_boxes"], size, threshold)[0]
        found = zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
        return [Found(model.config.id2label[label], score, tuple(box)) for label, score, box in found]

    def draw(self, image: Any, outputs: Any, file: Path) -> None:
        from hfstrat.data.box_drawing import draw_boxes

        names = sorted({one.label for one in outputs})
        texts = [f"{one.label} {one.score:.0%}" for one in outputs]
        labels = [names.index(one.label) for one in outputs]
        draw_boxes(image.open(), [one.box for one in outputs], labels, texts, len(names)).save(file)

    def line(self, outputs: Any) -> str:
        counts = {one.label: sum(each.label == one.label for each in outputs) for one in outputs}
        return ", ".join(f"{count} {label}" for label, count in counts.items()) or "(no boxes)"

    def record(self, outputs: Any) -> dict[str, Any]:
        sides = ("xmin", "ymin", "xmax", "ymax")
        return {
            "objects": [
                {"label": one.label, "score": one.score, "box": dict(zip(sides, map(int, one.box), strict=True))}
                for one in outputs
            ]
        }

    def metrics(self, metrics: Values) -> str:
        if "map" not in metrics:
            return f"loss {metrics['loss']:.4f}"
        return f"loss {metrics['loss']:.4f}, mAP {metrics['map']:.1%}, mAP50 {metrics['map50']:.1%}"

    def change(self, before: Values, after: Values) -> str:
        return f"mAP {before['map']:.1%} -> {after['map']:.1%}, mAP50 {before['map50']:.1%} -> {after['map50']:.1%}"

    def target(self, value: Any, names: tuple[str, ...]) -> str:
        counts = {names[label]: value.count(label) for label in dict.fromkeys(value)}
        return "boxes: " + (", ".join(f"{count} {name}" for name, count in counts.items()) or "none")

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.object_detection.scores import lines_of

        return lines_of(details)

    def sections(self, result: Any, pictures: Any) -> list[Any]:
        return []  # the metrics of each class are among the others

    def advice(self, result: Any) -> list[tuple[str, str]]:
        return []

    def agreement(self, name: str, one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
        off = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
        return f"logits and boxes of {name} and of the merged model differ by at most {off:.2e}"

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        return [
            "from transformers.image_utils import load_image",
            "",
            'image = load_image("image.jpg")',
            'outputs = model(**processor(image, return_tensors="pt"))',
            "size = [(image.height, image.width)]",
            "found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=size)[0]",
            'for label, score, box in zip(found["labels"], found["scores"], found["boxes"]):',
            "    print(model.config.id2label[int(label)], round(float(score), 3), box.tolist())",
        ]


class ObjectDetection(ImageTask):
    """The task `object-detection`."""

    name = NAME
    rows = BoxRows()
    model = Detector()
    metrics = BoxMetrics()
    text = BoxText()

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        check_matching()
        if recipe.training.class_weights is not None:
            raise UserError(f"training.class_weights: it is for classifiers; remove it for task: {self.name}")
        if recipe.image.views > 1:
            raise UserError(f"image.views: {recipe.image.views}: they are for task: image-classification; remove it")
        if recipe.image.mixup:
            raise UserError(
                f"image.mixup: {recipe.image.mixup:g}: it mixes the classes of images; remove it for task: {self.name}"
            )
        check_one_stack(recipe, "a detector has a backbone and a decoder")


def check_matching() -> None:
    """Raises UserError where scipy is not installed, by which the losses match queries with boxes. Imports nothing."""
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise UserError(f"task: {NAME} needs scipy, which matches queries with boxes: pip install scipy")
