"""Conversations with images as token ids and labels. Masks are by position: the tokens of an image never have loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.chat_template import TEMPLATES, ChatTemplate, check_template
from hfstrat.data.coverage import Coverage
from hfstrat.data.image_files import ImageRef
from hfstrat.data.image_messages import ImageExample
from hfstrat.data.image_places import MARK
from hfstrat.data.image_processing import ChatProcessor
from hfstrat.data.media_files import MediaRef, Unreadable
from hfstrat.data.messages import Message
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.segments import Rendered, Segment
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    from PIL.Image import Image

NO_TEMPLATE = (
    "the processor has no chat template, which places images in a conversation; set data.template to a .jinja file, or "
    "model.tokenizer to a folder whose processor has one"
)


class ImageTemplate(ChatTemplate):
    """A chat template whose messages have `MARK` in the place of images, as does what it renders.

    Args:
        tokenizer: the processor.
    """

    tokenizer: ChatProcessor

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Message] | None = None,
        opens: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        return super().render(messages, tools, opens, options).replace(self.tokenizer.image_token, MARK)

    def _in_its_form(self, message: Message) -> Message:
        content = message["content"]
        if isinstance(content, str) and MARK in content:
            message = {**message, "content": parts_of(content)}
        return super()._in_its_form(message)

    def _needs_form(self, messages: Sequence[Message]) -> bool:
        return super()._needs_form(messages) or any(MARK in str(message["content"]) for message in messages)


def parts_of(content: str) -> list[dict[str, str]]:
    """A text with marks as parts of a content."""
    found = list[dict[str, str]]()
    for piece in re.split(f"({MARK})", content):
        if piece == MARK:
            found.append({"type": "image"})
        elif piece:
            found.append({"type": "text", "text": piece})
    return found


class TextCoverage(Coverage):
    """Whether the text around images is in the rendering: a template may write other spaces around an image."""

    def note(self, messages: list[Message], tools: Any, rows: list[str], *more: Any) -> None:
        lines = [{**message, "content": message["content"].replace(MARK, "\n")} for message in messages]
        super().note(lines, tools, [row.replace(MARK, "") for row in rows], *more)


class ImageSegment(Segment):
    """The tokens of one image, which are not cut and have no loss."""


class Encoded(NamedTuple):
    """A row: its ids and labels, how many images it has, and the start and end of the tokens of each."""

    ids: list[int]
    labels: list[int]
    spans: list[tuple[int, int]]

    @property
    def image_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


class PromptWithImages(list[int]):
    """The ids of a prompt, with its images: what `generate` needs in addition is `inputs`."""

    def __init__(self, ids: Sequence[int], images: Sequence[Image], processor: ChatProcessor) -> None:
        super().__init__(ids)
        self.images, self.processor = list(images), processor

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            return super().__getitem__(place)
        found = super().__getitem__(place)
        if len(found) == len(self):
            return self
        if self.images:
            raise UserError(
                f"evaluation.max_new_tokens: a prompt with {plural(len(self.images), 'image')} has {len(self):,} tokens, of "
                f"which {len(found):,} fit into the context, and an image is never cut; set a lower one"
            )
        return PromptWithImages(found, [], self.processor)

    @staticmethod
    def inputs(prompts: Sequence[Any], width: int) -> dict[str, Any]:
        """What a forward pass over these prompts, padded on the left to a width, is given beside their ids."""
        import torch

        processor = prompts[0].processor
        found: dict[str, Any] = processor.pixels([prompt.images for prompt in prompts if prompt.images])
        if name := processor.type_key:
            rows = [[0] * (width - len(prompt)) + processor.types(prompt) for prompt in prompts]
            found[name] = torch.tensor(rows)
        return found


class ImageRenderer(Renderer):
    """Renders conversations with images for one processor and its chat template.

    Args:
        processor: in the place of the tokenizer.
        template, train_on, options: as for `Renderer`; there is no plain template, which has no place for images.
    """

    def __init__(
        self, processor: ChatProcessor, template: str, train_on: str = "auto", options: Mapping[str, Any] | None = None
    ) -> None:
        if template == "plain":
            raise UserError("data.template: plain: it has no place for images; set chat, auto or a .jinja file")
        if template not in TEMPLATES:
            processor.words.chat_template = processor.processor.chat_template = check_template(template)
            template = "chat"
        if getattr(processor.words, "chat_template", None) is None:
            raise UserError(f"data.template: {template}: {NO_TEMPLATE}")
        super().__init__(processor, "chat", train_on, options)  # type: ignore[arg-type]
        self.processor, self.chat = processor, ImageTemplate(processor, options or {})
        self.coverage = TextCoverage()
        marks = sorted(processor.words.get_added_vocab(), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, marks))) if marks else re.compile(r"(?!)")

    def sizes(self, example: ImageExample) -> list[tuple[int, int]]:
        """The width and height of each image. Raises Unreadable: one of them cannot be decoded."""
        return [open_ref(ref).size for ref in example.images]

    def rows_of(self, example: ImageExample, sizes: list[tuple[int, int]]) -> list[Encoded]:
        """The conversation as token ids: one row, or several, as `Renderer.render` makes them. Raises BadRow."""
        self._check_texts(example.inner.messages or [])
        rendered = super().render(example.inner)
        rows = [self._expanded(row, sizes) for row in rendered]
        if rendered and max(map(len, map(_marks, rendered))) < len(sizes):
            raise BadRow(
                f"the chat template writes {len(_marks(rendered[-1]))} of its {plural(len(sizes), 'image')}: it has no place "
                "for them; set data.template to a template for images, or model.tokenizer to a processor with one"
            )
        return self.encode_images(rows)

    def encode_images(self, rows: list[Rendered]) -> list[Encoded]:
        """As `encode`, with the places of the images."""
        found = []
        for row, pairs in zip(rows, self.encode_segments(rows), strict=True):
            ids, labels = self._join(pairs, row.framed)
            spans, place = list[tuple[int, int]](), 0
            for piece, segment in pairs:
                if isinstance(segment, ImageSegment):
                    spans.append((place, place + len(piece)))
                    labels[place : place + len(piece)] = [IGNORED] * len(piece)
                place += len(piece)
            found.append(Encoded(ids, labels, spans))
        return found

    def prompt_ids(self, prompt: Any) -> list[int]:
        """As `Renderer.prompt_ids`; a prompt may have `images`, in the places of the marks of its messages.

        Raises:
            UserError: an image that cannot be read, or other marks than images.
        """
        given = prompt if isinstance(prompt, dict) else {"messages": prompt}
        refs = [each if isinstance(each, MediaRef) else ImageRef(str(each)) for each in given.get("images", [])]
        try:
            images = [open_ref(ref) for ref in refs]
        except Unreadable as error:
            raise UserError(str(error)) from None
        row = self.prompt_row({name: value for name, value in given.items() if name != "images"})
        if (places := len(_marks(row))) != len(images):
            raise UserError(f"the prompt has {plural(places, 'place')} for images and {plural(len(images), 'image')}")
        encoded = self.encode_images([self._expanded(row, [image.size for image in images])])[0]
        return PromptWithImages(encoded.ids, images, self.processor)

    def _expanded(self, row: Rendered, sizes: Sequence[tuple[int, int]]) -> Rendered:
        """The row with the tokens of each image in the place of its mark."""
        count = len(_marks(row))
        if not count:
            return row
        pieces, segments = iter(self.processor.pieces(sizes[:count])), list[Segment]()
        for segment in row.segments:
            texts = segment.text.split(MARK)
            for number, text in enumerate(texts):
                before, after = "", ""
                if number:
                    before, image, after = self._core(next(pieces, ""))
                    segments[-1] = segments[-1]._replace(text=segments[-1].text + before)
                    segments.append(ImageSegment(image, False))
                segments.append(segment._replace(text=after + text, ends=segment.ends and number + 1 == len(texts)))
        return Rendered([each for each in segments if each.text or each.ends], row.framed)

    def _core(self, piece: str) -> tuple[str, str, str]:
        """The text of an image from its first to its last special token, and what is around it."""
        found = [match.span() for match in self.special.finditer(piece)]
        if not found:
            return "", piece, ""
        return piece[: found[0][0]], piece[found[0][0] : found[-1][1]], piece[found[-1][1] :]

    def _check_texts(self, messages: list[Message]) -> None:
        for message in messages:
            for word in self.processor.reserved:
                if word in message["content"]:
                    raise BadRow(f"the text of a {message['role']} turn contains {word}, which stands for an image; remove it")


def open_ref(ref: MediaRef) -> Image:
    """The image in RGB. Raises Unreadable, which names it."""
    try:
        return ref.open()
    except Unreadable as error:
        raise Unreadable(f"{ref.name}: {error}") from None


def _marks(row: Rendered) -> list[str]:
    return re.findall(MARK, row.text)
