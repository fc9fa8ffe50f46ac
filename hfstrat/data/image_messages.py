"""Conversations with images, and the sources that they are read from. `image_places` has where an image is in a text."""

from __future__ import annotations

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
from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_places import ASKING, BOTH, COLUMNS, MARK, NETWORK, Places, has_parts, images_of, is_image
from hfstrat.data.image_rows import ImageSource
from hfstrat.data.media_files import MediaRef
from hfstrat.data.media_rows import stat_of
from hfstrat.data.messages import parse_messages, parse_template_kwargs
from hfstrat.data.sources import DataSource
from hfstrat.data.values import REPLACED, BadRow, Row, is_missing, valid
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

KINDS = tuple(name for name in FORMATS if name != "text")
OUR_COLUMNS = sorted({*COLUMNS, *(name for kind in KINDS for name in FORMATS[kind].needed | FORMATS[kind].optional)})


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
        given = images_of(values)
        places = Places(given is not None, has_parts(values))
        for name in FORMATS[self.kind].needed | {"input", "system", "history"}:
            if name in values:
                values[name] = places.marked(values[name], name)
        images, changes = places.join(given, values, [name for name in ASKING if name in FORMATS[self.kind].needed][:1])
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
    given, places = images_of(values), Places("images" in row or "image" in row, has_parts(values))
    values[name] = places.marked(values[name], name)
    images, _ = places.join(given, values, [name])
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
        if is_image(part):
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
