"""Statistics of conversations with images: tokens, positions of the vision tower and seconds, from a sample of the rows.

How many tokens an image becomes is decided by the code of the model's processor, so that it is run. It needs torch.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data import sources
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.format import plural
from hfstrat.recipe.load import key_of
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import Task

if TYPE_CHECKING:
    from hfstrat.data.image_chats import Images
    from hfstrat.data.image_messages import ImageExample
    from hfstrat.data.image_render import ImageRenderer

KEPT = 400  # rows of the sample
SECONDS = 4.0  # that reading them may take
MULTIPLE = 16  # of a proposed max_length


@dataclass(frozen=True)
class Pictures:
    """The images of the sampled rows, one number for each row.

    images: their number; `tokens`: what they become; `numbers`: of their pixels, as the vision tower is given them.
    patch: numbers of one position of the tower.
    reading: seconds to decode the images of a row and to make pixels of them.
    """

    images: np.ndarray
    tokens: np.ndarray
    numbers: np.ndarray
    patch: int
    reading: float

    @property
    def mean_patches(self) -> float:
        """Positions of the tower for a row."""
        return float(self.numbers.mean()) / self.patch

    @property
    def patches_of_image(self) -> float:
        """Positions of the tower for an image."""
        return float(self.numbers.sum()) / self.patch / max(1, int(self.images.sum()))

    def line(self, lengths: np.ndarray) -> str:
        each = f"{self.images.mean():.3g} a row" + (" (0 in some)" if not self.images.all() else "")
        return (
            f"images: {each}, {self.tokens.mean():,.0f} tokens a row of {lengths.mean():,.0f} (at most "
            f"{self.tokens.max():,}), {self.mean_patches:,.0f} positions of the vision tower"
        )


@dataclass
class _Sample:
    """What is collected row by row; `rows` are those of the data, of which each may become several."""

    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    images: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """Rows of one source, of which a sample was looked at."""

    rows: int
    kind: str
    sample: _Sample
    remarks: list[str]

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.sample.lengths, dtype=np.int64)

    @property
    def supervised_share(self) -> float:
        return self.sample.supervised / max(1, int(self.lengths.sum()))

    def pictures(self, patch: int) -> Pictures:
        found = self.sample
        images, tokens, numbers = (np.asarray(each, dtype=np.int64) for each in (found.images, found.tokens, found.numbers))
        return Pictures(images, tokens, numbers, patch, statistics.median(found.seconds[1:] or found.seconds or [0.0]))

    def estimated(self) -> str:
        """In words, where the sample is not all rows."""
        looked = self.sample.rows
        return f"tokens and images, from {looked:,} of {self.rows:,} rows" if looked < self.rows else ""


_seen: dict[str, Found] = {}


def look(data: Data, task: Task, recipe: Recipe) -> Found:
    """Read the rows of the first source, and render a sample with the processor of the recipe's model; once in this process
    for the same data, processor and settings.

    Raises:
        UserError: as training does.
    """
    first = data.train[0]
    if not sources.is_local(first.path):
        raise UserError(f"--data: {first.path}: no such file; advise reads local files only")
    file = Path(first.path).expanduser()
    changed = file.stat().st_mtime_ns if file.exists() else 0
    key = json.dumps([data.model_dump(), recipe.model.model_dump(), recipe.image.model_dump(), changed], default=str)
    try:
        if key not in _seen:
            _seen[key] = _look(data, task, recipe)
        return _seen[key]
    except UserError as error:
        raise UserError(str(error) if key_of(str(error)) or str(error).startswith("--") else f"--data: {error}") from None


def _look(data: Data, task: Task, recipe: Recipe) -> Found:
    from hfstrat.data.image_files import IMAGE
    from hfstrat.data.image_messages import ImageTextSource
    from hfstrat.data.media_rows import check_unreadable, example_of
    from hfstrat.data.stats import Statistics

    source = ImageTextSource.open(data.train[0], data, "--data")
    source.detect = task.rows.reader
    rows, reading = source.read()
    chosen: list[tuple[int, ImageExample]] = []
    count, draw = 0, np.random.default_rng(0)
    for number, row in enumerate(rows):
        count += 1
        place = number if number < KEPT else int(draw.integers(0, count))
        if place < KEPT:
            chosen[place : place + 1] = [(number, example_of(row, reading, number))]
    if not count:
        raise UserError(f"{data.train[0].path}: it has no rows; expected at least one")
    renderer = task.rows.renderer(task.rows.load_processor(recipe), data.template, data.chat_template_kwargs)
    sample, until = _Sample(), time.monotonic() + SECONDS
    for place in draw.permutation(len(chosen)):
        number, example = chosen[place]
        _measure(sample, number, example, reading, renderer)
        if time.monotonic() > until and len(sample.lengths) > 1:
            break
    stats = Statistics(data.train[0].path, warnings=[*reading.remarks, *source.remarks()])
    stats.rows_read = sample.rows
    check_unreadable(stats, sample.unreadable, IMAGE)
    if not sample.lengths:
        raise UserError(f"{data.train[0].path}: no row of {plural(stats.rows_read, 'row')} can be trained on")
    return Found(count, reading.kind, sample, stats.remarks())


def _measure(sample: _Sample, number: int, example: ImageExample, reading: Any, renderer: ImageRenderer) -> None:
    """Add a row to the sample. Raises UserError: it does not fit the processor."""
    from hfstrat.data.image_chats import Images
    from hfstrat.data.media_files import Unreadable
    from hfstrat.data.values import BadRow

    sample.rows += 1
    if not example.has_target:
        return
    started = time.monotonic()
    try:
        images = Images.decoded(example.images)
        encoded = renderer.rows_of(example, images.sizes)
    except Unreadable as error:
        sample.unreadable.append(f"{reading.where(number)}: {error}")
        return
    except BadRow as error:
        raise UserError(f"{reading.where(number)}: {error}") from None
    numbers = _numbers(images, renderer)
    sample.seconds.append(time.monotonic() - started)
    for row in encoded:  # several, where a template writes a row for each answer
        sample.lengths.append(len(row.ids))
        sample.supervised += sum(label >= 0 for label in row.labels)
        sample.images.append(len(row.spans))
        sample.tokens.append(row.image_tokens)
        sample.numbers.append(numbers if row.spans else 0)


def _numbers(images: Images, renderer: ImageRenderer) -> int:
    """Numbers of the pixels of images of these sizes."""
    from PIL import Image

    if not images.sizes:
        return 0
    found = renderer.processor.pixels([[Image.new("RGB", size) for size in images.sizes]])
    return int(found["pixel_values"].numel())
