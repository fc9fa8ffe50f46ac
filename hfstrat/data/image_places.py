"""Where the images of a row are, and which place in its texts each one has: `MARK`, a private character, stands for one.

Read are content parts (`{"type": "image"}` with a column `images`, or with the image itself), OpenAI's `image_url` with the
bytes in it, and `<image>` in a text, as in LLaVA's data. Images of a row without any place for them precede the text of the
first user turn, as in TRL.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hfstrat.data.image_files import IMAGE, ImageRef
from hfstrat.data.media_files import MediaRef
from hfstrat.data.media_rows import file_of
from hfstrat.data.values import BadRow, is_missing
from hfstrat.recipe.format import plural

MARK = "\ue0f1"  # private use: no text of a person has it
WORD = "<image>"  # the mark of an image in the text of a row
COLUMNS = ("images", "image")  # the first that is present
IMAGE_PARTS = ("image", "image_url", "input_image")
OTHER_PARTS = {"video": "videos", "audio": "sound", "input_audio": "sound", "video_url": "videos"}
CONTENT = ("content", "value")  # of a message
HOLDERS = ("messages", "conversations", "prompt", "completion")  # columns with text or messages
ASKING = ("messages", "conversations", "prompt", "instruction")  # columns that images without a place are placed in
NETWORK = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
BOTH = "have values of both images and image, of which image is not read"
PLACED = "have images without a place in the conversation, which precede the text of the first user turn, as in TRL"


def images_of(values: dict[str, Any]) -> list[MediaRef] | None:
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


def _messages_in(values: Mapping[str, Any], columns: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for name in columns:
        if isinstance(values.get(name), list):
            yield from (entry for entry in values[name] if isinstance(entry, Mapping))


def is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def has_parts(values: Mapping[str, Any], columns: Iterable[str] = HOLDERS) -> bool:
    """Whether a message of the row names images as parts of its content: `<image>` in a text is then no mark."""
    contents = (entry.get("content") for entry in _messages_in(values, columns))
    return any(is_image(part) for content in contents if isinstance(content, list) for part in content)


class Places:
    """The places of images in one row.

    Args:
        has_column: whether the row has a column with images.
        has_parts: whether parts of the content are images.
        found: the image of each place, in order; None where it is of the column.
    """

    def __init__(self, has_column: bool, has_parts: bool, found: Iterable[MediaRef | None] = ()) -> None:
        self.has_column, self.has_parts, self.found = has_column, has_parts, list(found)

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
        if not is_image(part):
            return {**part, "text": self._text(part["text"], column)} if isinstance(part.get("text"), str) else part
        value = next(
            (part[n] for n in ("image", "image_url", "url", "path", "bytes", "base64") if part.get(n) is not None), None
        )
        self.found.append(None if value is None else _ref(value, f"{column}: image"))
        return {"type": "text", "text": MARK}

    def join(
        self, given: list[MediaRef] | None, values: dict[str, Any], columns: Iterable[str]
    ) -> tuple[tuple[MediaRef, ...], tuple[str, ...]]:
        """The images of the places, in order, and what was changed.

        Args:
            given: those of the row's column.
            values: of the row; images without any place are placed in these `columns` of it, in place.

        Raises:
            BadRow: places and images differ.
        """
        column, open_places = list(given or []), sum(one is None for one in self.found)
        if column and not self.found:
            for name in columns:
                place_first(values, name, len(column))
            return tuple(column), (PLACED,)
        if open_places != len(column):
            marks = f"{plural(open_places, 'place')} for images without one of their own"
            raise BadRow(
                f"the conversation has {marks}, but the row has {plural(len(column), 'image')} in its column; expected one "
                f"for each place ({WORD}, or a part of type image)"
            )
        rest = iter(column)
        return tuple(next(rest) if one is None else one for one in self.found), ()


def place_first(values: dict[str, Any], name: str, count: int) -> None:
    """Put this many marks before the text of the first user turn of a column, in place. Raises BadRow where there is none."""
    value = values[name]
    if isinstance(value, str):
        values[name] = MARK * count + value
        return
    place = first_user_turn(value)
    if place is None:
        raise BadRow(f"it has {plural(count, 'image')} and no user turn to place them in")
    entry = value[place]
    key = next((key for key in CONTENT if entry.get(key) is not None), "content")
    content = entry.get(key) or ""
    more = [{"type": "text", "text": MARK * count}, *content] if isinstance(content, list) else MARK * count + content
    values[name] = [*value[:place], {**entry, key: more}, *value[place + 1 :]]


def first_user_turn(value: Any) -> int | None:
    """The place of the first message of a user in a column; None where it has none."""
    for place, entry in enumerate(value if isinstance(value, list) else []):
        if isinstance(entry, Mapping) and str(entry.get("role", entry.get("from", ""))).lower() in ("user", "human"):
            return place
    return None
