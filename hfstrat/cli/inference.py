"""`hfstrat generate`, `chat` and `predict`: answers to prompts, a conversation, labels or numbers of texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.data import formats
from hfstrat.data.labeled import TextFormat
from hfstrat.data.messages import parse_messages, parse_template_kwargs, parse_tools
from hfstrat.data.values import BadRow, Row, by_our_names, valid
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.format import plural
from hfstrat.tasks import TASKS, generation
from hfstrat.tasks.artifact import check_output, check_task, load, resolve, task_of, written
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.generation import How
from hfstrat.tasks.heads import HeadText
from hfstrat.tasks.image_text_to_text import ImageTextToText
from hfstrat.tasks.report import Report

COMMANDS = "/reset starts over, /quit exits"
WITH_IMAGES = "/image FILE adds an image to the next message, " + COMMANDS
GENERATORS = (CausalLM.name, ImageTextToText.name)
IS_CLASSIFIER = "this is a classifier: use `hfstrat predict`"
IS_GENERATOR = "this model generates text: use `hfstrat generate`"
MAX_LENGTH = 1024  # tokens of a text, for a model without a run that defines it


class Boxes(NamedTuple):
    """What `predict` does with boxes: the folder to draw images with them into, and the least score of a box."""

    draw: Path | None = None
    threshold: float | None = None

    @property
    def given(self) -> str:
        """The flag that is given, if any."""
        return "--draw" if self.draw is not None else "--threshold" if self.threshold is not None else ""


def generate(
    target: str,
    prompts: list[str],
    file: Path | None,
    output: Path | None,
    how: How,
    quantization: str = "recorded",
    images: list[str] | None = None,
) -> None:
    """Answer prompts: streamed to the terminal, or in batches to a .jsonl with `prompt` and `completion`.

    Args:
        images: files that each of `prompts` is about.

    Raises:
        UserError: no prompts, a file that cannot be read, an output that exists, or images for a model of text.
    """
    check_images(target, images)
    given = [with_images(target, {"prompt": p, "images": images}) if images else p for p in map(valid, prompts)]
    inputs: list[Any] = [*given, *(_read_prompts(file, sees_images(target)) if file else [])]
    if not inputs:
        raise UserError("generate: no prompt; give --prompt TEXT or --file FILE")
    check_output(output)
    check_task(target, GENERATORS, IS_CLASSIFIER)
    if how.plain and sees_images(target):
        raise UserError(f"--plain: {target} places images by its chat template; remove it")
    model, tokenizer, report = load(target, quantization, spreads=True)
    task = task_of(target)
    renderer = generation.renderer_of(tokenizer, report, how.plain, task.rows)
    if output is None:
        for prompt in inputs:
            if len(inputs) > 1:
                print(f"> {task.text.prompt(prompt)}", flush=True)
            generation.stream(model, renderer, prompt, how)
        return
    with _writer(output) as write:
        for prompt, text in zip(inputs, generation.in_batches(model, renderer, inputs, how), strict=True):
            shown = task.text.prompt(prompt) if isinstance(prompt, dict) and "images" in prompt else prompt
            write(json.dumps({"prompt": shown, "completion": text}, ensure_ascii=False))
    print(f"{output}: {plural(len(inputs), 'answer')}")


def sees_images(target: str) -> bool:
    """Whether a finished model is one of conversations with images."""
    return task_of(target).name == ImageTextToText.name


def check_images(target: str, images: list[str] | None) -> None:
    """Refuse images for a model that takes none, and files that are not there, before torch. Raises UserError."""
    for image in images or []:
        if not sees_images(target):
            raise UserError(f"--image: {target} is no vision-language model; remove it")
        if not Path(image).expanduser().is_file():
            raise UserError(f"--image: {image}: no such file")


def with_images(target: str, prompt: Any) -> Any:
    """A prompt as the renderer of the model takes it: for a vision-language model with its images. Raises UserError."""
    if not isinstance(prompt, dict) or not sees_images(target) or "images" not in prompt:
        return prompt
    from hfstrat.data import image_messages

    try:
        return image_messages.prompt_of(prompt, Path())
    except BadRow as error:
        raise UserError(f"the prompt: {error}") from None


def chat(target: str, how: How, quantization: str = "recorded", images: list[str] | None = None) -> None:
    """Read messages until /quit or the end of the input, and stream the answers.

    Args:
        images: files that the first message is about.

    Raises:
        UserError: a classifier, or a model that was trained on plain text.
    """
    check_task(target, GENERATORS, IS_CLASSIFIER)
    check_images(target, images)
    model, tokenizer, report = load(target, quantization, spreads=True)
    renderer = generation.renderer_of(tokenizer, report, plain=False, rows=task_of(target).rows)
    if sees_images(target):
        _chat_with_images(model, renderer, how, list(images or []))
        return
    if renderer.continues_text:
        raise UserError(f"{target}: this model continues texts and has no chat format; use `hfstrat generate {target} -p TEXT`")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(COMMANDS)
    messages: list[dict[str, Any]] = []
    while (line := _read_message(is_terminal)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
            print("(a new conversation)", flush=True)
        elif line.startswith("/"):
            print(f"({line}: no such command; {COMMANDS})", flush=True)
        elif line:
            with _said(is_terminal):
                asked = _fit_context(model, renderer, [*messages, {"role": "user", "content": line}], how)
                messages = [*asked, {"role": "assistant", "content": generation.stream(model, renderer, asked, how)}]


def _chat_with_images(model: Any, renderer: Any, how: How, waiting: list[str]) -> None:
    """As `chat`. `waiting` are the images of the next message."""
    from hfstrat.data.image_places import MARK

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(WITH_IMAGES)
    messages, images = list[dict[str, Any]](), list[str]()
    while (line := _read_message(is_terminal)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages, images, waiting = [], [], []
            print("(a new conversation)", flush=True)
        elif line.startswith("/image "):
            file = Path(line.removeprefix("/image ").strip()).expanduser()
            if file.is_file():
                waiting.append(str(file))
            print(f"({file}: the next message is about it)" if file.is_file() else f"({file}: no such file)", flush=True)
        elif line.startswith("/"):
            print(f"({line}: no such command; {WITH_IMAGES})", flush=True)
        elif line:
            given, waiting = waiting, []  # a message that cannot be answered is left out with its images
            with _said(is_terminal):
                asked = [*messages, {"role": "user", "content": MARK * len(given) + line}]
                prompt = {"messages": asked, "images": [*images, *given]}
                if generation.room(model, len(renderer.prompt_ids(how.prompt(prompt))), 1) < 1:
                    raise UserError("this conversation exceeds the model's context; start again with /reset")
                messages = [*asked, {"role": "assistant", "content": generation.stream(model, renderer, prompt, how)}]
                images = [*images, *given]


@contextmanager
def _said(is_terminal: bool) -> Iterator[None]:
    """A message that cannot be answered is named and left out; the conversation continues. From a pipe it is an error."""
    try:
        yield
    except UserError as error:
        if not is_terminal:
            raise
        print(f"({error})", flush=True)


def _read_message(is_terminal: bool) -> str | None:
    """The next message, None at the end of the input."""
    try:
        return str(valid(input("> " if is_terminal else "").strip()))
    except EOFError:
        return None


def _fit_context(model: Any, renderer: Any, messages: list[dict[str, Any]], how: How) -> list[dict[str, Any]]:
    """The messages without the oldest ones that exceed the context. Raises UserError if the last one alone exceeds it."""
    removed = 0
    while generation.room(model, len(renderer.prompt_ids(how.prompt(messages))), 1) < 1:
        if len(messages) < 3:
            raise UserError("this message alone exceeds the model's context; shorten it")
        messages, removed = messages[2:], removed + 2
    if removed:
        print(f"(the first {removed} messages no longer fit the model's context and are left out)", flush=True)
    return messages


def predict(
    target: str,
    texts: list[str],
    file: Path | None,
    output: Path | None,
    quantization: str = "recorded",
    media: dict[str, list[str]] | None = None,
    boxes: Boxes | None = None,
) -> None:
    """Print labels or numbers for texts, or labels or boxes of files; or write a .jsonl with `text`, `image` or `audio`, and
    `labels` with `scores`, `values`, or `objects`.

    Args:
        media: paths of files and folders, by `image` or `audio`.

    Raises:
        UserError: nothing to predict of, a file that cannot be read, an output that exists, or no classifier.
    """
    given = {name: paths for name, paths in (media or {}).items() if paths}
    if not texts and file is None and not given:
        raise UserError(
            "predict: no text; give --text TEXT or --file FILE, --image PATH for images, or --audio PATH for recordings"
        )
    check_output(output)
    check_task(target, tuple(name for name, task in TASKS.items() if not task.text.generates), IS_GENERATOR)
    if (rows := task_of(target).rows).kind is not None:
        if texts or file is not None or set(given) != {rows.kind.column}:
            kind = rows.kind
            raise UserError(f"{target}: this is a classifier of {kind.plural}; give --{kind.column} PATH, a file or a folder")
        predict_files(target, given[rows.kind.column], output, boxes or Boxes())
        return
    if boxes is not None and boxes.given:
        raise UserError(f"{boxes.given}: it is for detectors; remove it")
    if given:
        raise UserError(f"--{next(iter(given))}: {target} is a classifier of texts; give --text TEXT or --file FILE")
    report = resolve(target)[1]
    if any(not text.strip() for text in texts):
        raise UserError("--text: it is empty; expected text")
    inputs: list[Any] = [*map(valid, texts), *(_read_texts(file, report.run.recipe.data if report else None) if file else [])]
    model, tokenizer, report = load(target, quantization, spreads=True)
    task = head_text(target)
    with _writer(output) as write:
        for row, found in predicted(target, inputs, model, tokenizer, report):
            if output:
                columns = row if isinstance(row, dict) else {"text": row}
                write(json.dumps({**columns, **task.record(found)}, ensure_ascii=False))
            else:
                text = " ".join(task.prompt(row).split())
                write(f"{task.line(found)}\t{text}" if len(inputs) > 1 else task.line(found))
    if output:
        print(f"{output}: {plural(len(inputs), 'row')}")


def head_text(target: str) -> HeadText:
    """How predictions of a classifier or a regression are shown. Raises UserError for a model that generates text."""
    check_task(target, tuple(name for name, task in TASKS.items() if not task.text.generates), IS_GENERATOR)
    task = task_of(target).text
    assert isinstance(task, HeadText)
    return task


def predicted(
    target: str, inputs: list[Any], model: Any, processor: Any, report: Report | None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Each input with the outputs of the model.

    Args:
        options: of `HeadText.outputs`, where a task has some.
        inputs: texts, or dicts with `text` and `text_pair`; or files, as `Rows.files` finds them.
        processor: a tokenizer, or a processor in its place.
    """
    import torch

    from hfstrat.data.labeled import Texts

    task = head_text(target)
    if task_of(target).model.reads_tokens:
        processor = Texts(processor, report.run.recipe.data.max_length if report else MAX_LENGTH)
    for row in inputs:
        yield row, task.outputs(model, processor, row, torch.float32, **options)  # as the weights are, without autocast


def predict_files(target: str, paths: list[str], output: Path | None, boxes: Boxes) -> None:
    """Print the labels or boxes of images, or the labels of recordings, of files and of those in folders; or write a .jsonl
    with `image` or `audio`, and `labels` and `scores` or `objects`.

    Raises:
        UserError: a file that does not exist or cannot be read, or a folder to draw into that has files.
    """
    task, kind = head_text(target), task_of(target).rows.kind
    if boxes.given and not task.finds_boxes:
        raise UserError(f"{boxes.given}: it is for detectors, and {target} is a classifier; remove it")
    if boxes.draw is not None and boxes.draw.exists() and (not boxes.draw.is_dir() or any(boxes.draw.iterdir())):
        raise UserError(f"--draw: {boxes.draw} exists and is no empty folder; name another one")
    refs = task_of(target).rows.files(paths)
    model, processor, report = load(target, spreads=True)
    options = {} if boxes.threshold is None else {"threshold": boxes.threshold}
    with _writer(output) as write:
        for place, (ref, found) in enumerate(predicted(target, refs, model, processor, report, **options)):
            if boxes.draw is not None:
                boxes.draw.mkdir(parents=True, exist_ok=True)
                stem = Path(ref.name).stem
                task.draw(ref, found, boxes.draw / (f"{stem}.png" if len(refs) == 1 else f"{place + 1:04}-{stem}.png"))
            if output:
                write(json.dumps({kind.column: ref.name, **task.record(found)}, ensure_ascii=False))
            else:
                write(f"{task.line(found)}\t{ref.name}" if len(refs) > 1 else task.line(found))
    if output:
        print(f"{output}: {plural(len(refs), kind.noun, kind.plural)}")
    if boxes.draw is not None:
        print(f"{boxes.draw}: {plural(len(refs), kind.noun, kind.plural)} with boxes")


@contextmanager
def _writer(output: Path | None) -> Iterator[Callable[[str], Any]]:
    """A function that writes a line to the file, or prints it. The file gets its name when it is complete."""
    if output is None:
        yield lambda line: print(line, flush=True)
        return
    with written(output) as file:
        yield lambda line: file.write(line + "\n")


def _read_rows(file: Path, detect: Callable[[list[Row]], Callable[[Row], Any]]) -> list[Any]:
    """What each row of a file is read as.

    Args:
        detect: from the first rows to the function that reads one.

    Raises:
        UserError: a file or a row that cannot be read.
    """
    from hfstrat.data import readers, sources

    path = sources.local_file(str(file), "--file")
    if path is None:
        raise UserError(f"--file: {file}: no such file")
    read, found = detect(readers.read_head(path)), []
    for number, row in enumerate(readers.read(path), 1):
        try:
            found.append(read(row))
        except BadRow as error:
            raise UserError(f"{file}: row {number}: {error}") from None
    return found


def _read_prompts(file: Path, sees: bool = False) -> list[Any]:
    """The prompts of a file, as training reads those of its rows; `sees`: with their images."""

    def read(row: Row) -> Any:
        if set(row) == {"text"} and isinstance(row["text"], str):  # a line of a .txt
            return valid(row["text"])
        if sees:
            from hfstrat.data import image_messages

            return image_messages.prompt_of(row, file.absolute().parent)
        return _prompt_of(row)

    return _read_rows(file, lambda head: read)


def _prompt_of(row: Row) -> Any:
    """What a row asks, as `Renderer.prompt_ids` takes it: its `prompt`, or its `messages`, with `system` and `tools`.

    Raises:
        BadRow: the row has neither, or they are not as in rows to train on.
    """
    values = by_our_names(row, {})
    name = next((name for name in ("prompt", "messages") if values.get(name)), None)
    if name is None:
        raise BadRow(f"it has neither 'prompt' nor 'messages'; it has {', '.join(row)}")
    messages = formats.with_system(parse_messages(values[name], name, "user"), values)
    found = {"tools": parse_tools(values), "chat_template_kwargs": parse_template_kwargs(values)}
    given = {key: value for key, value in found.items() if value}
    if len(messages) == 1 and isinstance(values[name], str) and not given:
        return valid(values[name])
    return valid({"messages": messages, **given} if given else messages)


def _read_texts(file: Path, data: Data | None) -> list[dict[str, str]]:
    """The texts and pairs of texts of a file, read as those of training rows; labels are ignored.

    Args:
        data: of the training, whose mapping of columns is used where the file has these columns.
    """
    mapping = {theirs: ours for source in data.train for theirs, ours in data.of(source, "columns").items()} if data else {}

    def detect(head: list[Row]) -> Callable[[Row], dict[str, str]]:
        reading = TextFormat.detect(head, str(file), mapping)
        return lambda row: reading.example(row).prompt

    return _read_rows(file, detect)
