"""Conversations with images: how the images of a row are found, and which place in the conversation each one has.

While a conversation is text, one private character (`MARK`) stands for each image. Read are content parts (`{"type": "image"}`
with a column `images`, or with the image itself), OpenAI's `image_url` with the bytes in it, and `<image>` in a text, as in
LLaVA's data. Images of a row without any place for them precede the text of the first user turn, as in TRL.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.data import readers
from hfstrat.data.columns import Reading, columns_of, filled, propose, rename
from hfstrat.data.formats import ALIASES, FORMATS, Example, with_system
from hfstrat.data.image_files import IMAGE, ImageRef
from hfstrat.data.image_rows import ImageSource
from hfstrat.data.media_files import MediaRef
from hfstrat.data.media_rows import file_of, stat_of
from hfstrat.data.messages import parse_messages, parse_template_kwargs
from hfstrat.data.sources import DataSource
from hfstrat.data.values import REPLACED, BadRow, Row, is_missing, valid
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

MARK = "\ue0f1"  # private use: no text of a person has it
WORD = "<image>"  # the mark of an image in the text of a row
COLUMNS = ("images", "image")  # the first that is present
KINDS = tuple(name for name in FORMATS if name != "text")
OUR_COLUMNS = sorted({*COLUMNS, *(name for kind in KINDS for name in FORMATS[kind].needed | FORMATS[kind].optional)})
IMAGE_PARTS = ("image", "image_url", "input_image")
OTHER_PARTS = {"video": "videos", "audio": "sound", "input_audio": "sound", "video_url": "videos"}
CONTENT = ("content", "value")  # of a message
HOLDERS = ("messages", "conversations", "prompt", "completion")  # columns with text or messages
NETWORK = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
BOTH = "have values of both images and image, of which image is not read"
PLACED = "have images without a place in the conversation, which precede the text of the first user turn, as in TRL"


class ImageExample(NamedTuple):
    """A conversation whose texts have `MARK` in the place of each image, and its images in that order."""

    inner: Example
    images: tuple[MediaRef, ...]

    @property
    def has_target(self) -> bool:
        return self.inner.has_target

    @property
    def changes(self) -> tuple[str, ...]:
        return self.inner.changes

    @property
    def tools(self) -> Any:
        return self.inner.tools

    @property
    def content(self) -> str:
        return self.inner.content

    @property
    def answer(self) -> str:
        return self.inner.answer

    @property
    def prompt(self) -> Any:
        """What precedes the last assistant turn, with its images, as `ImageRenderer.prompt_ids` takes it."""
        given = self.inner.prompt
        if given is None:
            return None
        words = given if isinstance(given, dict) else {"messages": given}
        count = sum(turn["content"].count(MARK) for turn in words["messages"])
        return {**words, "images": list(self.images[:count])}


@dataclass
class ImageTextFormat(Reading):
    """How the rows of one source are read: the format of the conversation, and the column with images."""

    kind: str = ""

    @classmethod
    def detect(
        cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str], features: Mapping[str, list[str]] | None = None
    ) -> ImageTextFormat:
        """The format of a source, detected from its first rows.

        Raises:
            UserError: a mapped column is missing, or the columns are no conversation.
        """
        names = rename(columns_of(head), mapping, source)
        given = [names[column] for column in columns_of(filled(head))] or list(names.values())
        if wanted == "auto":
            kind = next((kind for kind in KINDS if FORMATS[kind].needed <= set(given)), None)
            if kind is None:
                raise UserError(
                    f"{source}: task image-text-to-text needs a conversation (messages, conversations, prompt + completion or "
                    f"instruction + output) with its images; the data have {', '.join(given) or 'no columns'}. "
                    f"{propose(given, ALIASES)}"
                )
        elif wanted not in KINDS:
            raise UserError(f"data.format: {wanted}: task image-text-to-text reads {', '.join(KINDS)}, or auto")
        elif missing := sorted(FORMATS[wanted].needed - set(given)):
            raise UserError(
                f"data.format: {source}: format {wanted} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; the "
                f"data have {', '.join(given) or 'none'}"
            )
        else:
            kind = wanted
        return cls(source, names, kind, reads=FORMATS[kind].needed | FORMATS[kind].optional | set(COLUMNS))

    def example(self, row: Mapping[str, Any]) -> ImageExample:
        """The row as a conversation with its images. Raises BadRow where it does not fit."""
        values = self.values(row)
        given = _images_of(values)
        places = _Places(given is not None, _has_parts(values))
        for name in FORMATS[self.kind].needed | {"input", "system", "history"}:
            if name in values:
                values[name] = places.marked(values[name], name)
        images, changes = places.join(given, values, self.kind)
        if not any(is_missing(values.get(name)) for name in COLUMNS):
            changes = (*changes, BOTH)
        made = FORMATS[self.kind].parse(values)
        parts = [made.messages, made.tools]
        if (clean := valid(parts)) is not parts:
            made, changes = made._replace(messages=clean[0], tools=clean[1]), (*changes, REPLACED)
        _check_turns(made, len(images))
        return ImageExample(made._replace(changes=(*made.changes, *changes)), images)

    def resolve(self, train_on: str) -> str:
        """The value of `data.train_on` for these rows, with `auto` resolved."""
        if train_on != "auto":
            return train_on
        return "assistant" if self.kind in ("messages", "conversations") else "completions"


def _images_of(values: dict[str, Any]) -> list[MediaRef] | None:
    """The images of the row's column; None where it has none. Raises BadRow."""
    name = next((name for name in COLUMNS if name in values and not is_missing(values[name])), None)
    if name is None:
        return None
    given = values[name]
    listed = given if isinstance(given, list) else [given]
    return [_ref(each, f"{name}[{place}]" if len(listed) > 1 else name) for place, each in enumerate(listed)]


def _ref(value: Any, column: str) -> MediaRef:
    """An image as it is found. Raises BadRow: it is on the network, or no image."""
    if isinstance(value, str):
        if value.startswith("data:"):
            return _of_data_url(value, column)
        if value.lower().startswith(NETWORK):
            raise BadRow(
                f"'{column}' is on the network ({value[:60]}): images are read from files; download it and give its path"
            )
        if value.startswith("file://"):
            value = value.removeprefix("file://")
        if not value.strip():
            raise BadRow(f"'{column}' is an empty text, expected the path or the bytes of an image")
        return ImageRef(str(Path(value.strip()).expanduser()))
    if isinstance(value, Mapping) and not {"bytes", "path"} & value.keys():
        inner = next((value[name] for name in ("url", "image", "file_name") if value.get(name) is not None), None)
        if inner is not None:
            return _ref(inner, column)
    if isinstance(value, Mapping) and not isinstance(value.get("bytes"), bytes) and isinstance(value.get("path"), str):
        return _ref(value["path"], column)
    if isinstance(value, list):
        raise BadRow(f"'{column}' is a list in a list, expected one list with the images of the row")
    return file_of(dict(value) if isinstance(value, Mapping) else value, column, IMAGE)


def _of_data_url(value: str, column: str) -> MediaRef:
    """An image whose bytes are in its URL, as OpenAI's API takes it."""
    head, comma, rest = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return ImageRef("(bytes)", data=base64.b64decode(rest, validate=True))
    except (binascii.Error, ValueError):
        raise BadRow(f"'{column}' is a data URL without base64, expected data:image/png;base64,...") from None


def _messages_in(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in HOLDERS:
        if isinstance(values.get(name), list):
            yield from (entry for entry in values[name] if isinstance(entry, Mapping))


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def _has_parts(values: Mapping[str, Any]) -> bool:
    """Whether a message of the row names images as parts of its content: `<image>` in a text is then no mark."""
    contents = (entry.get("content") for entry in _messages_in(values))
    return any(_is_image(part) for content in contents if isinstance(content, list) for part in content)


class _Places:
    """The places of images in one row.

    Args:
        has_column: whether the row has a column with images.
        has_parts: whether parts of the content are images.
    """

    def __init__(self, has_column: bool, has_parts: bool) -> None:
        self.has_column, self.has_parts = has_column, has_parts
        self.found: list[MediaRef | None] = []  # the image of each place, in order; None where it is of the column

    def marked(self, value: Any, column: str) -> Any:
        """A value of the row with `MARK` in the places of its images. Raises BadRow."""
        if isinstance(value, str):
            return self._text(value, column)
        if isinstance(value, Mapping):
            return self._message(value, column)
        if isinstance(value, list):  # of messages, or the pairs of a history
            return [self.marked(entry, column) for entry in value]
        return value

    def _message(self, entry: Mapping[str, Any], column: str) -> dict[str, Any]:
        made = dict(entry)
        for name in CONTENT:
            content = entry.get(name)
            if isinstance(content, str):
                made[name] = self._text(content, column)
            elif isinstance(content, list):
                made[name] = [self._part(part, column) for part in content]
        return made

    def _text(self, text: str, column: str) -> str:
        if MARK in text:
            raise BadRow(f"'{column}' contains the character U+{ord(MARK):04X}, which stands for an image here; remove it")
        if self.has_parts or WORD not in text:
            return text
        if not self.has_column:
            raise BadRow(f"'{column}' has the mark {WORD}, but the row has no images; expected a column images, or no mark")
        self.found += [None] * text.count(WORD)
        return text.replace(WORD, MARK)

    def _part(self, part: Any, column: str) -> Any:
        if isinstance(part, str):
            return self._text(part, column)
        if not isinstance(part, Mapping):
            return part
        if (kind := part.get("type")) in OTHER_PARTS:
            raise BadRow(f"'{column}' contains a part of type {kind!r}: only images are read, not {OTHER_PARTS[str(kind)]}")
        if not _is_image(part):
            return {**part, "text": self._text(part["text"], column)} if isinstance(part.get("text"), str) else part
        value = next(
            (part[n] for n in ("image", "image_url", "url", "path", "bytes", "base64") if part.get(n) is not None), None
        )
        self.found.append(None if value is None else _ref(value, f"{column}: image"))
        return {"type": "text", "text": MARK}

    def join(
        self, given: list[MediaRef] | None, values: dict[str, Any], kind: str
    ) -> tuple[tuple[MediaRef, ...], tuple[str, ...]]:
        """The images of the places, in order, and what was changed. Raises BadRow where places and images differ."""
        column, open_places = list(given or []), sum(one is None for one in self.found)
        if column and not self.found:
            _place_first(values, kind, len(column))
            return tuple(column), (PLACED,)
        if open_places != len(column):
            marks = f"{plural(open_places, 'place')} for images without one of their own"
            raise BadRow(
                f"the conversation has {marks}, but the row has {plural(len(column), 'image')} in its column; expected one "
                f"for each place ({WORD}, or a part of type image)"
            )
        rest = iter(column)
        return tuple(next(rest) if one is None else one for one in self.found), ()


def _place_first(values: dict[str, Any], kind: str, count: int) -> None:
    """Put this many marks before the text of the first user turn, in place. Raises BadRow where there is none."""
    name = next(name for name in ("messages", "conversations", "prompt", "instruction") if name in FORMATS[kind].needed)
    value = values[name]
    if isinstance(value, str):
        values[name] = MARK * count + value
        return
    for place, entry in enumerate(value if isinstance(value, list) else []):
        speaker = str(entry.get("role", entry.get("from", ""))).lower() if isinstance(entry, Mapping) else ""
        if speaker in ("user", "human"):
            key = next((key for key in CONTENT if entry.get(key) is not None), "content")
            content = entry.get(key) or ""
            more = [{"type": "text", "text": MARK * count}, *content] if isinstance(content, list) else MARK * count + content
            values[name] = [*value[:place], {**entry, key: more}, *value[place + 1 :]]
            return
    raise BadRow(f"it has {plural(count, 'image')} and no user turn to place them in")


def _check_turns(example: Example, images: int) -> None:
    """Refuse images in answers: these models generate text. Raises BadRow."""
    for turn in example.messages or []:
        if turn["role"] == "assistant" and MARK in turn["content"] + turn.get("reasoning_content", ""):
            raise BadRow("an image is in a turn of the assistant: the model generates text; expected images in other turns")
    if (found := sum(turn["content"].count(MARK) for turn in example.messages or [])) != images:
        raise BadRow(f"of its {plural(images, 'image')} only {found} are in the conversation; expected them in messages")


def prompt_of(row: Row, folder: Path) -> dict[str, Any]:
    """What a row asks: its `prompt` or `messages` with its images, as `ImageRenderer.prompt_ids` takes it.

    Args:
        folder: that paths of images are relative to.

    Raises:
        BadRow: it has neither, or they are not as in rows to train on.
    """
    values = dict(_with_folder(row, folder, set(COLUMNS)))
    name = next((name for name in ("prompt", "messages") if values.get(name)), None)
    if name is None:
        raise BadRow(f"it has neither 'prompt' nor 'messages'; it has {', '.join(row)}")
    given, places = _images_of(values), _Places("images" in row or "image" in row, _has_parts(values))
    values[name] = places.marked(values[name], name)
    images, _ = places.join(given, values, "messages" if name == "messages" else "prompt-completion")
    messages = with_system(parse_messages(values[name], name, "user"), values)
    options = parse_template_kwargs(values)
    return valid({"messages": messages, "images": list(images), **({"chat_template_kwargs": options} if options else {})})


class ImageTextSource(ImageSource):
    """One source of conversations with images: tables, a folder or archive with `messages` in its metadata, a Hub data set."""

    @classmethod
    def open(cls, source: Source, data: Data, key: str) -> ImageTextSource:
        opened = super().open(source, data, key)
        assert isinstance(opened, ImageTextSource)
        if opened.paths or (opened.layout is not None and not opened.layout.metadata):
            raise UserError(
                f"{key}: {source.path}: images without conversations; expected a table with messages and images, or a folder "
                "with metadata.jsonl that has file_name and messages"
            )
        if opened.hub is not None:
            opened.hub = _undecoded_lists(opened.hub)
        return opened

    def _rows_of(self, file: Path) -> Iterator[Row]:
        folder = file.absolute().parent
        columns = {*COLUMNS, *(theirs for theirs, ours in self.wanted[1].items() if ours in COLUMNS)}
        return (_with_folder(row, folder, columns) for row in readers.read(file))

    def rows(self) -> Iterator[Row]:
        if self.layout is None:
            yield from super().rows()
            return
        folder = Path(self.layout.metadata).parent
        for row in self.layout.rows():
            extra = row.get("images")
            if isinstance(extra, list):
                named = [self.layout.ref(str(folder / each)) if isinstance(each, str) else each for each in extra]
                row = {name: value for name, value in row.items() if name != "image"} | {"images": named}
            yield row

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        return {}

    def digest(self) -> str:
        """A hash of what the rows are read from; of images by name, size and time, not by their bytes."""
        if self.files is None:
            return super().digest()
        refs = (ref for row in self.rows() for ref in refs_in(row) if ref.data is None)
        stated = [DataSource.digest(self), *(stat_of(ref.path) for ref in refs)]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def refs_in(value: Any) -> Iterator[MediaRef]:
    """The images that a row names, wherever they are in it."""
    if isinstance(value, MediaRef):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from refs_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from refs_in(each)


def _with_folder(row: Row, folder: Path, columns: set[str]) -> Row:
    """The row with the paths of its images relative to the folder of its table."""
    found = dict(row)
    for name, value in row.items():
        if name in columns:
            found[name] = [_located(each, folder) for each in value] if isinstance(value, list) else _located(value, folder)
        elif isinstance(value, list):
            found[name] = [_message_with_folder(entry, folder) for entry in value]
    return found


def _message_with_folder(entry: Any, folder: Path) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), list):
        return entry
    parts = []
    for part in entry["content"]:
        if _is_image(part):
            part = {key: _located(value, folder) if key != "type" else value for key, value in part.items()}
        parts.append(part)
    return {**entry, "content": parts}


def _located(value: Any, folder: Path) -> Any:
    """A path as an image in this folder; anything else as it is."""
    if isinstance(value, Mapping):
        keys = {key: _located(each, folder) for key, each in value.items() if key in ("path", "url", "image")}
        refs = [each for each in keys.values() if isinstance(each, MediaRef)]
        return refs[0] if refs and not isinstance(value.get("bytes"), bytes) else value
    if not isinstance(value, str) or not value.strip() or value.startswith("data:") or value.lower().startswith(NETWORK):
        return value
    return ImageRef(str(folder / Path(value.strip().removeprefix("file://")).expanduser()))


def _undecoded_lists(rows: Any) -> Any:
    """A Hub data set whose lists of images are bytes with a path."""
    from datasets import Image
    from datasets import Sequence as Several

    for name, feature in rows.features.items():
        if isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, Several(Image(decode=False)))
    return rows
