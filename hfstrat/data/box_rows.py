"""Rows of one image with boxes: where they come from, and how they are clipped, counted and written without their pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data import box_layout, features, media_layout, media_rows
from hfstrat.data.box_format import EXPECTED, BoxFormat, Corners, Evidence, LabeledBoxes, corners
from hfstrat.data.box_layout import BoxLayout
from hfstrat.data.image_rows import ImageMeasure, ImageSource
from hfstrat.data.sources import splits_of
from hfstrat.data.stats import Statistics
from hfstrat.data.values import Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    import pyarrow

MOST_UNUSABLE = 0.05  # share of the boxes that may be left out
SHOWN = 3
CLIPPED, FLAT, OUTSIDE = "clipped", "flat", "outside"
WORDS = {  # of one box, and of several
    CLIPPED: ("reaches over the border of its image and is clipped", "reach over the border of their image and are clipped"),
    FLAT: ("has no area and is left out", "have no area and are left out"),
    OUTSIDE: ("lies outside of its image and is left out", "lie outside of their image and are left out"),
}


@dataclass
class BoxSource(ImageSource):
    """One source of images with boxes: as one of images, or a COCO file or YOLO label files (`boxes`)."""

    boxes: BoxLayout | None = None

    @classmethod
    def open(cls, source: Source, data: Data, key: str) -> BoxSource:
        _, folder_splits = splits_of(source, data, key)
        if found := box_layout.find(source.path, key, folder_splits):
            if data.box_format not in ("auto", found.form):
                raise UserError(
                    f"data.box_format: {data.box_format}: {source.path} is a {'COCO' if found.form == 'xywh' else 'YOLO'} "
                    f"source, whose boxes are {found.form}; remove it"
                )
            return cls(source, data, None, None, boxes=found)
        layout = media_layout.find(source.path, key, folder_splits, cls.kind, needs_metadata=f"with their boxes; {EXPECTED}")
        if layout is not None:
            return cls(source, data, None, None, layout=layout)
        if cls.kind.fits(source.path):
            raise UserError(f"{key}: {source.path}: images alone have no boxes; {EXPECTED}")
        opened = ImageSource.open(source, data, key)
        return cls(source, data, opened.files, opened.hub)

    def read(self) -> tuple[Iterator[Row], Any]:
        rows, reading = super().read()
        given = self.data.class_names or None
        form = self.boxes.form if self.boxes is not None else self.data.box_format
        names = reading.class_names if given is None else given
        return rows, replace(reading, class_names=names, box_format=form, fixed=self.boxes is not None)

    def rows(self) -> Iterator[Row]:
        return self.boxes.rows() if self.boxes is not None else super().rows()

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        if self.boxes is not None or self.layout is not None:
            return {}
        own = features.class_names(self.files or []) if self.hub is None else features.of_features(self.hub.features)
        nested = features.of_objects(self.files or []) if self.hub is None else features.within(self.hub.features)
        return own | nested

    def digest(self) -> str:
        if self.boxes is None:
            return super().digest()
        return hashlib.sha256(json.dumps(self.boxes.identity()).encode()).hexdigest()

    def estimate_bytes(self) -> int:
        return 400 * self.boxes.count if self.boxes is not None else super().estimate_bytes()

    def remarks(self) -> list[str]:
        return list(self.boxes.lines) if self.boxes is not None else super().remarks()


def schema() -> pyarrow.Schema:
    """The columns of prepared rows beside those of images: `boxes` has left, top, right and bottom of each, in pixels."""
    import pyarrow as pa

    return pa.schema([("boxes", pa.list_(pa.float32()))])


@dataclass
class Counted:
    """What happened to the boxes of a source."""

    names: dict[str, int] = field(default_factory=dict)  # boxes by what happened to them
    images: dict[str, list[str]] = field(default_factory=dict)  # the first images, by the same
    kept: int = 0
    empty: int = 0  # images without boxes in the data
    emptied: int = 0  # images of which no box is left
    resized: list[str] = field(default_factory=list)  # images of another size than that their boxes are of
    evidence: Evidence = field(default_factory=Evidence)

    def note(self, what: str, image: str) -> None:
        self.names[what] = self.names.get(what, 0) + 1
        seen = self.images.setdefault(what, [])
        if image not in seen and len(seen) < SHOWN:
            seen.append(image)

    def check_sizes(self, source: str, images: int) -> list[str]:
        """A warning of images with another size than the data say. Raises UserError where they are too many."""
        if not self.resized:
            return []
        count, shown = len(self.resized), "; ".join(self.resized[:SHOWN])
        text = f"{plural(count, 'image')} of another size than the data say, so that the boxes do not fit: {shown}"
        if count > MOST_UNUSABLE * images:
            raise UserError(f"{source}: {text}. Save the images as they were annotated, or correct the boxes and sizes")
        return [f"warning: {text}"]

    def lines(self) -> list[str]:
        """What to know about the boxes, in words."""
        lines = [
            f"warning: {plural(count, 'box', 'boxes')} {WORDS[what][count > 1]}: in {', '.join(self.images[what])}"
            for what, count in sorted(self.names.items())
        ]
        if self.empty:
            lines.append(f"{plural(self.empty, 'image')} without boxes: all of the image is background")
        if self.emptied:
            lines.append(f"warning: {plural(self.emptied, 'image')} left without boxes, since none could be used")
        return lines


def usable(example: LabeledBoxes, form: str, width: int, height: int, counted: Counted) -> list[tuple[Corners, str]]:
    """The boxes of an image as clipped corners with their classes; those without area or outside are counted and left out."""
    kept: list[tuple[Corners, str]] = []
    name = example.file.name
    for box, label in zip(example.boxes, example.labels, strict=True):
        left, top, right, bottom = whole = corners(box, form, width, height)
        if right <= left or bottom <= top:
            counted.note(FLAT, name)
            continue
        counted.evidence.note(box, width, height)
        clipped = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            counted.note(OUTSIDE, name)
            continue
        if max(abs(one - other) for one, other in zip(whole, clipped, strict=True)) > 1e-3 * max(width, height):
            counted.note(CLIPPED, name)
        kept.append((clipped, label))
    counted.kept += len(kept)
    counted.empty += not example.boxes
    counted.emptied += bool(example.boxes) and not kept
    return kept


def write(rows: Iterable[Row], reading: BoxFormat, measure: ImageMeasure, target: Path) -> Statistics:
    """Write the prepared rows (`media_rows.schema` and `boxes`) and return their statistics.

    Raises:
        UserError: rows that do not fit their format, too many images that cannot be read, boxes that are not what the format
            of their numbers says, or too many without area.
    """
    counted = Counted()
    form = "xywh" if reading.box_format == "auto" else reading.box_format

    def more(example: LabeledBoxes, width: int, height: int) -> tuple[list[str], tuple[Any, ...]]:
        if example.size not in (None, (width, height)):
            why = " (an EXIF rotation is applied)" if example.size == (height, width) else ""
            stated = " x ".join(map(str, example.size or ()))
            counted.resized.append(f"{example.file.name} is {width} x {height} and not {stated} pixels{why}")
        kept = usable(example, form, width, height, counted)
        return [label for _, label in kept], ([number for box, _ in kept for number in box],)

    stats = media_rows.write(rows, reading, measure, target, schema(), more)
    stats.warnings += counted.check_sizes(reading.source, stats.rows_read)
    stats.warnings += counted.evidence.check(reading.source, reading.box_format, reading.fixed)
    left_out = sum(counted.names.get(what, 0) for what in (FLAT, OUTSIDE))
    total = counted.kept + left_out
    if left_out > MOST_UNUSABLE * total:
        what = FLAT if counted.names.get(FLAT, 0) >= counted.names.get(OUTSIDE, 0) else OUTSIDE
        cure = "Correct or remove them" if reading.fixed else f"Are their numbers {form}? Else set data.box_format"
        raise UserError(
            f"{reading.source}: {left_out:,} of {total:,} boxes have no area or lie outside of their image, such as in "
            f"{counted.images[what][0]}; at most {MOST_UNUSABLE:.0%} may be left out. {cure}"
        )
    if not total:
        raise UserError(f"{reading.source}: no image has a box; {EXPECTED}")
    stats.warnings += counted.lines()
    return stats
