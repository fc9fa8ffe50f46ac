"""Images with boxes: the layouts that are read, forms of numbers, random changes, and what bad data are answered."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.detectors import CLASSES, SIDE, folder_of_boxes, processor_of, scene

from hfstrat.data.box_batches import BoxCollator, moved
from hfstrat.data.box_classes import Boxes, prepare
from hfstrat.data.box_format import Evidence
from hfstrat.data.image_batches import Change, ImageProcessor
from hfstrat.data.prepare import PreparedData
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.images import Augmentation
from hfstrat.recipe.load import load_recipe

COUNT = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_boxes(tmp_path_factory.mktemp("boxes") / "data", COUNT)


def processor(augmentation: Augmentation | None = None) -> ImageProcessor:
    return ImageProcessor(processor_of("yolos"), 8, augmentation, seed=3)


def read(train: Path | str, **more: Any) -> Boxes:
    return prepare(Data.model_validate({"train": str(train), "eval_size": 3, **more}), processor(), seed=0)


def contents(data: Boxes) -> list[tuple[int, list[float], list[str]]]:
    """Of all rows: the hash of the image, the corners of its boxes and their classes."""
    rows = [*data.train, *data.eval]
    names = data.label_names
    found = [(row["content"], [round(x, 3) for x in row["boxes"]], [names[label] for label in row["label"]]) for row in rows]
    return sorted(found)


def write_coco(root: Path, inner: str = "images") -> Path:
    """The scenes as a COCO file, with the images in a folder beside it."""
    (root / inner).mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 10 + 5 * label, "name": name} for label, name in enumerate(CLASSES)]
    for number in range(COUNT):
        image, boxes, labels = scene(number)
        image.save(root / inner / f"{number:03}.png")
        content["images"].append({"id": number, "file_name": f"{number:03}.png", "width": 40, "height": 30})
        for box, label in zip(boxes, labels, strict=True):
            place = len(content["annotations"])
            content["annotations"].append({"id": place, "image_id": number, "category_id": 10 + 5 * label, "bbox": box})
    file = root / "annotations.json"
    file.write_text(json.dumps(content))
    return file


def write_yolo(root: Path, config: bool = True) -> Path:
    """The scenes as label files of YOLO, with data.yaml."""
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    for number in range(COUNT):
        image, boxes, labels = scene(number)
        image.save(root / "images" / "train" / f"{number:03}.png")
        lines = [
            f"{label} {(left + wide / 2) / 40:.8f} {(top + high / 2) / 30:.8f} {wide / 40:.8f} {high / 30:.8f}"
            for (left, top, wide, high), label in zip(boxes, labels, strict=True)
        ]
        if lines:
            (root / "labels" / "train" / f"{number:03}.txt").write_text("\n".join(lines))
    if config:
        (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [blue, green, red]\n")
    else:
        (root / "classes.txt").write_text("blue\ngreen\nred\n")
    return root


def write_parquet(root: Path) -> Path:
    """The scenes as `datasets` writes them: bytes of images, and classes as numbers with names."""
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    root.mkdir(parents=True, exist_ok=True)
    rows = [scene(number) for number in range(COUNT)]
    folder = folder_of_boxes(root / "images", COUNT)
    kinds = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=list(CLASSES)))}
    data = {
        "image": [{"path": f"{n:03}.png", "bytes": (folder / f"{n:03}.png").read_bytes()} for n in range(COUNT)],
        "objects": [{"bbox": boxes, "category": labels} for _, boxes, labels in rows],
    }
    Dataset.from_dict(data, Features({"image": Image(), "objects": kinds})).to_parquet(root / "rows.parquet")
    return root / "rows.parquet"


def write_zip(root: Path) -> Path:
    folder = folder_of_boxes(root / "plain", COUNT)
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return root / "data.zip"


def write_corners(root: Path) -> Path:
    """A table with paths, and corners in columns beside them."""
    folder_of_boxes(root, COUNT)
    (root / "metadata.jsonl").unlink()
    lines = []
    for number in range(COUNT):
        _, boxes, labels = scene(number)
        corners = [[left, top, left + wide, top + high] for left, top, wide, high in boxes]
        lines.append(json.dumps({"image": f"{number:03}.png", "boxes": corners, "labels": [CLASSES[x] for x in labels]}))
    (root / "rows.jsonl").write_text("\n".join(lines))
    return root / "rows.jsonl"


LAYOUTS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "COCO": (write_coco, {}),
    "COCO, images in the folder above": (lambda root: _moved_up(write_coco(root)), {}),
    "YOLO": (write_yolo, {}),
    "YOLO, by its YAML file": (lambda root: write_yolo(root) / "data.yaml", {}),
    "YOLO, without one": (lambda root: write_yolo(root, config=False), {}),
    "Parquet": (write_parquet, {}),
    "zip": (write_zip, {}),
    "corners": (write_corners, {"box_format": "xyxy"}),
}


def _moved_up(file: Path) -> Path:
    inner = file.parent / "annotations"
    inner.mkdir()
    return file.rename(inner / "instances_train.json")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(layout: str, images: Path, tmp_path: Path) -> None:
    make, more = LAYOUTS[layout]
    other = read(make(tmp_path / "other"), **more)
    assert contents(other) == contents(read(images))
    assert other.label_names == CLASSES
    assert other.counts.sum() > 0


def test_statistics_count_every_box(tmp_path: Path) -> None:
    """Clipped, flat and outer boxes, and images without boxes."""
    folder = folder_of_boxes(tmp_path / "data", 30)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["objects"]["bbox"][0] = [30, 20, 15, 15]
    rows[2]["objects"]["bbox"][0] = [10, 10, 0, 5]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(folder)
    text = "\n".join(data.lines())
    assert "warning: 1 box reaches over the border of its image and is clipped: in " in text
    assert "warning: 1 box has no area and is left out: in " in text
    assert f"{folder}/002.png" in text
    assert "5 images without boxes" in text  # 0, 7, 14, 21, 28
    kept = sum(len(row["label"]) for row in [*data.train, *data.eval])
    assert kept == sum(len(row["objects"]["bbox"]) for row in rows) - 1
    clipped = next(row["boxes"] for row in [*data.train, *data.eval] if row["path"].endswith("001.png"))
    assert clipped[:4] == [30, 20, 40, 30]


def test_images_of_training_in_the_evaluation_are_counted(images: Path) -> None:
    assert f"overlap   {COUNT}" in "\n".join(read(images, eval=str(images)).lines()).replace("warning: ", "")


def test_class_numbers_are_named(tmp_path: Path) -> None:
    folder = folder_of_boxes(tmp_path / "data", COUNT)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["objects"]["categories"] = [CLASSES.index(name) for name in row["objects"]["categories"]]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(folder).label_names == ("0", "1", "2")
    assert read(folder, class_names=["red cell", "green cell", "a cell"]).label_names == ("red cell", "green cell", "a cell")


@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_the_changes_of_their_image(seed: int) -> None:
    """The bright pixels of a changed image lie in its changed box."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (80, 60))
    ImageDraw.Draw(image).rectangle((30, 20, 49, 39), fill=(255, 255, 255))
    change = Change.drawn(image.size, Augmentation(0.4, True, 0.0), np.random.default_rng(seed))
    shares = np.array([[30 / 80, 20 / 60, 50 / 80, 40 / 60]])
    boxes, labels = moved(shares, np.array([4]), change, image.size)
    pixels = np.asarray(change.of(image, (200, 200)))[:, :, 0] > 128
    if not len(boxes):
        assert pixels.mean() < 0.2
        return
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 200
    assert labels.tolist() == [4]
    assert np.allclose(boxes[0], seen, atol=0.02)


def test_a_batch_depends_on_seed_epoch_and_row_alone(images: Path) -> None:
    import torch

    data = read(images)
    collate = BoxCollator(processor(Augmentation(0.4, True, 0.3)), data.most)
    rows = [data.train[place] | {"epoch": epoch} for place in (0, 1) for epoch in (0, 1)]
    together, alone = collate(rows), [collate([row]) for row in reversed(rows)][::-1]
    for name, tensor in together.items():
        assert torch.equal(tensor, torch.cat([one[name] for one in alone])), name
    assert not torch.equal(together["pixel_values"][0], together["pixel_values"][1])
    plain = collate([data.train[0]])
    assert plain["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert (plain["class_labels"] >= 0).sum() == len(data.train[0]["label"])


def test_corners_that_could_be_either_are_pointed_out() -> None:
    """Boxes that fit both forms are read by the convention, and a warning says so; those that fit one are not guessed."""
    both, corners = Evidence(), Evidence()
    for box in ((1.0, 1.0, 8.0, 9.0), (0.0, 2.0, 10.0, 12.0)):
        both.note(box, 40, 30)
    for box in ((20.0, 15.0, 35.0, 28.0), (10.0, 12.0, 38.0, 29.0)):
        corners.note(box, 40, 30)
    assert "would also fit as corners: set data.box_format: xywh to confirm, or xyxy" in both.check("x", "auto", False)[0]
    assert both.check("x", "xywh", False) == ["boxes are read as xywh (left, top, width, height in pixels)"]
    with pytest.raises(UserError, match=r"2 of 2 boxes do not fit .*read as xywh .*set data.box_format: xyxy, which they fit"):
        corners.check("x", "auto", False)
    assert corners.check("x", "xyxy", False) == ["boxes are read as xyxy (left, top, right, bottom in pixels)"]


Edit = Callable[[list[dict[str, Any]]], None]


def _objects(value: Any) -> Edit:
    def edit(rows: list[dict[str, Any]]) -> None:
        rows[3]["objects"] = value

    return edit


def _all(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            change(row)

    return edit


def _one_box(box: Any) -> Edit:
    return _objects({"bbox": [box], "categories": ["red"]})


ROWS: dict[str, tuple[Edit, str]] = {
    "three numbers": (_one_box([1, 2, 3]), "row 4: 'bbox' contains .*expected four numbers"),
    "text in a box": (_one_box([1, 2, 3, "x"]), "row 4: 'bbox' contains .*expected four finite numbers"),
    "NaN": (_one_box([1, 2, 3, float("nan")]), "expected four finite numbers"),
    "null in a box": (_one_box([1, 2, None, 4]), "expected four finite numbers"),
    "a truth value": (_one_box([True, 2, 3, 4]), "expected four finite numbers"),
    "a box that is a number": (_one_box(7), "expected four numbers"),
    "more boxes than classes": (
        _objects({"bbox": [[1, 2, 3, 4]], "categories": []}),
        r"row 4: it has 1 boxes \('bbox'\) and 0 classes",
    ),
    "objects are text": (_objects("{"), "row 4: 'objects' is text that is no JSON"),
    "objects are a number": (_objects(5), "row 4: 'objects' is 5; expected lists of bbox and categories"),
    "a list with other things": (_objects([3]), "'objects' contains 3; expected objects with bbox and categories"),
    "an object without a class": (_objects([{"bbox": [1, 2, 3, 4]}]), "an object has no categories"),
    "boxes are no list": (_objects({"bbox": 3, "categories": []}), "'bbox' is 3; expected a list"),
    "a class is null": (_objects({"bbox": [[1, 2, 3, 4]], "categories": [None]}), "'categories' is null"),
    "a class is a fraction": (_objects({"bbox": [[1, 2, 3, 4]], "categories": [1.5]}), "'categories' is 1.5"),
    "no objects": (_all(lambda row: row.pop("objects")), "and no boxes; expected a column objects"),
    "no boxes in objects": (_all(lambda row: row["objects"].pop("bbox")), "'objects' has categories and no bbox"),
    "no classes in objects": (_all(lambda row: row["objects"].pop("categories")), "'objects' has bbox and no categories"),
    "no file name": (_all(lambda row: row.pop("file_name")), "row 1: it has no file_name"),
    "all boxes flat": (
        _all(lambda row: row["objects"].update(bbox=[[1, 1, 0, 0] for _ in row["objects"]["bbox"]])),
        "boxes have no area or lie outside of their image",
    ),
    "all boxes outside": (
        _all(lambda row: row["objects"].update(bbox=[[100, 100, 5, 5] for _ in row["objects"]["bbox"]])),
        "do not fit their image when read as xywh",
    ),
    "shares of the image": (
        _all(lambda row: row["objects"].update(bbox=[[0.2, 0.2, 0.3, 0.3] for _ in row["objects"]["bbox"]])),
        "no number of a box is above 1.*set data.box_format: cxcywh",
    ),
    "no box at all": (_all(lambda row: row.update(objects={"bbox": [], "categories": []})), "no image has a box"),
    "missing images": (_all(lambda row: row.update(file_name="nowhere.png")), "cannot be read, at most 5% may be left out"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_answered(case: str, tmp_path: Path) -> None:
    folder = folder_of_boxes(tmp_path / "data", COUNT)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    edit, expected = ROWS[case]
    edit(rows)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=expected) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def _coco(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        file = write_coco(root)
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return file

    return make


def _label(line: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write_yolo(root)
        (root / "labels" / "train" / "001.txt").write_text(line)
        return root

    return make


def _written(name: str, text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        return root / name

    return make


def _config(text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (write_yolo(root) / "data.yaml").write_text(text)
        return root

    return make


def _without_metadata(root: Path) -> Path:
    folder_of_boxes(root, COUNT)
    (root / "metadata.jsonl").unlink()
    return root


SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "COCO: not JSON": (_written("a.json", "{images"), "not valid JSON"),
    "COCO: empty": (_written("a.json", ""), "the file is empty"),
    "COCO: no categories": (_coco(lambda c: c.pop("categories")), "a COCO file without the list categories"),
    "COCO: no images": (_coco(lambda c: c.update(images=[], annotations=[])), "it has no images"),
    "COCO: unknown image": (_coco(lambda c: c["annotations"][0].update(image_id=99)), "is of image 99, which is not in images"),
    "COCO: unknown class": (_coco(lambda c: c["annotations"][0].update(category_id=7)), "has category 7, which is not in"),
    "COCO: no bbox": (_coco(lambda c: c["annotations"][2].pop("bbox")), "annotation 3 has no bbox"),
    "COCO: same ids": (_coco(lambda c: c["images"][1].update(id=0)), "two images have the id 0"),
    "COCO: same names": (_coco(lambda c: c["categories"][1].update(name="blue")), "several categories have one name"),
    "COCO: images elsewhere": (
        _coco(lambda c: c["images"][0].update(file_name="x.png")),
        "its first image, x.png, is in none of",
    ),
    "YOLO: words": (_label("cell 0.5 0.5 0.1 0.1"), "001.txt:1: 'cell .*expected a class number"),
    "YOLO: four numbers": (_label("0 0.5 0.5 0.1"), "expected a class number and center"),
    "YOLO: pixels": (_label("0 20 15 10 10"), "expected shares of the image, from 0 to 1, and no pixels"),
    "YOLO: class beyond names": (_label("9 0.5 0.5 0.1 0.1"), "class 9, but names has 3"),
    "YOLO: half a polygon": (_label("0 0.1 0.1 0.2 0.2 0.3"), "5 numbers are neither a box"),
    "YOLO: fraction of a class": (_label("0.5 0.5 0.5 0.1 0.1"), "expected a class number"),
    "YOLO: no split": (_config("test: images/train\nnames: [a]\n"), "it has test, and no train"),
    "YOLO: folder is not there": (_config("train: images/nowhere\nnames: [a, b, c]\n"), "images/nowhere is neither in"),
    "YOLO: names": (_config("train: images/train\nnames: 3\n"), "names is 3; expected a list"),
    "YOLO: not YAML": (_config("train: [\n"), "not valid YAML"),
    "YOLO: another YAML": (_config("a: 1\n"), "expected the YAML file of YOLO"),
    "images alone": (_without_metadata, "images have no metadata.jsonl with their boxes; expected a column objects"),
    "nothing": (lambda root: root, "no such file"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_bad_sources_are_answered(case: str, tmp_path: Path) -> None:
    make, expected = SOURCES[case]
    with pytest.raises(UserError, match=expected) as refused:
        read(make(tmp_path / "data"))
    assert "\n" not in str(refused.value)


def test_crowds_and_unused_categories_are_counted(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = 1
        content["categories"].append({"id": 99, "name": "violet"})

    text = "\n".join(read(_coco(change)(tmp_path / "data")).lines())
    assert "1 box of crowds (iscrowd) left out" in text
    assert "categories without a box are no classes here: violet" in text


def test_images_of_another_size_than_a_coco_file_says_are_refused(tmp_path: Path) -> None:
    """Boxes of the pixels before an EXIF rotation, or of images that were resized since, would be in wrong places."""
    from PIL import Image

    file = write_coco(tmp_path / "data")
    turned = tmp_path / "data" / "images" / "001.png"
    image = Image.open(turned)
    tag = image.getexif()
    tag[0x0112] = 6
    image.save(turned, exif=tag)
    with pytest.raises(UserError, match=r"001.png is 30 x 40 and not 40 x 30 pixels \(an EXIF rotation is applied\)"):
        read(file)
    content = json.loads(file.read_text())
    for one in content["images"]:
        one.update(width=0, height=None)  # not known
    file.write_text(json.dumps(content))
    assert len(contents(read(file))) == COUNT


def test_boxes_of_a_coco_file_that_fit_nowhere_are_not_blamed_on_a_setting(tmp_path: Path) -> None:
    def flat(content: dict[str, Any]) -> None:
        for one in content["annotations"]:
            one["bbox"] = [1, 1, 0, 0]

    with pytest.raises(UserError, match="have no area") as refused:
        read(_coco(flat)(tmp_path / "data"))
    assert "data.box_format" not in str(refused.value)


def test_changed_names_of_classes_are_read_again(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "data", config=False)
    assert "red" in read(root).label_names
    (root / "classes.txt").write_text("blue\ngreen\npink\n")
    assert "pink" in read(root).label_names


def test_images_without_a_row_of_metadata_are_named(images: Path, tmp_path: Path) -> None:
    root = folder_of_boxes(tmp_path / "data", COUNT)
    assert "not read" not in "\n".join(read(root).lines())
    scene(3)[0].save(root / "more.png")
    assert "1 image not read, not named by metadata.jsonl: more.png" in "\n".join(read(root).lines())


@pytest.mark.parametrize("as_list", [True, False])
def test_crowds_in_metadata_are_left_out_and_counted(as_list: bool, tmp_path: Path) -> None:
    root = folder_of_boxes(tmp_path / "data", COUNT)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    before = sum(len(row["objects"]["bbox"]) for row in rows)
    for row in rows:
        one = row["objects"]
        one["iscrowd"] = [0] * len(one["bbox"])
    rows[1]["objects"]["iscrowd"][0] = 1
    if as_list:
        for row in rows:
            lists = row["objects"]
            row["objects"] = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read(root)
    assert sum(len(row["label"]) for row in [*data.train, *data.eval]) == before - 1
    assert "boxes of crowds (iscrowd), which are left out" in "\n".join(data.lines())


def test_polygons_become_boxes(tmp_path: Path) -> None:
    data = read(_label("1 0.1 0.2 0.5 0.2 0.5 0.6")(tmp_path / "data"))
    found = next(row["boxes"] for row in [*data.train, *data.eval] if row["path"].endswith("001.png"))
    assert np.allclose(found, [4, 6, 20, 18], atol=1e-4)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "box_format elsewhere": (
        {"task": "image-classification", "data": {"train": "x", "box_format": "xyxy"}},
        "data.box_format: it is",
    ),
    "class_names elsewhere": (
        {"task": "causal-lm", "data": {"train": "x", "class_names": ["a"]}},
        "data.class_names: it is for",
    ),
    "unknown form": ({"data": {"train": "x", "box_format": "voc"}}, "data.box_format"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings_are_answered(case: str, tmp_path: Path) -> None:
    import yaml

    more, expected = SETTINGS[case]
    recipe = {"task": "object-detection", "model": "x", "strategy": "full", "output_dir": str(tmp_path / "run"), **more}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=expected):
        load_recipe(str(tmp_path / "recipe.yaml"), [])


def test_a_form_that_the_source_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.box_format: xyxy: .* is a COCO source, whose boxes are xywh; remove it"):
        read(write_coco(tmp_path / "data"), box_format="xyxy")


def test_an_evaluation_class_without_training_boxes_is_refused(images: Path, tmp_path: Path) -> None:
    folder = folder_of_boxes(tmp_path / "eval", 4)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"red"', '"violet"').replace('"blue"', '"violet"'))
    with pytest.raises(UserError, match=r"have the label 'violet'.*which no training row has"):
        read(images, eval=str(folder))


def test_prepared_rows_have_no_pixels(images: Path) -> None:
    data = read(images)
    assert isinstance(data, PreparedData)
    assert all(row["image"] is None for row in data.train)


def test_blood_cells() -> None:
    """Real photographs: a box without area is named, the rest is read as COCO's form, which corners would not fit."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "blood_cells"
    if not folder.is_dir():
        pytest.skip("../shared/data/blood_cells is not there")
    data = read(folder / "test.zip", class_names=["Platelets", "RBC", "WBC"])
    assert data.label_names == ("Platelets", "RBC", "WBC")
    assert sum(len(row["label"]) for row in [*data.train, *data.eval]) == 945
    assert "boxes are read as xywh" in "\n".join(data.lines())
