"""Answering conversations with images, by the models of AutoModelForImageTextToText."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data.image_messages import OUR_COLUMNS, ImageTextFormat
from hfstrat.data.image_places import COLUMNS
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.format import plural
from hfstrat.recipe.objectives import ObjectiveSection
from hfstrat.tasks.base import Rows, Task, check_one_stack
from hfstrat.tasks.causal_lm import LanguageModel, LanguageText, TokenMetrics

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.image_chats import ImageTexts
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data, Source
    from hfstrat.recipe.schema import Model as ModelSection
    from hfstrat.recipe.schema import Recipe

NAME = "image-text-to-text"
FILES = ("processor_config.json", "preprocessor_config.json")
PROBED = 2  # rows on which a saved model is compared
THUMBNAIL, MOST_PIXELS = 200, 800  # pixels of the longer side of an image on a page, and of several in a row
FROZEN = ("vision",)  # unless strategy.freeze is set


class ImageTextRows(Rows):
    """Conversations with images."""

    columns = OUR_COLUMNS
    framed = False

    @property
    def reader(self) -> Callable[..., Any]:
        return ImageTextFormat.detect

    def fits(self, reading: Any, head: list[dict[str, Any]]) -> bool:
        """Whether some row has an image: conversations alone are of a causal LM."""
        try:
            return any(reading.example(row).images for row in head)
        except BadRow:
            return any(row.get(name) for row in head for name in COLUMNS)

    def load_processor(self, recipe: Recipe, family: str = "") -> Any:
        from hfstrat.tasks.image_text_to_text.processor import load

        return load(recipe)

    def load_trained(self, folder: str, recipe: Recipe | None = None) -> Any:
        from hfstrat.tasks.image_text_to_text.processor import load_trained

        return load_trained(folder)

    def check_processor(self, model: ModelSection, network: bool) -> None:
        from hfstrat.models import check

        source, key = (model.tokenizer, "model.tokenizer") if model.tokenizer else (model.name_or_path, "model.name_or_path")
        expected = "a folder or a Hub id with a processor of images and text"
        folder = check.local_folder(key, source, None, FILES[1], expected, network and bool(model.tokenizer))
        if folder is not None and not self.has_processor(folder):
            raise UserError(
                f"{key}: {source} has no processor of images ({' or '.join(FILES)}), as a model of text has none; set task: "
                "causal-lm, or model.tokenizer to a folder or Hub id with a processor"
            )

    def has_processor(self, folder: Path) -> bool:
        return any((folder / name).is_file() for name in FILES)

    def same_inputs(self, one: Any, other: Any) -> bool:
        same = one.processor.image_processor.to_dict() == other.processor.image_processor.to_dict()
        return same and super().same_inputs(one, other)

    def check_source(self, source: Source, data: Data, key: str) -> bool:
        from hfstrat.data.image_messages import ImageTextSource
        from hfstrat.data.media_rows import check_source

        check_source(source, data, key, self.reader, ImageTextSource)
        return True

    def digest(self, source: Source, data: Data, key: str) -> str:
        from hfstrat.data.image_messages import ImageTextSource

        return ImageTextSource.open(source, data, key).digest()

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> ImageTexts:
        from hfstrat.data.image_chats import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> ImageTexts:
        from hfstrat.data.image_chats import prepare_eval

        return prepare_eval(data, tokenizer, samples, max_rows)

    def check_sharded(self, data: Any) -> None:
        """Refuse rows without images: a process whose batch has none would not gather the weights of the tower."""
        from hfstrat.data.splits import column

        if without := sum(int((column(rows, "image_tokens") == 0).sum()) for rows in (data.train, data.eval)):
            raise UserError(
                f"data.train: {plural(without, 'row')} without images, but with sharded weights (FSDP, DeepSpeed) each "
                "process has to run the vision tower in every step; use --accelerate-config ddp, or remove these rows"
            )

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.image_text_batches import ImageTextCollator
        from hfstrat.models.fused_loss import is_bound
        from hfstrat.models.load import takes_logits_mask

        return ImageTextCollator(tokenizer, multiple, takes_logits_mask(base.model), selects_rows=is_bound(base.model))

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        """The training row with the most image tokens, with loss on the rest, made as long as the longest."""
        row = dict(data.train[int(data.counts["image_tokens"].argmax())])
        ids = lengthened(row["input_ids"], length, data.renderer.processor)
        return {**row, "input_ids": ids, "labels": ids}

    def inputs_of(self, data: Any, row: dict[str, Any], most: int) -> dict[str, Any]:
        """The inputs of one row, complete: an image is never cut."""
        from hfstrat.data.image_text_batches import ImageTextCollator

        batch = ImageTextCollator(data.renderer.processor, 1, False)([self.parts(row)[0][1]])
        return {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}

    def probe(self, data: Any, collate: Any) -> dict[str, Any]:
        from hfstrat.data.image_text_batches import ImageTextCollator

        plain = ImageTextCollator(data.renderer.processor, 1, False)
        places = range(len(data.eval) - 1, max(-1, len(data.eval) - 1 - PROBED), -1)
        rows = [self.parts(data.eval[place])[0][1] for place in places]
        return {name: value for name, value in plain(rows).items() if name != "labels"} | {"use_cache": False}

    def renderer(self, tokenizer: Any, template: str, options: Mapping[str, Any] | None = None) -> Any:
        from hfstrat.data.image_render import ImageRenderer

        return ImageRenderer(tokenizer, template, options=options)

    def shown(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The row with one token in the place of those of each image."""
        ids, labels, done = list[int](), list[int](), 0
        for start, end in zip(row["spans"][::2], row["spans"][1::2], strict=True):
            ids += [*row["input_ids"][done:start], tokenizer.image_ids[0]]
            labels += row["labels"][done : start + 1]
            done = end
        folded = {"input_ids": ids + row["input_ids"][done:], "labels": labels + row["labels"][done:]}
        return {**row, "length": len(row["input_ids"]), **folded}

    def note(self, row: dict[str, Any]) -> str:
        tokens = sum(end - start for start, end in zip(row["spans"][::2], row["spans"][1::2], strict=True))
        images = plural(len(row["images"]), "image")
        return f"{tokens:,} tokens are of {images}, each shown as one" if row["images"] else ""

    def draw(self, data: Any, file: Path) -> str:
        from hfstrat.data.image_text_sheet import draw

        return draw(data, file)

    def picture(self, example: Any) -> bytes:
        images = example.get("images") if isinstance(example, dict) else None
        if not images:
            return b""
        from hfstrat.data.contact_sheet import jpeg
        from hfstrat.data.image_text_sheet import strip

        return jpeg(strip(images, THUMBNAIL), MOST_PIXELS)


class ImageTextModel(LanguageModel):
    """AutoModelForImageTextToText, with our loss bound to its forward."""

    peft_type = None  # PEFT's class for causal LMs would be loaded on AutoModelForCausalLM
    sees_images = True
    auto_class = "AutoModelForImageTextToText"
    architecture = "ForConditionalGeneration"
    if_missing = "it is no vision-language model or is damaged"

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        from hfstrat.models.transformers_source import families_of

        known, family = families_of(self.auto_class), str(config.get("model_type", ""))
        if known and family not in known:
            raise UserError(_no_such_model(path, family))

    def check_config(self, name: str, config: Any) -> None:
        from transformers import AutoModelForImageTextToText

        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise UserError(_no_such_model(name, config.model_type))

    def shapes(
        self, shapes: dict[str, Any], config: dict[str, Any], labels: int, pooled: bool = False
    ) -> tuple[dict[str, Any], bool] | None:
        return None  # transformers renames parameters when the model is loaded

    def fits(self, config: dict[str, Any]) -> bool:
        return "vision_config" in config

    def freeze(self, base: Base, roles: list[str] | None) -> None:
        from hfstrat.models import vision_parts

        known = str(base.model.config.model_type) in vision_parts.FAMILIES
        vision_parts.freeze(base.model, roles if roles is not None else FROZEN if known else ())
        if known:
            base.say(f"{'parts':<9} {vision_parts.sizes(base.model)}")

    def frozen_modules(self, base: Base, roles: list[str] | None) -> Callable[[str], bool]:
        from hfstrat.models import vision_parts

        wanted = set(FROZEN if roles is None else roles)
        if not wanted or (roles is None and str(base.model.config.model_type) not in vision_parts.FAMILIES):
            return super().frozen_modules(base, roles)
        prefixes = vision_parts.prefixes_of(base.model)
        adapted = " and ".join(role for role in vision_parts.ROLES if role not in wanted)
        base.say(f"{'parts':<9} adapters in {adapted}; without one: {' and '.join(sorted(wanted))} (strategy.freeze)")
        return lambda name: vision_parts.role_of(name, prefixes) in wanted

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None]:
        from hfstrat.models import vision_parts

        return vision_parts.use_all(base.model)

    def has_language(self, base: Base) -> Callable[[str], bool]:
        from hfstrat.models import vision_parts

        prefixes = vision_parts.FAMILIES.get(str(base.model.config.model_type))
        return (lambda name: True) if prefixes is None else (lambda name: vision_parts.role_of(name, prefixes) == "language")

    def check_teacher(self, teacher: Any, section: Any, processor: Any) -> None:
        from hfstrat.tasks.image_text_to_text.processor import check_teacher

        check_teacher(teacher, section, processor)

    def write_config(self, base: Base, folder: Path) -> None:
        """Write config.json, by which the task of an adapter is known."""
        import copy

        config = copy.deepcopy(base.model.config)
        config.architectures = [type(base.model).__name__]
        vars(config).pop("quantization_config", None)  # of the base in training
        config.save_pretrained(folder)


def lengthened(ids: list[int], length: int, processor: Any) -> list[int]:
    """A sequence made as long as this with ends of text."""
    return [*ids, *([processor.eos_token_id or 0] * max(0, length - len(ids)))]


def _no_such_model(name: str, family: str) -> str:
    return (
        f"model.name_or_path: {name} is a {family} model, for which transformers has no vision-language class; expected a "
        "model such as Qwen2.5-VL, SmolVLM, Gemma 3 or LLaVA, or set task: causal-lm for a model of text"
    )


class ImageTextMetrics(TokenMetrics):
    """Those of a causal LM: only tokens of text have loss."""


class ImageTextText(LanguageText):
    """Predictions are greedy answers."""

    pipeline = NAME
    processor = ("processor", "AutoProcessor")

    def prompt(self, prompt: Any) -> str:
        from hfstrat.data.image_places import MARK
        from hfstrat.data.media_files import MediaRef

        text, images = super().prompt(prompt), list(prompt.get("images", [])) if isinstance(prompt, dict) else []
        for image in images:
            name = Path(image.name if isinstance(image, MediaRef) else str(image)).name
            text = text.replace(MARK, f"[{name}] ", 1)
        return text

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        more = "".join(f" {name}={value!r}," for name, value in options.items())
        return [
            'content = [{"type": "image", "url": "image.jpg"}, {"type": "text", "text": "What is in the picture?"}]',
            "inputs = processor.apply_chat_template(",
            '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,',
            f'    return_dict=True, return_tensors="pt",{more}',
            ")",
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]


class ImageTextToText(Task):
    """The task `image-text-to-text`."""

    name = NAME
    rows = ImageTextRows()
    model = ImageTextModel()
    metrics = ImageTextMetrics()
    text = ImageTextText()

    def check(self, recipe: Recipe) -> None:
        from hfstrat.data.image_files import check_installed

        check_installed(self.name)
        model, data = recipe.model, recipe.data
        if model.pooling is not None:
            raise UserError(f"model.pooling: it is for models with a head for complete texts; remove it for task: {self.name}")
        if model.add_tokens:
            raise UserError(f"model.add_tokens: the tokens of images are the processor's; remove it for task: {self.name}")
        if model.gguf_file:
            raise UserError(
                "model.name_or_path: a .gguf file is read for task: causal-lm only; give a model folder or a Hub id"
            )
        if recipe.training.head_learning_rate is not None:
            raise UserError(
                "training.head_learning_rate: it is for the new head of a classifier; this model has none; remove it"
            )
        if recipe.training.must_pack:
            given = str(recipe.training.packing).lower()
            raise UserError(
                f"training.packing: {given}: rows with images are not packed: positions and masks of an image depend on the "
                "family, and no test covers all of them; set auto or false"
            )
        check_one_stack(recipe, "a vision-language model has a tower and a language model")
        if data.documents != "lines":
            raise UserError(f"data.documents: {data.documents}: it is for plain texts; remove it for task: {self.name}")
        if data.template == "plain":
            raise UserError("data.template: plain: it has no place for images; set chat, auto or a .jinja file")
        formats = ("auto", "messages", "conversations", "prompt-completion", "alpaca")
        if recipe.objective.rows == ObjectiveSection.rows and data.format not in formats:  # else the objective reads them
            raise UserError(
                f"data.format: {data.format}: {self.name} reads messages, conversations, prompt-completion or alpaca"
            )
        for key in ("choices", "lm_eval"):
            if getattr(recipe.evaluation, key):
                raise UserError(f"evaluation.{key}: it is for models of text; remove it for {self.name}, or use metrics")
