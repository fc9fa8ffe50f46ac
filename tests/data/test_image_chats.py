"""Conversations with images: every way of writing them, what is counted, and bad input, each refused in one sentence."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.vision_language import config_of, picture, processor_of, tokenizer_of
from PIL import Image

from hfstrat import strategies
from hfstrat.data.image_chats import prepare
from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_messages import ImageTextFormat, ImageTextSource
from hfstrat.data.image_places import MARK
from hfstrat.data.image_processing import ChatProcessor
from hfstrat.data.media_rows import check_source, example_of
from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import load_recipe
from hfstrat.strategies.checks import check_task
from hfstrat.tasks import TASKS
from hfstrat.tasks.image_text_to_text import processor as loading

IMAGE = {"type": "image"}
ASK = {"type": "text", "text": "what"}
ANSWER = {"role": "assistant", "content": "a cat"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts) or "what"}


def read(row: dict[str, Any]) -> Any:
    return example_of(row, ImageTextFormat.detect([row], "rows.jsonl", "auto", {}), 0)


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "TIFF" if mode == "CMYK" else "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def qwen() -> ChatProcessor:
    return ChatProcessor(processor_of("qwen2_5_vl", tokenizer_of("qwen2_5_vl")))


@pytest.fixture(scope="module")
def llava() -> ChatProcessor:
    return ChatProcessor(processor_of("llava", tokenizer_of("llava")))


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
WAYS = {  # rows of one question about a.png
    "parts and a column": {"messages": [user(IMAGE, ASK), ANSWER], "images": ["a.png"]},
    "a part with its path": {"messages": [user({"type": "image", "image": "a.png"}, ASK), ANSWER]},
    "a part with a path beside": {"messages": [user({"type": "image", "path": "a.png"}, ASK), ANSWER]},
    "a part of Arrow": {"messages": [user({"type": "image", "text": None, "image": "a.png"}, ASK), ANSWER]},
    "OpenAI's data URL": {"messages": [user({"type": "image_url", "image_url": {"url": URL}}, ASK), ANSWER]},
    "a file URL": {"messages": [user(IMAGE, ASK), ANSWER], "images": ["file://a.png"]},
    "a mark": {"messages": [{"role": "user", "content": "<image>what"}, ANSWER], "images": ["a.png"]},
    "LLaVA": {
        "conversations": [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a cat"}],
        "image": "a.png",
    },
    "no place": {"messages": [{"role": "user", "content": "what"}, ANSWER], "images": ["a.png"]},
    "a prompt": {"prompt": "<image>what", "completion": "a cat", "image": "a.png"},
    "an instruction": {"instruction": "<image>what", "output": "a cat", "images": ["a.png"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_is_the_same_row(way: str, qwen: ChatProcessor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [WAYS[way], dict(WAYS[way]), dict(WAYS[way])]
    data = prepare(Data.model_validate({"train": str(write(tmp_path, rows)), "eval": str(tmp_path / "rows.jsonl")}), qwen, 0)
    row = data.train[0]
    text = qwen.decode([token for token in row["input_ids"] if token not in qwen.image_ids])
    assert text == ("<|im_start|>user\n<|vision_start|><|vision_end|>what<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n")
    assert qwen.decode([token for token in row["labels"] if token != IGNORED]) == "a cat<|im_end|>\n"
    assert len(row["images"]) == 1
    assert row["image_tokens"] == len(qwen(qwen.pieces([(8, 8)])[0])["input_ids"])


def test_parquet_with_bytes_and_a_folder_with_metadata(qwen: ChatProcessor, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"messages": [user(IMAGE, ASK), {"role": "assistant", "content": [ASK]}]}
    table = pa.Table.from_pylist([{**row, "images": [{"bytes": png(), "path": "a.png"}]}] * 3)
    pq.write_table(table, tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    picture(folder, "one.png", "red")
    lines = [{"file_name": "one.png", "messages": [user(IMAGE, ASK), ANSWER]}] * 3
    write(folder, lines, "metadata.jsonl")
    for source in (tmp_path / "rows.parquet", folder):
        data = prepare(Data.model_validate({"train": str(source), "eval": str(source)}), qwen, 0)
        assert [len(row["images"]) for row in data.train] == [1, 1, 1]


def test_statistics_name_images_tokens_and_broken_files(llava: ChatProcessor, tmp_path: Path) -> None:
    names = [picture(tmp_path, f"{i}.png", "red", (20 + i, 30)) for i in range(40)]
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"messages": [user(IMAGE, {"type": "text", "text": f"q{i}"}), ANSWER], "images": [n]} for i, n in enumerate(names)]
    rows.append({"messages": [user({"type": "text", "text": "q"}), ANSWER]})
    rows.append({"messages": [user(IMAGE, ASK), ANSWER], "images": ["bad.png"]})
    data = prepare(Data.model_validate({"train": str(write(tmp_path, rows)), "eval_size": 5}), llava, 0)
    lines = "\n".join(data.lines())
    assert "left out: 1 image that cannot be read" in lines
    assert "bad.png" in lines
    facts = data.image_facts()
    assert facts["most_images"] == 1
    assert facts["most_image_tokens"] == 16
    assert facts["image_tokens"] == 16 * facts["images"]
    assert data.statistics["train"].rows_read == data.statistics["train"].rows_kept + data.statistics["train"].rows_dropped


def test_orientation_and_cmyk_are_applied(llava: ChatProcessor, tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20))
    tag = wide.getexif()
    tag[0x0112] = 6
    wide.save(tmp_path / "turned.jpg", exif=tag)
    Image.new("CMYK", (16, 16)).save(tmp_path / "print.jpg")
    rows = [{"messages": [user(IMAGE, ASK), ANSWER], "images": [name]} for name in ("turned.jpg", "print.jpg")]
    source = str(write(tmp_path, rows))
    data = prepare(Data.model_validate({"train": source, "eval": source}), llava, 0)
    assert "EXIF rotation" in "\n".join(data.lines())
    assert "CMYK" in "\n".join(data.lines())
    assert ImageRef(str(tmp_path / "turned.jpg")).open().size == (20, 40)


def talk(turns: int, images: int) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "the hat"}]
    for number in range(turns):
        messages += [user(*([IMAGE] if number < images else []), {"type": "text", "text": f"q{number}"}), ANSWER]
    return {"messages": messages, "images": ["a.png"] * images}


def test_split_cuts_between_turns_and_never_an_image(llava: ChatProcessor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    source = str(write(tmp_path, [talk(6, 4), talk(5, 0)]))
    whole = prepare(Data.model_validate({"train": source, "eval": source, "max_length": 1000}), llava, 0)
    data = prepare(Data.model_validate({"train": source, "eval": source, "max_length": 90, "overflow": "split"}), llava, 0)
    assert max(data.lengths) <= 90
    assert len(data.train) > 2
    assert sum(len(row["images"]) for row in data.train) == 4

    def supervised(rows: Any) -> int:
        return sum(label != IGNORED for row in rows for label in row["labels"])

    assert supervised(data.train) == supervised(whole.train)
    for row in data.train:
        assert row["input_ids"].count(llava.image_ids[0]) == 16 * len(row["images"]) == row["image_tokens"]
        assert "the hat" in llava.decode(row["input_ids"])


def test_images_of_a_history_have_their_places_and_a_second_column_is_named() -> None:
    row = {"instruction": "<image>q", "output": "a", "history": [["<image>first", "one"]], "images": ["a.png", "b.png"]}
    found = read({**row, "image": "c.png"})
    assert [turn["content"].count(MARK) for turn in found.inner.messages] == [1, 0, 1, 0]
    assert [Path(ref.path).name for ref in found.images] == ["a.png", "b.png"]
    assert any("image is not read" in change for change in found.changes)
    assert not any("image is not read" in change for change in read(row).changes)


def test_an_unrolled_conversation_is_split_once(tmp_path: Path) -> None:
    """A template that renders earlier answers differently makes a row for each answer; several of them may be too long."""
    tokenizer = tokenizer_of("llava")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['role'] }}\n", "{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}the {% endif %}"
    )
    processor = ChatProcessor(processor_of("llava", tokenizer))
    (tmp_path / "a.png").write_bytes(png())
    source = str(write(tmp_path, [talk(6, 4)]))
    settings = {"train": source, "eval": source, "train_on": "assistant"}
    whole = prepare(Data.model_validate({**settings, "max_length": 1000}), processor, 0)
    assert len(whole.train) == 6
    data = prepare(Data.model_validate({**settings, "max_length": 90, "overflow": "split"}), processor, 0)
    assert max(data.lengths) <= 90
    asked = [re.findall(r"q\d", processor.decode(row["input_ids"]))[-1] for row in data.train]
    assert sorted(asked) == [f"q{number}" for number in range(6)]
    assert data.statistics["train"].rows_split == 1


Case = tuple[Callable[[Any], Any], list[str]]


def bad_row(row: dict[str, Any], *words: str) -> Case:
    return lambda env: read(row), list(words)


def bad_data(rows: list[dict[str, Any]], *words: str, family: str = "llava", **settings: Any) -> Case:
    def call(env: Any) -> Any:
        source = str(write(env.folder, rows))
        return prepare(Data.model_validate({"train": source, "eval": source, **settings}), getattr(env, family), 0)

    return call, list(words)


def bad_recipe(*words: str, strategy: Any = "full", **more: Any) -> Case:
    def call(env: Any) -> Any:
        recipe = {
            "task": "image-text-to-text",
            "model": "a",
            "strategy": strategy,
            "data": "a.jsonl",
            "output_dir": "b",
            **more,
        }
        (env.folder / "r.yaml").write_text(json.dumps(recipe))
        loaded = load_recipe(str(env.folder / "r.yaml"), []).recipe
        check_task(loaded)
        strategies.build(loaded.strategy).check_task(TASKS[loaded.task])

    return call, list(words)


def bad_files(make: Callable[[Path], str], *words: str) -> Case:
    def call(env: Any) -> Any:
        data = Data.model_validate({"train": make(env.folder)})
        check_source(data.train[0], data, "data.train", ImageTextFormat.detect, ImageTextSource)

    return call, list(words)


def bad_model(files: dict[str, Any], *words: str) -> Case:
    def call(env: Any) -> Any:
        from hfstrat.recipe.schema import Model

        for name, content in files.items():
            (env.folder / name).write_text(json.dumps(content))
        task = TASKS["image-text-to-text"]
        task.model.check_architecture(str(env.folder), files.get("config.json", {"model_type": "llava"}))
        task.rows.check_processor(Model(name_or_path=str(env.folder)), False)

    return call, list(words)


def folder_of_images(folder: Path) -> str:
    (folder / "x" / "cat").mkdir(parents=True)
    picture(folder / "x" / "cat", "a.png", "red")
    return str(folder / "x")


def tall(env: Any) -> Any:
    Image.new("RGB", (20_000, 2)).save(env.folder / "wide.png")
    source = str(write(env.folder, [{"messages": [user(IMAGE, ASK), ANSWER], "images": ["wide.png"]}]))
    return prepare(Data.model_validate({"train": source, "eval": source}), env.llava, 0)


def settings(given: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda env: loading._set(processor_of("qwen2_5_vl", tokenizer_of("qwen2_5_vl")).image_processor, given)


def without_template(env: Any) -> Any:
    processor = ChatProcessor(processor_of("llava", tokenizer_of("llava")))
    processor.words.chat_template = None
    source = str(write(env.folder, [talk(1, 0)]))
    return prepare(Data.model_validate({"train": source, "eval": source}), processor, 0)


def text_template(env: Any) -> Any:
    processor = ChatProcessor(processor_of("llava", tokenizer_of("llava")))
    processor.words.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (env.folder / "a.png").write_bytes(png())
    source = str(write(env.folder, [WAYS["parts and a column"]]))
    return prepare(Data.model_validate({"train": source, "eval": source}), processor, 0)


def prompt(given: dict[str, Any]) -> Callable[[Any], Any]:
    from hfstrat.data.image_render import ImageRenderer

    return lambda env: ImageRenderer(env.llava, "auto").prompt_ids(given)


GOOD = WAYS["parts and a column"]
TALK = {"messages": [user(IMAGE, ASK), ANSWER]}
LONG = {"messages": [user(IMAGE, IMAGE, IMAGE, ASK), ANSWER], "images": ["a.png"] * 3}
BAD: dict[str, Case] = {
    "more marks than images": bad_row({**GOOD, "messages": [user(IMAGE, IMAGE, ASK), ANSWER]}, "2 places", "1 image"),
    "more images than marks": bad_row({**GOOD, "images": ["a.png", "b.png"]}, "1 place", "2 images"),
    "a part without any image": bad_row(TALK, "1 place", "0 images"),
    "a mark without images": bad_row({"messages": [user(), {**ANSWER, "content": "<image>"}]}, "no images"),
    "an image in an answer": bad_row(
        {"messages": [user(ASK), {"role": "assistant", "content": [IMAGE]}], "images": ["a.png"]}, "turn of the assistant"
    ),
    "a URL": bad_row({**GOOD, "images": ["https://example.org/a.png"]}, "on the network", "download it"),
    "a URL in a part": bad_row({"messages": [user({"type": "image", "url": "http://x/a.png"}, ASK), ANSWER]}, "network"),
    "an address of S3": bad_row({**GOOD, "images": ["s3://bucket/a.png"]}, "on the network"),
    "a data URL that is broken": bad_row({**GOOD, "images": ["data:image/png;base64,???"]}, "base64"),
    "a data URL without base64": bad_row({**GOOD, "images": ["data:image/png,abc"]}, "base64"),
    "a number as an image": bad_row({**GOOD, "images": [7]}, "'images' is int", "path or the bytes"),
    "an image that is null": bad_row({**GOOD, "images": [None]}, "null"),
    "an empty path": bad_row({**GOOD, "images": [" "]}, "empty text"),
    "a list in a list": bad_row({**GOOD, "images": [["a.png"]]}, "list in a list"),
    "a video": bad_row({"messages": [user({"type": "video"}, ASK), ANSWER]}, "videos"),
    "sound": bad_row({"messages": [user({"type": "audio"}, ASK), ANSWER]}, "sound"),
    "our own mark": bad_row({"messages": [user({"type": "text", "text": MARK}), ANSWER]}, "U+E0F1"),
    "no answer": bad_row({"messages": [user(IMAGE, ASK)], "images": ["a.png"]}, "no assistant turn"),
    "no user turn": bad_row({"messages": [ANSWER], "images": ["a.png"]}, "no user turn"),
    "messages that are text": bad_row({"messages": "what", "images": ["a.png"]}, "not a list"),
    "columns of a classification": bad_row({"image": "a.png", "label": "cat"}, "needs a conversation", "image, label"),
    "an image that is missing": bad_data([GOOD], "no such file", "cannot be read", "a.png"),
    "a file that is no image": bad_data([{**GOOD, "images": ["rows.jsonl"]}], "rows.jsonl", "not an image"),
    "20,000 pixels wide": (tall, ["wide.png", "20,000 x 2"]),
    "the token of an image in a text": bad_data(
        [{"messages": [user({"type": "text", "text": "<|image_pad|>"}), ANSWER]}], "<|image_pad|>", "remove it", family="qwen"
    ),
    "images that do not fit": bad_data([LONG], "48 of them of 3 images", "never cut", "data.max_length: ", max_length=24),
    "images that do not fit and are resizable": bad_data(
        [{**LONG, "images": ["big.png"] * 3}], "max_pixels", "drop", family="qwen", max_length=32
    ),
    "one exchange that is too long": bad_data([LONG], "message 1", "never cut", max_length=24, overflow="split"),
    "too long and refused": bad_data([LONG], "3 images", "overflow: error", max_length=24, overflow="error"),
    "a plain template": bad_data([GOOD], "no place for images", template="plain"),
    "a processor without chat template": (without_template, ["no chat template", "model.tokenizer"]),
    "a template for text": (text_template, ["no place for them", "data.template"]),
    "images without conversations": bad_files(folder_of_images, "images without conversations", "metadata.jsonl"),
    "no such folder": bad_files(lambda folder: str(folder / "none.jsonl"), "no such file"),
    "a prompt with fewer images than places": (prompt({"messages": MARK + "what", "images": []}), ["1 place", "0 images"]),
    "a prompt with a missing image": (
        prompt({"messages": MARK + "what", "images": ["gone.png"]}),
        ["gone.png", "no such file"],
    ),
    "a setting that does not exist": (settings({"max_pixel": 9}), ["does not read max_pixel", "max_pixels"]),
    "a setting with a bad value": (settings({"patch_size": "x", "size": 3.5}), ["image.processor_kwargs"]),
    "a model of text": bad_model({"config.json": {"model_type": "llama"}}, "llama", "vision-language", "causal-lm"),
    "no processor": bad_model({"config.json": {"model_type": "llava"}}, "no processor of images", "model.tokenizer"),
    "packing": bad_recipe("training.packing", "not packed", training={"packing": True}),
    "image_size": bad_recipe("image", "processor_kwargs", image={"image_size": 64}),
    "all parts frozen": bad_recipe(
        "freeze", "nothing is trained", strategy={"name": "full", "freeze": ["vision", "projector", "language"]}
    ),
    "parts of an existing adapter": bad_recipe(
        "an existing adapter has its own freeze", strategy={"name": "lora", "adapter": "somewhere", "freeze": ["language"]}
    ),
    "features of the tower with partial": bad_recipe(
        "image.precompute", "set strategy.precompute", strategy="partial", image={"precompute": True}
    ),
    "layer_decay": bad_recipe("strategy.layer_decay", "one stack", strategy={"name": "partial", "layer_decay": 0.9}),
    "gradual_unfreezing": bad_recipe(
        "strategy.gradual_unfreezing", "one stack", strategy={"name": "partial", "gradual_unfreezing": {"every": 2}}
    ),
    "an unknown part": bad_recipe("freeze", "vision", strategy={"name": "full", "freeze": ["eyes"]}),
    "parts of a causal LM": bad_recipe(
        "freeze", "image-text-to-text", strategy={"name": "full", "freeze": []}, task="causal-lm"
    ),
    "a smaller student": bad_recipe(
        "strategy.shrink", strategy={"name": "distill", "shrink": {"layers": 1}, "student": "full"}
    ),
    "answers of a teacher": bad_recipe(
        "strategy.seq_kd", strategy={"name": "distill", "teacher": "a", "student": "full", "seq_kd": True}
    ),
    "parts of a causal LM as a student": bad_recipe(
        "freeze",
        "image-text-to-text",
        task="causal-lm",
        strategy={"name": "distill", "teacher": "a", "student": {"name": "full", "freeze": []}},
    ),
    "a head": bad_recipe("head", "freeze: [vision, language]", strategy="head"),
    "random weights": bad_recipe(
        "scratch", "image-text-to-text", strategy={"name": "scratch", "model_type": "llama"}, model={}
    ),
    "new tokens": bad_recipe("model.add_tokens", "processor", model={"name_or_path": "a", "add_tokens": ["x"]}),
    "a pooling": bad_recipe("model.pooling", model={"name_or_path": "a", "pooling": "mean"}),
    "multiple choice": bad_recipe("evaluation.choices", evaluation={"choices": ["a.jsonl"]}),
    "files as documents": bad_recipe("documents", data={"train": "a.jsonl", "documents": "files", "eval_size": 0.1}),
    "a format of text": bad_recipe("data.format: text", data={"train": "a.jsonl", "format": "text"}),
}


class Env:
    """What a case may use."""

    def __init__(self, folder: Path, **processors: Any) -> None:
        self.folder = folder
        vars(self).update(processors)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, tmp_path: Path, qwen: Any, llava: Any) -> None:
    call, words = BAD[name]
    if "fit" in name or "long" in name or "too long" in name:
        (tmp_path / "a.png").write_bytes(png())
        Image.new("RGB", (90, 90)).save(tmp_path / "big.png")
    with pytest.raises(UserError) as refused:
        call(Env(tmp_path, qwen=qwen, llava=llava))
    text = str(refused.value)
    assert "\n" not in text, text
    for word in words:
        assert word in text, text


def test_forty_cases_of_bad_input() -> None:
    assert len(BAD) >= 40


def test_mode_cmyk_and_one_pixel_are_read(llava: ChatProcessor, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png((1, 1)))
    (tmp_path / "print.tif").write_bytes(png((9, 9), "CMYK"))
    rows = [{"messages": [user(IMAGE, ASK), ANSWER], "images": [name]} for name in ("one.png", "print.tif")]
    source = str(write(tmp_path, [*rows, {"messages": [user(ASK), ANSWER]}]))
    data = prepare(Data.model_validate({"train": source, "eval": source}), llava, 0)
    assert [len(row["images"]) for row in data.train] == [1, 1, 0]


def test_config_of_every_family_has_a_model(qwen: ChatProcessor) -> None:
    model = TASKS["image-text-to-text"].model
    assert model.fits(config_of("qwen2_5_vl", qwen.words).to_dict())
    assert not model.fits({"model_type": "t5"})


def test_digest_follows_the_images(tmp_path: Path) -> None:
    import os

    (tmp_path / "a.png").write_bytes(png())
    data = Data.model_validate({"train": str(write(tmp_path, [GOOD]))})
    source = ImageTextSource.open(data.train[0], data, "data.train")
    before = source.digest()
    (tmp_path / "a.png").write_bytes(png((9, 9)))
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert source.digest() != before
