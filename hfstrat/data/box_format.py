"""Boxes of rows: in which columns and numbers they come, and how they become corners in pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from hfstrat.data.columns import Reading, columns_of, propose, rename
from hfstrat.data.image_files import IMAGE
from hfstrat.data.labeled import OF_TASKS
from hfstrat.data.labels import STRIPPED, label_of
from hfstrat.data.media_files import MediaRef
from hfstrat.data.media_rows import file_of
from hfstrat.data.values import BadRow, is_missing, looks_like_list, parse_json, parse_list, shown
from hfstrat.errors import UserError

FORMAT = "object-detection"
BOXES = ("bbox", "bboxes", "boxes")  # names of the column with boxes, within `objects` or beside the image
CATEGORIES = ("categories", "category", "category_id", "label", "labels", "class", "classes", "class_labels")
OUR_COLUMNS = sorted({*IMAGE.names, "objects", *BOXES, *CATEGORIES})
WORDS = {
    "xywh": "xywh (left, top, width, height in pixels)",
    "xyxy": "xyxy (left, top, right, bottom in pixels)",
    "cxcywh": "cxcywh (center, width, height as shares of the image)",
}
OVER = 1.0  # pixels beyond the border that are rounding
MOST_MISFITS, LEAST_FITS = 0.1, 0.99  # shares of the boxes by which a form of numbers is doubted, or believed
EXPECTED = (
    "expected a column objects with bbox and categories (or bbox and categories beside the image), a COCO JSON file, or YOLO "
    "label files"
)

CROWD = "iscrowd"  # in `objects`: 1 for a box around many objects
CROWDS = "have boxes of crowds (iscrowd), which are left out"
STATED_SIZE = "_size"  # in `objects` of a COCO file: width and height of the image that the boxes are of

Corners = tuple[float, float, float, float]


class LabeledBoxes(NamedTuple):
    """A row: where its image is, its boxes as the data have them, and the name of the class of each box.

    `size` are width and height of the image that the boxes are of, where the data have them.
    """

    file: MediaRef
    boxes: list[tuple[float, ...]]
    labels: list[str]
    changes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None

    @property
    def prompt(self) -> MediaRef:
        return self.file

    @property
    def answer(self) -> str:
        counts = {name: self.labels.count(name) for name in dict.fromkeys(self.labels)}
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "(no boxes)"


@dataclass
class BoxFormat(Reading):
    """How the rows of one source are read.

    `image`, `boxes` and `categories` are our names of the columns, or of the keys in `objects` if `nested`. `box_format` is
    that of the recipe, `fixed` whether the source itself defines it, `class_names` are the names of class numbers.
    """

    image: str = "image"
    boxes: str = "bbox"
    categories: str = "categories"
    nested: bool = True
    class_names: list[str] | None = None
    box_format: str = field(default="auto", kw_only=True)
    fixed: bool = field(default=False, kw_only=True)
    many: ClassVar[bool] = True  # labels of a row
    format: ClassVar[str] = FORMAT

    @classmethod
    def detect(
        cls,
        head: list[dict[str, Any]],
        source: str,
        wanted: str,
        mapping: dict[str, str],
        features: Mapping[str, list[str]] | None = None,
    ) -> BoxFormat:
        """The columns of a source, from its first rows.

        Args:
            features: names of class numbers, by column (those within `objects` by their key).

        Raises:
            UserError: columns that are no images with boxes.
        """
        if wanted not in ("auto", FORMAT):
            theirs = wanted if wanted in OF_TASKS else "causal-lm"
            raise UserError(f"data.format: {wanted} is for task: {theirs}; expected {FORMAT} or auto")
        renamed = rename(columns_of(head), mapping, source)
        given = list(renamed.values())
        image = next((name for name in IMAGE.names if name in given), None)
        nested = "objects" in given
        keys = _keys_of(head, next(theirs for theirs, ours in renamed.items() if ours == "objects")) if nested else given
        boxes = next((name for name in BOXES if name in keys), None)
        categories = next((name for name in CATEGORIES if name in keys), None)
        if nested and image and not keys:  # no first row has a box
            boxes, categories = BOXES[0], CATEGORIES[0]
        if image is None or boxes is None or categories is None:
            raise UserError(_misfit(source, given, keys if nested else None, image, boxes))
        reads = frozenset({image, "objects"} if nested else {image, boxes, categories})
        names = (features or {}).get(categories)
        return cls(source, renamed, image, boxes, categories, nested, names, reads=reads)

    @property
    def kind(self) -> str:
        """The columns as text."""
        where = f"objects.{self.boxes} + objects.{self.categories}" if self.nested else f"{self.boxes} + {self.categories}"
        return f"{self.image} + {where}"

    def example(self, row: Mapping[str, Any]) -> LabeledBoxes:
        """Raises BadRow where the row does not fit."""
        named = self.values(row)
        objects = _objects(named.get("objects"), self.boxes, self.categories) if self.nested else named
        boxes = _list_of(objects.get(self.boxes), self.boxes)
        given = _list_of(objects.get(self.categories), self.categories)
        if len(boxes) != len(given):
            raise BadRow(f"it has {len(boxes)} boxes ('{self.boxes}') and {len(given)} classes ('{self.categories}')")
        crowds = _list_of(objects.get(CROWD), CROWD) if self.nested else []
        if crowds and len(crowds) != len(boxes):
            raise BadRow(f"it has {len(boxes)} boxes ('{self.boxes}') and {len(crowds)} values of '{CROWD}'")
        if left_out := any(crowds):
            kept = [place for place, crowd in enumerate(crowds) if not crowd]
            boxes, given = [boxes[place] for place in kept], [given[place] for place in kept]
        labels = [self._label(value) for value in given]
        changes: tuple[str, ...] = (STRIPPED,) if any(isinstance(e, str) and e != e.strip() for e in given) else ()
        changes += (CROWDS,) if left_out else ()
        file, size = file_of(named.get(self.image), self.image, IMAGE), objects.get(STATED_SIZE) if self.nested else None
        known = tuple(size) if size and all(isinstance(side, int) and side > 0 for side in size) else None
        return LabeledBoxes(file, [four_numbers(box, self.boxes) for box in boxes], labels, changes, known)  # type: ignore[arg-type]

    def _label(self, value: Any) -> str:
        names = self.class_names
        if names is not None and isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < len(names):
            raise BadRow(
                f"'{self.categories}' has the class {value}, but there are {len(names)} class names, for 0 to {len(names) - 1}"
            )
        return label_of(value, self.categories, names)


def _misfit(source: str, given: list[str], keys: list[str] | None, image: str | None, boxes: str | None) -> str:
    """Why columns are no images with boxes, in a sentence."""
    found = ", ".join(given) or "no columns"
    if image is None:
        hint = propose(given, {IMAGE.column: IMAGE.others})
        return f"{source}: task {FORMAT} needs an image and its boxes; the data have {found}. {hint}"
    if keys is not None:
        lacks = "bbox" if boxes is None else "categories"
        return f"{source}: 'objects' has {', '.join(keys)} and no {lacks}; {EXPECTED}"
    what = "boxes" if boxes is None else "classes of the boxes"
    return f"{source}: the rows have {found} and no {what}; {EXPECTED}"


def _keys_of(head: list[dict[str, Any]], column: str) -> list[str]:
    """The keys of the objects in the first rows."""
    found: dict[str, None] = {}
    for row in head:
        value = row.get(column)
        try:
            value = parse_json(value) if isinstance(value, str) and value.strip() else value
        except (ValueError, RecursionError):
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, dict):
                found |= dict.fromkeys(map(str, one))
    return list(found)


def _objects(value: Any, boxes: str, categories: str) -> dict[str, Any]:
    """The lists of boxes and classes of `objects`: a dict of lists, or a list of dicts."""
    if is_missing(value):
        return {boxes: [], categories: []}
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"'objects' is text that is no JSON: {error}") from None
    if isinstance(value, list | tuple):
        if odd := next((one for one in value if not isinstance(one, dict)), None):
            raise BadRow(f"'objects' contains {shown(odd)}; expected objects with {boxes} and {categories}")
        if lacking := next((key for one in value for key in (boxes, categories) if is_missing(one.get(key))), None):
            raise BadRow(f"an object has no {lacking}; expected {boxes} and {categories} of each")
        lists = {boxes: [one[boxes] for one in value], categories: [one[categories] for one in value]}
        return lists | ({CROWD: [one.get(CROWD) for one in value]} if any(one.get(CROWD) for one in value) else {})
    if not isinstance(value, dict):
        raise BadRow(f"'objects' is {shown(value)}; expected lists of {boxes} and {categories}")
    return value


def _list_of(value: Any, column: str) -> list[Any]:
    if is_missing(value):
        return []
    if isinstance(value, str) and looks_like_list(value):
        return parse_list(value, column)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise BadRow(f"'{column}' is {shown(value)}; expected a list with an entry for each box")
    return list(value)


def four_numbers(box: Any, column: str) -> tuple[float, ...]:
    """A box as numbers. Raises BadRow: it is not four finite numbers."""
    box = box.tolist() if hasattr(box, "tolist") else box
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise BadRow(f"'{column}' contains {shown(box)}; expected four numbers")
    if any(isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each) for each in box):
        raise BadRow(f"'{column}' contains {shown(list(box))}; expected four finite numbers")
    return tuple(map(float, box))


def corners(box: tuple[float, ...], form: str, width: int, height: int) -> Corners:
    """Left, top, right and bottom in pixels, as the numbers say: not clipped, perhaps without area.

    Args:
        form: xywh, xyxy or cxcywh.
    """
    a, b, c, d = box
    if form == "xyxy":
        return a, b, c, d
    if form == "xywh":
        return a, b, a + c, b + d
    return (a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height


def fits(box: Corners, width: int, height: int) -> bool:
    """Whether corners are in order, and within the image but for rounding."""
    left, top, right, bottom = box
    return -OVER <= left < right <= width + OVER and -OVER <= top < bottom <= height + OVER


@dataclass
class Evidence:
    """How many boxes fit which form of their numbers."""

    boxes: int = 0
    fit: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WORDS, 0))
    shares: int = 0  # boxes whose numbers are all at most 1

    def note(self, box: tuple[float, ...], width: int, height: int) -> None:
        self.boxes += 1
        self.shares += max(map(abs, box)) <= 1
        for form in WORDS:
            self.fit[form] += fits(corners(box, form, width, height), width, height)

    def _believes(self, form: str) -> bool:
        return self.fit[form] >= LEAST_FITS * self.boxes

    def check(self, source: str, wanted: str, fixed: bool) -> list[str]:
        """Remarks about the form of the numbers.

        Args:
            wanted: form of the recipe, or of the source itself (`fixed`).

        Raises:
            UserError: the boxes do not fit this form.
        """
        if not self.boxes or fixed:
            return []
        form = "xywh" if wanted == "auto" else wanted
        if form != "cxcywh" and self.shares == self.boxes:
            raise UserError(
                f"{source}: no number of a box is above 1, so these are shares of the image and no pixels; set "
                "data.box_format: cxcywh if they are center, width and height, as in YOLO, else multiply them by the size"
            )
        if self.boxes - self.fit[form] > MOST_MISFITS * self.boxes:
            others = [each for each in WORDS if each != form and self._believes(each)]
            cure = f"set data.box_format: {others[0]}, which they fit" if others else "no other form fits them either"
            raise UserError(
                f"{source}: {self.boxes - self.fit[form]:,} of {self.boxes:,} boxes do not fit their image when read as "
                f"{WORDS[form]}; {cure}"
            )
        if wanted == "auto" and self._believes("xyxy"):
            return [
                f"warning: boxes are read as {WORDS['xywh']}, the convention of datasets; {self.fit['xyxy']:,} of "
                f"{self.boxes:,} would also fit as corners: set data.box_format: xywh to confirm, or xyxy"
            ]
        odd = self.boxes - self.fit["xyxy"]
        sure = f"; {odd:,} of {self.boxes:,} cannot be corners" if wanted == "auto" else ""
        return [f"boxes are read as {WORDS[form]}{sure}"]
