"""Images with boxes in the layouts of other tools: a COCO JSON file, and the label files of YOLO."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hfstrat.data.box_format import STATED_SIZE
from hfstrat.data.image_files import IMAGE, ImageRef
from hfstrat.data.sources import SPLITS
from hfstrat.errors import UserError, first_line
from hfstrat.recipe.format import plural

COCO_KEYS = ("images", "annotations", "categories")
ROBOFLOW = "_annotations.coco.json"
YOLO_CONFIGS = ("data.yaml", "data.yml", "dataset.yaml")
YOLO_KEYS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
NAME_FILES = ("classes.txt", "labels.txt", "obj.names")
SHOWN = 3


@dataclass
class BoxLayout:
    """Images with boxes: `read` gives rows with `image` and `objects` (`bbox`, `categories`), whose numbers are `form`."""

    root: Path
    form: str
    read: Callable[[], Iterator[dict[str, Any]]]
    files: list[Path]  # of which the size and the time identify the rows
    count: int
    lines: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[dict[str, Any]]:
        return self.read()

    def identity(self) -> list[Any]:
        """What changes whenever an image or a label file does."""
        found: list[Any] = [str(self.root), self.form]
        for file in self.files:
            stat = file.stat() if file.exists() else None
            found.append((str(file), stat and stat.st_size, stat and stat.st_mtime_ns))
        return found


def find(source: str, key: str, splits: tuple[str, ...], images: str | None = None) -> BoxLayout | None:
    """The images and boxes of a COCO file or of YOLO label files; None where a source is neither.

    Args:
        splits: words for the split to read, of which the first that is present is.

    Raises:
        UserError: a file or a folder of these kinds that cannot be read.
    """
    path = Path(source).expanduser().absolute()
    if path.is_file() and path.suffix.lower() == ".json":
        return _coco(path, source, key)
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return _yolo_config(path, source, key, splits)
    if not path.is_dir():
        return None
    if config := next((path / name for name in YOLO_CONFIGS if (path / name).is_file()), None):
        return _yolo_config(config, source, key, splits)
    for folder in (path, *(path / name for split in splits for name in _named(path, split))):
        if (folder / ROBOFLOW).is_file():
            return _coco(folder / ROBOFLOW, source, key)
    found = _yolo_folders(path, splits)
    return _yolo(path, found, None, source, key) if found else None


def _named(folder: Path, split: str) -> list[str]:
    """The names of the folders in a folder that a split may have."""
    return [each.name for each in sorted(folder.iterdir()) if each.is_dir() and SPLITS.get(each.name.lower()) == split]


# COCO


def _coco(file: Path, source: str, key: str) -> BoxLayout | None:
    """The images of a COCO file; None for another JSON file."""
    if file.stat().st_size == 0:
        raise UserError(f"{key}: {source}: the file is empty")
    with file.open("rb") as stream:
        if not stream.read(200).lstrip().startswith(b"{"):
            return None  # a list of rows
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {source}: not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict) or not any(name in content for name in COCO_KEYS):
        return None
    if lacking := [name for name in COCO_KEYS if not isinstance(content.get(name), list)]:
        raise UserError(f"{key}: {source}: a COCO file without the list {lacking[0]}; expected {', '.join(COCO_KEYS)}")
    names = _coco_names(content["categories"], source, key)
    known, boxes, lines = _coco_boxes(content, names, source, key)
    sizes = {one["id"]: [one.get("width"), one.get("height")] for one in content["images"]}
    folder = _image_folder(file, list(known.values()), source, key)
    used = {label for labels in boxes.values() for _, label in labels}
    if unused := [name for name in names.values() if name not in used]:
        shown = ", ".join(unused[:SHOWN]) + (f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else "")
        lines.append(f"categories without a box are no classes here: {shown}")

    def rows() -> Iterator[dict[str, Any]]:
        for number, name in known.items():
            found = boxes.get(number, [])
            objects = {"bbox": [box for box, _ in found], "categories": [label for _, label in found]}
            objects[STATED_SIZE] = sizes[number]
            yield {"image": ImageRef(str(folder / name)), "objects": objects}

    return BoxLayout(file, "xywh", rows, [file, *(folder / name for name in known.values())], len(known), lines)


def _coco_names(categories: list[Any], source: str, key: str) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for one in categories:
        if not isinstance(one, dict) or "id" not in one or not isinstance(one.get("name"), str):
            raise UserError(f"{key}: {source}: a category is {str(one)[:80]}; expected an id and a name")
        names[one["id"]] = one["name"]
    if len(set(names.values())) < len(names):
        raise UserError(f"{key}: {source}: several categories have one name; rename them")
    return names


def _coco_boxes(
    content: dict[str, Any], names: dict[Any, str], source: str, key: str
) -> tuple[dict[Any, str], dict[Any, list[tuple[Any, str]]], list[str]]:
    """The file names of the images by id, their boxes with class names by image, and lines about those left out."""
    known: dict[Any, str] = {}
    for one in content["images"]:
        if not isinstance(one, dict) or "id" not in one or not isinstance(one.get("file_name"), str):
            raise UserError(f"{key}: {source}: an image is {str(one)[:80]}; expected an id and a file_name")
        if one["id"] in known:
            raise UserError(f"{key}: {source}: two images have the id {one['id']}")
        known[one["id"]] = one["file_name"]
    boxes: dict[Any, list[tuple[Any, str]]] = {}
    crowds = 0
    for place, one in enumerate(content["annotations"]):
        if not isinstance(one, dict) or "bbox" not in one:
            raise UserError(f"{key}: {source}: annotation {place + 1} has no bbox")
        if one.get("image_id") not in known:
            raise UserError(
                f"{key}: {source}: annotation {place + 1} is of image {one.get('image_id')}, which is not in images"
            )
        if one.get("category_id") not in names:
            raise UserError(
                f"{key}: {source}: annotation {place + 1} has category {one.get('category_id')}, which is not in categories"
            )
        if one.get("iscrowd"):
            crowds += 1
            continue
        boxes.setdefault(one["image_id"], []).append((one["bbox"], names[one["category_id"]]))
    return known, boxes, [f"{plural(crowds, 'box', 'boxes')} of crowds (iscrowd) left out"] if crowds else []


def _image_folder(file: Path, names: list[str], source: str, key: str) -> Path:
    """The folder from which the file names of a COCO file lead to images."""
    here, above = file.parent, file.parent.parent
    stem = file.stem.removeprefix("instances_")
    places = [here, here / "images", here / stem, above, above / "images", above / stem, above / "images" / stem]
    first = next(iter(names), None)
    if first is None:
        raise UserError(f"{key}: {source}: it has no images")
    found = next((folder for folder in places if (folder / first).is_file()), None)
    if found is None:
        raise UserError(
            f"{key}: {source}: its first image, {first}, is in none of {', '.join(map(str, dict.fromkeys(places)))}; move the "
            "images beside the file or into a folder images"
        )
    return found


# YOLO


def _yolo_config(file: Path, source: str, key: str, splits: tuple[str, ...]) -> BoxLayout:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file}: not valid YAML: {first_line(error)}") from None
    if not isinstance(content, dict) or not any(name in content for names in YOLO_KEYS.values() for name in names):
        raise UserError(f"{key}: {file}: expected the YAML file of YOLO, with train, val and names")
    base = file.parent
    if isinstance(content.get("path"), str):
        base = next((each for each in (file.parent / content["path"], Path(content["path"])) if each.is_dir()), file.parent)
    wanted = next((content[name] for split in splits for name in YOLO_KEYS.get(split, (split,)) if content.get(name)), None)
    if wanted is None:
        present = ", ".join(name for names in YOLO_KEYS.values() for name in names if content.get(name))
        raise UserError(f"{key}: {file}: it has {present}, and no {splits[0]}; name one by data.split or data.eval_split")
    images: list[Path] = []
    for entry in wanted if isinstance(wanted, list) else [wanted]:
        images += _yolo_images(base, str(entry), file, key)
    return _yolo(file, images, _yolo_names(content.get("names"), file, key), source, key)


def _yolo_images(base: Path, entry: str, file: Path, key: str) -> list[Path]:
    tried = [base / entry, file.parent / entry, file.parent / entry.removeprefix("../")]  # Roboflow writes ../train/images
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        raise UserError(f"{key}: {file}: {entry} is neither in {base} nor in {file.parent}")
    if found.is_file():
        lines = [line.strip() for line in found.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [path if (path := Path(line)).is_absolute() else (found.parent / line) for line in lines]
    return sorted(path for path in found.rglob("*") if path.is_file() and IMAGE.fits(path.name))


def _yolo_names(names: Any, file: Path, key: str) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise UserError(f"{key}: {file}: names is {str(names)[:80]}; expected a list, or a mapping from 0, 1, ... to names")
    return [str(name) for name in names]


def _yolo_folders(folder: Path, splits: tuple[str, ...]) -> list[Path]:
    """The images of a folder with `images` and `labels` in it, for a split: images/train, or train/images."""
    for split in splits:
        for place in (
            *(folder / "images" / name for name in (_named(folder / "images", split) if (folder / "images").is_dir() else [])),
            *(folder / name / "images" for name in _named(folder, split)),
            folder / "images",
        ):
            if place.is_dir() and _labels_of(place).is_dir():
                return sorted(path for path in place.rglob("*") if path.is_file() and IMAGE.fits(path.name))
    return []


def _labels_of(image: Path) -> Path:
    """The path of an image with `labels` in the place of the last `images`."""
    parts = list(image.parts)
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts)


def _yolo(root: Path, images: list[Path], names: list[str] | None, source: str, key: str) -> BoxLayout:
    if not images:
        raise UserError(f"{key}: {source}: it leads to no images")
    labels = [_labels_of(image).with_suffix(".txt") for image in images]
    if not any(file.is_file() for file in labels):
        raise UserError(f"{key}: {source}: no image has a label file; looked for {labels[0]} and others")
    folder, files = root if root.is_dir() else root.parent, [root, *images, *labels]
    if names is None and (file := next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)):
        files.append(file)
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def rows() -> Iterator[dict[str, Any]]:
        for image, file in zip(images, labels, strict=True):
            yield {"image": ImageRef(str(image)), "objects": _read_labels(file, names) if file.is_file() else {}}

    missing = sum(not file.is_file() for file in labels)
    lines = [f"{plural(missing, 'image')} without a label file, which means no boxes"] if missing else []
    return BoxLayout(root, "cxcywh", rows, files, len(images), lines)


def _read_labels(file: Path, names: list[str] | None) -> dict[str, Any]:
    """The boxes of a label file: lines of a class and four shares, or of a class and a polygon, of which the box is taken."""
    found: dict[str, Any] = {"bbox": [], "categories": []}
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file}: it is no text; expected lines of a class number and four numbers") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) < 5 or values[0] != int(values[0]) or values[0] < 0 or not all(map(math.isfinite, values)):
            raise UserError(f"{file}:{number}: {line[:60]!r}: expected a class number and center, width and height of a box")
        if len(values) > 5 and len(values) % 2 == 0:
            raise UserError(f"{file}:{number}: {len(values) - 1} numbers are neither a box (4) nor the corners of a polygon")
        box = values[1:] if len(values) == 5 else _around(values[1:])
        if any(not -0.01 <= each <= 1.01 for each in box):
            raise UserError(f"{file}:{number}: {line[:60]!r}: expected shares of the image, from 0 to 1, and no pixels")
        kind = int(values[0])
        if names is not None and kind >= len(names):
            raise UserError(f"{file}:{number}: class {kind}, but names has {len(names)}: 0 to {len(names) - 1}")
        found["bbox"].append(box)
        found["categories"].append(names[kind] if names is not None else kind)
    return found


def _around(polygon: list[float]) -> list[float]:
    """Center, width and height of the box around a polygon."""
    across, down = polygon[::2], polygon[1::2]
    left, right, top, bottom = min(across), max(across), min(down), max(down)
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
