"""Preferences between answers to prompts with images: pairs, or answers with labels, whose prompts have images.

The columns are those of `preferences`, with a column `images` or images in the messages, as in TRL. Where both answers are
complete conversations without a prompt of their own, both have the places of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from hfstrat.data.formats import hash_text
from hfstrat.data.image_chats import UNREADABLE, Images, columns_of_images, digest_of_template, names_of, stored, too_long
from hfstrat.data.image_files import IMAGE
from hfstrat.data.image_messages import ImageExample, ImageTextSource
from hfstrat.data.image_places import BOTH, COLUMNS, MARK, Places, first_user_turn, has_parts, images_of
from hfstrat.data.image_render import ImageRenderer
from hfstrat.data.media_files import MediaRef, Unreadable
from hfstrat.data.media_rows import check_unreadable
from hfstrat.data.preference_rows import Encoded, PreferenceEncoder, PreferenceWriter, Wanted
from hfstrat.data.preferences import (
    OTHER_PROMPT,
    PROMPT_COLUMNS,
    LabeledFormat,
    Preference,
    PreferenceFormat,
    answer_column,
    prompt_column,
)
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import text_of
from hfstrat.data.stats import Statistics
from hfstrat.data.values import BadRow, Row, is_missing
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source

VERSION = 1  # of the token rows written here: increase it where they change
OF_PROMPT = ("system", "history", *PROMPT_COLUMNS, "input")
ANSWERS = ("chosen", "chosen_messages", "rejected", "rejected_messages", "completion")


class ImagePreferenceFormat(PreferenceFormat):
    """How the rows of one source of preferences with images are read."""

    @classmethod
    def detect(
        cls, head: list[Row], source: str, wanted: str, mapping: dict[str, str], features: Mapping[str, list[str]] | None = None
    ) -> ImagePreferenceFormat:
        found = super().detect(head, source, wanted, mapping, features)
        assert isinstance(found, ImagePreferenceFormat)
        return replace(found, reads=found.reads | set(COLUMNS))

    def example(self, row: Row) -> Preference:
        """The row as a preference, with `MARK` in the places of its images. Raises BadRow if it does not fit the format."""
        values = self.values(row)
        _leave_one_prompt(values)
        given, parts = images_of(values), has_parts(values, (*OF_PROMPT, *ANSWERS))
        groups = [names for names in (OF_PROMPT, *((name,) for name in ANSWERS)) if any(name in values for name in names)]
        found = [_marked(values, names, Places(given is not None, parts)) for names in groups]
        changes: tuple[str, ...] = (BOTH,) if all(not is_missing(values.get(name)) for name in COLUMNS) else ()
        if given and not any(places.found for places in found):
            changes += found[0].join(given, values, _asking(values))[1]
            found = [Places(True, parts, [None] * len(given))]
        made = self.parsed(values)
        if made.problem:
            return made._replace(changes=(*made.changes, *changes))
        if any(MARK in turn["content"] + turn.get("reasoning_content", "") for each in made.answers for turn in each):
            raise BadRow("an image is in an answer: the model generates text; expected images in the prompt")
        images, problem = _images(made, found, given)
        return made._replace(images=images, problem=problem, changes=(*made.changes, *changes))


class ImageLabeledFormat(ImagePreferenceFormat, LabeledFormat):
    """Answers with labels to prompts with images; a pair is read as two answers, as in `LabeledFormat`."""


def _leave_one_prompt(values: dict[str, Any]) -> None:
    """Remove the columns that are not read as the prompt, in place, so that images are placed in the one that is.

    Where both answers are complete conversations with images, these have the prompt with the places of its images.
    """
    name, answers = prompt_column(values), [answer_column(values, side) for side in ("chosen", "rejected")]
    whole = all(first_user_turn(values.get(one)) is not None for one in answers)
    if whole and (has_parts(values, answers) or images_of(values)):
        name = None
    for other in PROMPT_COLUMNS:
        if other != name:
            values.pop(other, None)


def _marked(values: dict[str, Any], names: tuple[str, ...], places: Places) -> Places:
    """Mark the places of images in some columns, in place. Raises BadRow."""
    for name in names:
        if name in values:
            values[name] = places.marked(values[name], name)
    return places


def _asking(values: Mapping[str, Any]) -> list[str]:
    """The columns that images without a place are placed in: the prompt, and answers that are complete conversations."""
    prompt = [name for name in (prompt_column(values),) if name]
    whole = [name for name in ANSWERS if first_user_turn(values.get(name)) is not None]
    if not prompt and not whole:
        raise BadRow("it has images and no prompt to place them in: expected a column prompt, or complete conversations")
    return [*prompt, *whole]


def _images(made: Preference, found: list[Places], given: list[MediaRef] | None) -> tuple[tuple[MediaRef, ...], str]:
    """The images of the prompt, and the problem where two conversations have different ones. Raises BadRow."""
    marks = sum(turn["content"].count(MARK) for turn in made.messages)
    fitting = [places for places in found if len(places.found) == marks]
    if marks and not fitting:
        raise BadRow("its conversations have different numbers of images; expected those of the prompt")
    if not marks:
        return Places(False, False).join(given, {}, ())[0], ""  # raises where images have no place
    several = [places.join(given, {}, ())[0] for places in fitting]
    return several[0], "" if all(one == several[0] for one in several) else OTHER_PROMPT


class PicturePart(NamedTuple):
    """A token row: that of `PairPart`, and the columns of images. `spans` are of each of its sequences; they are equal."""

    input_ids: list[int]
    labels: list[int]
    length: int
    row: int
    text_hash: int
    split: int
    desirable: int
    images: list[dict[str, Any]]
    image_tokens: int
    content: int
    spans: list[int]


class ImagePreferenceWriter(PreferenceWriter):
    """Turns rows of preferences with images into token rows; every image is decoded once."""

    batch = 64
    renderer: ImageRenderer  # type: ignore[assignment]

    def __init__(self, reading: PreferenceFormat, data: Data, renderer: ImageRenderer) -> None:
        super().__init__(reading, data, renderer)
        self.images, self.bad = dict[int, Images](), list[str]()

    def columns(self) -> dict[str, Any]:
        return super().columns() | columns_of_images()

    def parts(self, batch: list[tuple[int, Row]], unpaired: bool) -> list[Any]:
        self.images.clear()
        return super().parts(batch, unpaired)

    def read(self, index: int, row: Row) -> Preference:
        found = super().read(index, row)
        if found.problem:
            return found
        try:
            self.images[index] = Images.decoded(found.images)
        except Unreadable as error:
            self.bad.append(f"{self.reading.where(index)}: {error}")
            return found._replace(problem=UNREADABLE)
        return found._replace(changes=(*found.changes, *dict.fromkeys(self.images[index].changes)))

    def prompt_key(self, index: int, found: Preference) -> Any:
        return found.messages, self.images[index].content

    def sequences_of(self, wanted: list[Wanted]) -> list[list[list[Encoded]]]:
        return [[self._sequences(one, example) for example in one.examples] for one in wanted]

    def _sequences(self, one: Wanted, example: Any) -> list[Encoded]:
        given = ImageExample(example, one.found.images)
        try:
            return [Encoded(*each) for each in self.renderer.rows_of(given, self.images[one.number].sizes)]
        except BadRow as error:
            raise UserError(f"{self.reading.where(one.number)}: {error}") from None

    def fit(self, one: Encoded, where: str) -> Encoded | None:
        limit = self.data.max_length
        if self.data.overflow == "truncate" and any(end > limit for _, end in one.spans):
            raise too_long(one, where, limit, self.renderer.processor, "drop")
        return super().fit(one, where)

    def part(self, one: Wanted, first: Encoded, second: Encoded) -> PicturePart:
        if first.spans != second.spans:
            raise UserError(
                f"{self.reading.where(one.number)}: the chat template writes the prompt differently before the two answers, so "
                "that its images have other places; set data.template to one that does not"
            )
        images, found = self.images[one.number], super().part(one, first, second)
        text = hash_text(f"{one.found.content.replace(MARK, ' ')} {images.content}")
        tokens = 2 * sum(end - start for start, end in first.spans)
        spans = [place for span in first.spans for place in span]
        columns = (*found[:4], text, *found[5:], stored(one.found.images), tokens, images.content, spans)
        return PicturePart._make(columns)

    def digest_of(self, parts: list[Any]) -> bytes:
        return repr([part.content for part in parts]).encode()

    def check(self) -> None:
        check_unreadable(self.stats, self.bad, IMAGE)
        super().check()


class ImagePreferenceEncoder(PreferenceEncoder):
    """Rows of preferences with images.

    Args:
        unpaired: as for `PreferenceEncoder`.
    """

    def open(self, source: Source, data: Data, key: str) -> ImageTextSource:
        return ImageTextSource.open(source, data, key)

    def reader(self, source: DataSource) -> Callable[..., Any]:
        return reader(self.unpaired)

    def shown(self, row: dict[str, Any]) -> str:
        return " ".join([*names_of(row), text_of(row, self.tokenizer)])

    def options(self, source: DataSource) -> dict[str, Any]:
        own = {"task": "image-text-to-text", "image_version": VERSION, "chat_template": digest_of_template(self.tokenizer)}
        return super().options(source) | own

    def write(self, source: DataSource, target: Any) -> Statistics:
        rows, reading = source.read()
        return ImagePreferenceWriter(reading, source.data, self.renderer).write(rows, self.unpaired, target)


def reader(unpaired: bool) -> Callable[..., Any]:
    """The function that chooses how rows are read, from the first of them."""
    return ImageLabeledFormat.detect if unpaired else ImagePreferenceFormat.detect
