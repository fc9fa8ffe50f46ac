"""Loading the processor of a vision-language model, with the settings of its image processor that the recipe gives."""

from __future__ import annotations

import importlib.util
import json
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data.image_processing import ChatProcessor
from hfstrat.errors import UserError, first_line
from hfstrat.models.load import read_json, source_of

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Recipe

VIDEO = "video_preprocessor_config.json"
KEY = "image.processor_kwargs"
PROBED = ((64, 48), (40, 200))  # width and height of images on which two processors are compared


def load(recipe: Recipe) -> ChatProcessor:
    """The processor of the recipe's model. Raises UserError."""
    source, options = source_of(recipe.model)
    key = "model.name_or_path"
    if recipe.model.tokenizer:
        source, key, options = str(Path(recipe.model.tokenizer).expanduser()), "model.tokenizer", {}
    found = from_source(source, options, key, recipe.image.processor_kwargs)
    if found.words.pad_token_id is None and found.words.eos_token is not None:
        found.words.pad_token = found.words.eos_token
    found.words.padding_side, found.precompute = "right", recipe.image.precompute
    found.settings = recipe.image.processor_kwargs
    check_images(found, KEY if recipe.image.processor_kwargs else key, source)
    return found


def load_trained(folder: str) -> ChatProcessor:
    """The processor in the folder of a result. Raises UserError."""
    return from_source(folder, {}, "model", {})


def from_source(source: str, options: dict[str, Any], key: str, settings: dict[str, Any]) -> ChatProcessor:
    """A processor with these settings of its image processor. Raises UserError: there is none, or a setting is unknown."""
    from transformers import AutoProcessor, ProcessorMixin

    extra: dict[str, str] = {}
    try:
        if importlib.util.find_spec("torchvision") is None and (kind := _class_of(source)) is not None:
            processor: Any = _without_videos(kind).from_pretrained(source, **options)
            extra = _of_videos(Path(source))
        else:
            processor = AutoProcessor.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"{key}: {source}: cannot load a processor of images and text: {first_line(error)}") from error
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise UserError(
            f"{key}: {source} has no processor of images ({type(processor).__name__} alone), as a model of text has none; set "
            "task: causal-lm, or model.tokenizer to a folder with a processor"
        )
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_token", None) is None:
        raise UserError(
            f"{key}: {source}: its {type(processor).__name__} writes no token in the place of an image, so that images cannot "
            "be placed in a conversation; expected a model such as Qwen2.5-VL, SmolVLM, Gemma 3 or LLaVA"
        )
    _set(processor.image_processor, settings)
    template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    processor.chat_template = processor.tokenizer.chat_template = (
        template["default"] if isinstance(template, dict) else template
    )
    return ChatProcessor(processor, extra)


def check_images(processor: ChatProcessor, key: str, source: str) -> None:
    """Refuse a processor that cannot process a picture with its settings. Raises UserError."""
    try:
        tokens = processor.words.convert_tokens_to_ids(processor.image_token)
        if tokens is None or tokens == processor.words.unk_token_id or not processor.image_ids:
            raise ValueError(f"its tokenizer has no token {processor.image_token}")
        processor.pieces([(64, 48)])
    except Exception as error:  # a processor fails in any way
        raise UserError(f"{key}: {source}: its processor cannot process a picture: {first_line(error)}") from error


def check_teacher(teacher: Any, section: Any, processor: ChatProcessor) -> None:
    """Refuse a teacher that cannot be given the student's images. Raises UserError.

    Args:
        section: of the teacher.
        processor: of the student.
    """
    import torch
    from PIL import Image

    key, source = "strategy.teacher", section.name_or_path
    folder = Path(source).expanduser()
    own = from_source(str(folder) if folder.is_dir() else source, section.options, key, processor.settings)
    ours, theirs = (each.processor.image_processor.to_dict() for each in (processor, own))
    if differs := next((name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)), ""):
        raise UserError(
            f"{key}: {source} has another processor of images ({differs} is {theirs.get(differs)}, and {ours.get(differs)} for "
            "the student): both are given the same pixels; use a teacher of the student's family"
        )
    for size in PROBED:
        counts = [len(_tokens(each, size)) for each in (own, processor)]
        if counts[0] != counts[1]:
            raise UserError(
                f"{key}: {source} makes {counts[0]} tokens of an image of {size[0]} x {size[1]} pixels, and the student "
                f"{counts[1]}: both are given the same tokens; use a teacher of the student's family"
            )
    ids = _tokens(processor, PROBED[0])
    inputs = {"input_ids": torch.tensor([ids]), **processor.pixels([[Image.new("RGB", PROBED[0])]])}
    if name := processor.type_key:
        inputs[name] = torch.tensor([processor.types(ids)])
    weights = next(each for each in teacher.parameters() if each.is_floating_point())
    given = {key: one.to(weights.device, weights.dtype if one.is_floating_point() else None) for key, one in inputs.items()}
    try:
        with torch.no_grad():
            teacher(**given)
    except Exception as error:  # the code of a family
        raise UserError(f"{key}: {source} cannot be given the student's images: {first_line(error)}") from error


def _tokens(processor: ChatProcessor, size: tuple[int, int]) -> list[int]:
    """The ids of an image of this width and height."""
    found: list[int] = processor.words(processor.pieces([size])[0], add_special_tokens=False)["input_ids"]
    return found


def _class_of(source: str) -> Any:
    """The class of the processor that the files of a folder name; None where they name none of transformers."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    folder = Path(source)
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    names = [read_json(folder / file).get("processor_class") for file in files]
    names.append(PROCESSOR_MAPPING_NAMES.get(str(read_json(folder / "config.json").get("model_type"))))
    name = next((name for name in names if name), None)
    return getattr(transformers, str(name), None) if name else None


def _without_videos(kind: Any) -> Any:
    """A processor of images and text alone: that of videos needs torchvision."""
    if "video_processor" not in kind.get_attributes():
        return kind

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    def from_args_and_dict(cls: Any, /, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        place = kind.get_attributes().index("video_processor")
        given = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        return kind.from_args_and_dict.__func__(cls, [*args[:place], None, *args[place:]], given, **kwargs)

    own = {"get_attributes": classmethod(get_attributes), "from_args_and_dict": classmethod(from_args_and_dict)}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **own})


def _of_videos(folder: Path) -> dict[str, str]:
    """The settings of the processor of videos, to be saved with a result although they are not used here."""
    own = read_json(folder / VIDEO) or read_json(folder / "processor_config.json").get("video_processor")
    return {VIDEO: json.dumps(own, indent=2) + "\n"} if own else {}


def _set(images: Any, settings: dict[str, Any]) -> None:
    """Set values of an image processor, as its `from_pretrained` does. Raises UserError: a name that it does not read."""
    if not settings:
        return
    known = set(getattr(type(images), "valid_kwargs", type("", (), {"__annotations__": {}})).__annotations__)
    known |= {name for name in vars(images) if not name.startswith("_")}
    for name in settings:
        if known and name not in known:
            near = get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(sorted(known))}"
            raise UserError(f"{KEY}: {type(images).__name__} does not read {name}; {hint}")
    try:
        given = {**images.to_dict(), **settings}
        given.pop("image_processor_type", None)
        if {"min_pixels", "max_pixels"} & settings.keys() and "size" not in settings and isinstance(given.get("size"), dict):
            size = dict(given["size"])
            size["shortest_edge"] = settings.get("min_pixels", size.get("shortest_edge"))
            size["longest_edge"] = settings.get("max_pixels", size.get("longest_edge"))
            given |= {"size": size}
        vars(images).update(vars(type(images)(**given)))
    except Exception as error:
        raise UserError(f"{KEY}: {json.dumps(settings, default=str)}: {first_line(error)}") from error
