"""The data of an object detection: every image decoded once, its boxes clipped and counted, classes collected from training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.box_format import FORMAT, BoxFormat
from hfstrat.data.box_rows import BoxSource, write
from hfstrat.data.classes import check_seen, collect_labels, encode_labels, find_conflicts, labeled_selection
from hfstrat.data.image_classes import ImageClasses, ImageEncoder
from hfstrat.data.media_classes import FEW, SHOWN
from hfstrat.data.prepare import PreparedData, Table, divide, evaluation_fields
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import Selection
from hfstrat.data.stats import Statistics
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    from datasets import Dataset

WRITE_VERSION = 2  # of how images and boxes become rows: increase it where that changes
SMALL, LARGE = 32**2, 96**2  # pixels of the area of a box: between them it is medium, as in COCO


class BoxEncoder(ImageEncoder):
    """Images with boxes; the classes are those of the training boxes, or of the model."""

    reading, opens = BoxFormat, BoxSource

    def options(self, source: DataSource) -> dict[str, Any]:
        data = source.data
        names: list[Any] = data.class_names or list(map(list, source.class_names.values()))
        form = {"box_format": data.box_format, "classes": names}
        return {"task": FORMAT, **form, **self.inputs, "write_version": WRITE_VERSION}

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write(*source.read(), self.measure, target)

    def with_labels(self, table: Table, key: str) -> Selection:
        self.many = True  # an image has any number of boxes; one class is enough
        if not self.names:
            self.names = self._names_of(table)
        return super().with_labels(table, key) if self.of_model else self._encoded(table, key)

    def _names_of(self, table: Table) -> list[str]:
        """The classes that occur in training, in the order of `data.class_names` or of the source."""
        orders = [source.data.class_names for source in table.sources if source.data.class_names]
        found = collect_labels(table)
        if orders:
            known = {name: place for place, name in enumerate(orders[0])}
            found = sorted(found, key=lambda name: (known.get(name, len(known)), name))
        return found

    def _encoded(self, table: Table, key: str) -> Selection:
        check_seen(table.rows.table, self.names, table.statistics, "training")
        return labeled_selection(table, encode_labels(table.rows.table, self.names, True, key))

    def strata(self, rows: Selection) -> list[str] | None:  # type: ignore[override]
        return None


@dataclass
class Boxes(ImageClasses):
    """Rows as of `ImageClasses`, with `label` (a list of class ids) and `boxes` (four numbers for each, corners in pixels).

    `counts` are training boxes by class. `most` is the largest number of boxes of an image.
    """

    most: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # of the training boxes

    def lines(self) -> list[str]:
        """The statistics as text, with the classes, the sizes of boxes and images without any."""
        names = zip(self.label_names, self.counts.tolist(), strict=True)
        ranked = sorted(names, key=lambda pair: -pair[1])
        listed = ", ".join(f"{count:,} {name}" for name, count in ranked[:SHOWN]) + (", ..." if len(ranked) > SHOWN else "")
        facts, kinds = self.facts, len(self.label_names)
        sizes = f"{facts['small']:.0%} small, {facts['medium']:.0%} medium, {facts['large']:.0%} large (as in COCO)"
        lines = [
            *PreparedData.lines(self),
            f"{'images':<9} {self.sizes()}",
            f"{'boxes':<9} {self.counts.sum():,} of {kinds:,} {'class' if kinds == 1 else 'classes'} in training: {listed}; at "
            f"most {self.most:,} in an image",
            f"{'boxes':<9} median {facts['width']:.0f} x {facts['height']:.0f} pixels; {sizes}; smallest side for the model "
            f"{facts['least']:.1f} pixels",
        ]
        if few := [name for name, count in zip(self.label_names, self.counts, strict=True) if count < FEW]:
            named = ", ".join(few[:SHOWN]) + (f" and {len(few) - SHOWN} more" if len(few) > SHOWN else "")
            lines.append(f"{'boxes':<9} warning: fewer than {FEW} training boxes of {named}; its scores will be mostly chance")
        return lines

    def report(self) -> dict[str, Any]:
        found = super().report()
        return {name: value for name, value in found.items() if name != "labels"} | {
            "boxes": {"training_boxes": dict(zip(self.label_names, map(int, self.counts), strict=True)), **self.facts}
        }


def facts_of(rows: Dataset, width: int, height: int) -> dict[str, Any]:
    """Sizes of the boxes of rows.

    Args:
        width, height: in pixels of what the model is given.
    """
    listed = rows["boxes"][:]
    counts = np.fromiter((len(one) // 4 for one in listed), dtype=np.int64, count=len(listed))
    flat = np.fromiter(itertools.chain.from_iterable(listed), dtype=np.float64).reshape(-1, 4)
    if not len(flat):
        return {"small": 0.0, "medium": 0.0, "large": 0.0, "width": 0.0, "height": 0.0, "least": 0.0, "images_without_boxes": 0}
    sides = flat[:, 2:] - flat[:, :2]
    scale = np.stack([width / np.asarray(rows["width"][:]), height / np.asarray(rows["height"][:])], axis=1)
    areas, seen = sides.prod(1), sides * np.repeat(scale, counts, axis=0)
    small, large = areas < SMALL, areas >= LARGE
    shares = {"small": small.mean(), "medium": (~small & ~large).mean(), "large": large.mean()}
    middle = np.median(sides, axis=0)
    return {
        **{name: float(value) for name, value in shares.items()},
        "width": float(middle[0]),
        "height": float(middle[1]),
        "least": float(seen.min()),
        "images_without_boxes": int((counts == 0).sum()),
    }


def _most(*parts: Any) -> int:
    return max((len(labels) for rows in parts for labels in rows["label"][:]), default=0)


def prepare(
    data: Data,
    processor: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Boxes:
    """The data of an object detection.

    Raises:
        UserError: data that cannot be read, boxes that do not fit their images, or an evaluation class without training boxes.
    """
    encoder = BoxEncoder(processor)
    parts = divide(encoder, data, seed, max_eval_rows, held_out)
    fields, counts = parts.fields(data, seed, samples), encoder.count(parts.train.dataset())
    if not counts.sum():
        raise UserError("data.train: no training image has a box; expected at least one")
    conflicts = find_conflicts(parts.train, encoder.shown)
    fields["duplicates"] |= {name.replace("text", "image"): value for name, value in conflicts.items()}
    return _boxes(fields, encoder, counts)


def prepare_eval(data: Data, processor: Any, names: list[str], samples: int = 0, max_rows: int | None = None) -> Boxes:
    """All rows of `data.train` as evaluation rows, by the classes of a detector. Raises UserError as `prepare` does."""
    encoder = BoxEncoder(processor, names, True)
    fields = evaluation_fields(encoder, data, samples, max_rows)
    return _boxes(fields, encoder, encoder.count(fields["eval"]))


def _boxes(fields: dict[str, Any], encoder: BoxEncoder, counts: np.ndarray) -> Boxes:
    renderer = encoder.renderer
    facts = facts_of(fields["train"], renderer.width, renderer.height)
    most = _most(fields["train"], fields["eval"])
    return Boxes(**fields, label_names=tuple(encoder.names), counts=counts, most=most, facts=facts)
