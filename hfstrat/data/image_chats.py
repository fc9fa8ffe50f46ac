"""The data of a vision-language model: conversations as token ids, with where their images are.

Every image is decoded once, to count its tokens and to find those that cannot be read; pixels are read again for each batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data.coverage import Notes
from hfstrat.data.formats import hash_text
from hfstrat.data.image_files import IMAGE, decode
from hfstrat.data.image_messages import ImageExample, ImageTextFormat, ImageTextSource
from hfstrat.data.image_places import MARK
from hfstrat.data.image_render import Encoded, ImageRenderer
from hfstrat.data.media_files import MediaRef, Unreadable
from hfstrat.data.media_rows import check_unreadable, example_of
from hfstrat.data.prepare import PreparedData, RowEncoder, divide, evaluation_fields
from hfstrat.data.render import RENDER_VERSION, TEMPLATES
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import text_of
from hfstrat.data.stats import LongRows, Statistics, check
from hfstrat.data.tokenize import Writer, is_supervised, take_notes
from hfstrat.data.tokenize import schema as token_schema
from hfstrat.data.values import BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    import pyarrow

WRITE_VERSION = 2  # of how rows are written: increase it where that changes
BATCH = 64  # rows rendered at a time


class Part(NamedTuple):
    """A prepared row: see `schema`."""

    input_ids: list[int]
    labels: list[int]
    length: int
    row: int
    text_hash: int
    images: list[dict[str, Any]]
    image_tokens: int
    content: int
    spans: list[int]


def schema() -> pyarrow.Schema:
    """Columns of the prepared data: those of a text, the images (a path, in an archive its member, or bytes), the number of
    their tokens, the first 64 bits of a SHA-256 over their bytes, and the starts and ends of the tokens of each."""
    return token_schema(**columns_of_images())


class Images(NamedTuple):
    """The images of a row: their sizes (width, height), a hash of their bytes, and what decoding changed."""

    sizes: list[tuple[int, int]]
    content: int
    changes: list[str]

    @classmethod
    def decoded(cls, refs: Iterable[MediaRef]) -> Images:
        """Decode the images of a row. Raises Unreadable, which names the image."""
        sizes, changes, digest = list[tuple[int, int]](), list[str](), hashlib.sha256()
        for ref in refs:
            try:
                data = ref.read()
                found = decode(data)
            except Unreadable as error:
                raise Unreadable(f"{ref.name}: {error}") from None
            digest.update(hashlib.sha256(data).digest())
            sizes.append(found.image.size)
            changes += found.changes
        content = int.from_bytes(digest.digest()[:8], "little", signed=True) if sizes else 0
        return cls(sizes, content, changes)


def columns_of_images() -> dict[str, pyarrow.DataType]:
    """The columns that rows with images have beside those of texts; see `schema`."""
    import pyarrow as pa

    image = pa.struct([("path", pa.string()), ("member", pa.string()), ("data", pa.large_binary())])
    return {"images": pa.list_(image), "image_tokens": pa.int32(), "content": pa.int64(), "spans": pa.list_(pa.int32())}


def stored(refs: Iterable[MediaRef]) -> list[dict[str, Any]]:
    """Images as they are in the column `images`."""
    return [{"path": ref.path, "member": ref.member, "data": ref.data} for ref in refs]


def size_of(one: Any) -> str:
    """The tokens of an encoded row, in words."""
    tokens = sum(end - start for start, end in one.spans)
    return f"{plural(len(one.ids), 'token')}, {tokens:,} of them of {plural(len(one.spans), 'image')}"


def too_long(one: Any, where: str, limit: int, processor: Any, instead: str) -> UserError:
    """The error about an encoded row whose images do not fit into `max_length`."""
    tokens = sum(end - start for start, end in one.spans)
    cure = processor.cure(tokens, limit - (len(one.ids) - tokens))
    return UserError(
        f"{where}: {size_of(one)}, more than data.max_length = {limit}, and an image is never cut; set data.max_length: "
        f"{len(one.ids)}" + (f", make images smaller ({cure})" if cure else "") + f", or set data.overflow: {instead}"
    )


UNREADABLE = "an image that cannot be read"


class ChatWriter:
    """Writes the rows of one source.

    Args:
        reading: how its rows are read.
    """

    def __init__(self, reading: Any, data: Data, renderer: ImageRenderer) -> None:
        self.reading, self.data, self.renderer = reading, data, renderer
        self.stats = Statistics(reading.source, reading.kind, renderer.template, reading.resolve(data.train_on))
        self.stats.warnings += reading.remarks
        self.long_rows, self.bad = LongRows(), list[str]()

    def write(self, rows: Iterable[Row], target: Path) -> Statistics:
        """Write the prepared rows to an Arrow stream. Raises UserError as `tokenize.write_tokens` does."""
        import pyarrow as pa

        self.stats.tools_as_text, self.renderer.notes = not self.renderer.supports_tools, Notes()
        numbered = enumerate(rows)
        with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema()) as stream:
            writer = Writer(stream, schema())
            while batch := list(itertools.islice(numbered, BATCH)):
                parts = [part for index, row in batch for part in self._parts(index, row)]
                writer.digest.update(repr([part.content for part in parts]).encode())
                writer.add(parts)
            writer.flush()
        self.stats.sha256 = writer.digest.hexdigest()
        take_notes(self.stats, self.renderer)
        check_unreadable(self.stats, self.bad, IMAGE)
        check(self.stats, self.long_rows, self.data)
        return self.stats

    def _parts(self, index: int, row: Row) -> list[Part]:
        stats, where = self.stats, self.reading.where(index)
        example = example_of(row, self.reading, index)
        stats.rows_read += 1
        try:
            images = Images.decoded(example.images)
        except Unreadable as error:
            stats.unusable[UNREADABLE] = stats.unusable.get(UNREADABLE, 0) + 1
            stats.rows_dropped += 1
            self.bad.append(f"{where}: {error}")
            return []
        try:
            encoded = [each for each in self.renderer.rows_of(example, images.sizes) if is_supervised(each[:2])]
            if self.data.overflow == "split" and any(len(each.ids) > self.data.max_length for each in encoded):
                kept = self._split(example, images, where)  # of an unrolled conversation once, not for each long row
                stats.rows_split += 1
            else:
                kept = [(one, ids) for each in encoded for one, ids in self._fit(each, where)]
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
        if not example.has_target:
            kept = []
        return self._count(row, index, example, images, encoded, kept)

    def _count(
        self,
        row: Row,
        index: int,
        example: ImageExample,
        images: Images,
        encoded: list[Encoded],
        kept: list[tuple[Encoded, range]],
    ) -> list[Part]:
        stats = self.stats
        stats.note(self.reading.unread(row), (*example.changes, *dict.fromkeys(images.changes)))
        stats.rows_kept, stats.rows_dropped = stats.rows_kept + bool(kept), stats.rows_dropped + (not kept)
        stats.rows_blank += not encoded or not example.has_target
        stats.rows_with_tools += bool(example.tools)
        stats.rows_unrolled += len(encoded) > 1
        stats.unrolled_into += len(encoded) if len(encoded) > 1 else 0
        stats.supervised += sum(label >= 0 for one, _ in kept for label in one.labels)
        stats.tokens += sum(len(one.ids) for one, _ in kept)
        refs = stored(example.images)
        text = hash_text(f"{example.content.replace(MARK, ' ')} {images.content}")
        return [
            Part(
                *(one.ids, one.labels, len(one.ids), index, text),
                *([refs[n] for n in which], one.image_tokens, images.content, [place for span in one.spans for place in span]),
            )
            for one, which in kept
        ]

    def _fit(self, one: Encoded, where: str) -> list[tuple[Encoded, range]]:
        """A row within `max_length`, or none, with which images it has. Raises UserError."""
        limit, overflow, length = self.data.max_length, self.data.overflow, len(one.ids)
        if length <= limit:
            return [(one, range(len(one.spans)))]
        if overflow == "error":
            raise UserError(f"{where}: {size_of(one)}, more than data.max_length = {limit} (data.overflow: error)")
        cut = limit if overflow == "truncate" else 0
        if overflow == "truncate" and any(end > limit for _, end in one.spans):
            raise too_long(one, where, limit, self.renderer.processor, "split between turns, or drop")
        lost = sum(label >= 0 for label in one.labels[cut:])
        self.stats.tokens_lost += length - cut
        self.stats.supervised_lost += lost
        self.stats.rows_cut += bool(cut)
        self.long_rows.add(length, lost)
        kept = Encoded(one.ids[:cut], one.labels[:cut], one.spans)
        return [(kept, range(len(one.spans)))] if cut and is_supervised(kept[:2]) else []

    def _split(self, example: ImageExample, images: Images, where: str) -> list[tuple[Encoded, range]]:
        """The conversation as several that are each within `max_length`, cut before turns of the user.

        The first message, if it is of the system, begins each of them.

        Raises:
            UserError: one exchange alone is too long.
        """
        messages, prompt = example.inner.messages or [], example.inner.prompt_turns
        head = 1 if messages and messages[0]["role"] == "system" else 0
        starts = [i for i, turn in enumerate(messages) if turn["role"] == "user" and i >= head]
        starts = [i for n, i in enumerate(starts) if n == 0 or messages[i - 1]["role"] != "user"] or [head]
        starts[0] = head
        found, begin = list[tuple[Encoded, range]](), 0
        while begin < len(starts):
            best = None
            for end in range(begin + 1, len(starts) + 1):
                stop = starts[end] if end < len(starts) else len(messages)
                part = self._part(example, images, head, starts[begin], stop, prompt)
                if max((len(each.ids) for each, _ in part), default=0) > self.data.max_length:
                    if best is None:
                        one = max((each for each, _ in part), key=lambda each: len(each.ids))
                        raise too_long(
                            one, f"{where}, message {starts[begin] + 1}", self.data.max_length, self.renderer.processor, "drop"
                        )
                    break
                best = part, end
            assert best is not None
            found += [each for each in best[0] if is_supervised(each[0][:2])]
            begin = best[1]
        return found

    def _part(
        self, example: ImageExample, images: Images, head: int, start: int, stop: int, prompt: int
    ) -> list[tuple[Encoded, range]]:
        messages = example.inner.messages or []
        shared = sum(turn["content"].count(MARK) for turn in messages[:head])
        first = sum(turn["content"].count(MARK) for turn in messages[:start])
        turns = [*messages[:head], *messages[max(start, head) : stop]]
        count = sum(turn["content"].count(MARK) for turn in turns) - shared
        which = [*range(shared), *range(first, first + count)] if start > head else list(range(shared + count))
        inner = example.inner._replace(messages=turns, prompt_turns=max(0, min(prompt, stop) - start + head) if prompt else 0)
        some = ImageExample(inner, tuple(example.images[n] for n in which))
        rows = self.renderer.rows_of(some, [images.sizes[n] for n in which])
        return [(each, which[: len(each.spans)]) for each in rows]  # type: ignore[misc]


def names_of(row: dict[str, Any]) -> list[str]:
    """The names of the files of the images of a prepared row."""
    return [str(image["member"] or Path(image["path"]).name) for image in row["images"]]


def digest_of_template(processor: Any) -> str:
    """A hash of the chat template, on which prepared rows depend."""
    return hashlib.sha256(json.dumps(processor.chat_template).encode()).hexdigest()


class ChatEncoder(RowEncoder):
    """Conversations with images, whose labels are their own tokens."""

    renderer: ImageRenderer

    def open(self, source: Source, data: Data, key: str) -> ImageTextSource:
        return ImageTextSource.open(source, data, key)

    def reader(self, source: DataSource) -> Callable[..., Any]:
        return ImageTextFormat.detect

    def shown(self, row: dict[str, Any]) -> str:
        return " ".join([*names_of(row), text_of(row, self.tokenizer)])

    def options(self, source: DataSource) -> dict[str, Any]:
        names = ("max_length", "overflow", "train_on", "chat_template_kwargs")
        given = {name: getattr(source.data, name) for name in names}
        template = digest_of_template(self.tokenizer)
        return {"task": "image-text-to-text", "template": template, "versions": [RENDER_VERSION, WRITE_VERSION], **given}

    def write(self, source: DataSource, target: Path) -> Statistics:
        rows, reading = source.read()
        return ChatWriter(reading, source.data, self.renderer).write(rows, target)


@dataclass
class ImageTexts(PreparedData):
    """Rows with `input_ids`, `labels`, `images` (where they are), `image_tokens`, `length`, `row`."""

    counts: dict[str, np.ndarray] = field(default_factory=dict)  # of the training rows: `images`, `image_tokens`

    def report(self) -> dict[str, Any]:
        return super().report() | {"images": self.image_facts()}

    def image_facts(self) -> dict[str, Any]:
        """How many images and image tokens the training rows have."""
        images, tokens = self.counts["images"], self.counts["image_tokens"]
        return {
            "images": int(images.sum()),
            "rows": len(images),
            "rows_without_images": int((images == 0).sum()),
            "most_images": int(images.max()),
            "image_tokens": int(tokens.sum()),
            "most_image_tokens": int(tokens.max()),
            "share_of_tokens": float(tokens.sum() / max(1, self.lengths.sum())),
        }

    def lines(self) -> list[str]:
        """The statistics as text, with those of the images."""
        found, rows = self.image_facts(), len(self.counts["images"])
        least, most = int(self.counts["images"].min()), found["most_images"]
        each = f"{found['images'] / rows:.3g} a row" + (f" ({least} to {most})" if least != most else "")
        line = (
            f"{each}, {found['image_tokens'] / rows:,.0f} tokens a row of {self.lengths.mean():,.0f} "
            f"({found['share_of_tokens']:.0%} of all, at most {found['most_image_tokens']:,} in a row)"
        )
        lines = [*super().lines(), f"{'images':<9} {line}"]
        if without := found["rows_without_images"]:
            lines.append(f"{'images':<9} {plural(without, 'training row')} {'has' if without == 1 else 'have'} no image")
        if shared := self.shared_images():
            lines.append(f"{'images':<9} {plural(shared, 'evaluation row')} with an image that training rows have too")
        return lines

    def shared_images(self) -> int:
        """Evaluation rows whose images training rows have too, perhaps with other texts."""
        train, held = (np.asarray(rows["content"][:], dtype=np.int64) for rows in (self.train, self.eval))
        return int((np.isin(held, train) & (held != 0)).sum()) if self.train is not self.eval else 0

    @classmethod
    def of(cls, fields: dict[str, Any]) -> ImageTexts:
        """With the counts of the training rows."""
        import pyarrow.compute as pc

        table = fields["train"].select_columns(["spans", "image_tokens"]).with_format("arrow")  # not the bytes of images
        images, tokens = list[np.ndarray](), list[np.ndarray]()
        for batch in table.iter(10_000):
            images.append(pc.list_value_length(batch["spans"]).to_numpy() // 2)
            tokens.append(batch["image_tokens"].to_numpy())
        return cls(**fields, counts={"images": np.concatenate(images), "image_tokens": np.concatenate(tokens)})


def prepare(
    data: Data,
    processor: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> ImageTexts:
    """The data of a vision-language model. Raises UserError as `prepare.prepare` does."""
    encoder = ChatEncoder(ImageRenderer(processor, data.template, data.train_on, data.chat_template_kwargs))
    return ImageTexts.of(divide(encoder, data, seed, max_eval_rows, held_out).fields(data, seed, samples))


def prepare_eval(data: Data, processor: Any, samples: int = 0, max_rows: int | None = None) -> ImageTexts:
    """All rows of `data.train` as evaluation rows, with the masks of training. Raises UserError as `prepare` does."""
    template = data.template if data.template in TEMPLATES else "chat"  # the template of a file is by now the processor's own
    encoder = ChatEncoder(ImageRenderer(processor, template, data.train_on, data.chat_template_kwargs))
    return ImageTexts.of(evaluation_fields(encoder, data, samples, max_rows))
