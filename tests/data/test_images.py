"""Images of folders, archives, tables and Hub data sets become rows; what cannot be used is refused in a sentence."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.images import CLASSES, folder_of_classes, picture, processor_of
from PIL import Image

from hfstrat.data import image_files, media_rows
from hfstrat.data.image_batches import ImageCollator, ImageProcessor, augment, crop_box, open_row
from hfstrat.data.image_classes import prepare, prepare_eval
from hfstrat.data.image_files import decode
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.images import Augmentation
from hfstrat.tasks import TASKS


@pytest.fixture(scope="module")
def processor() -> ImageProcessor:
    return ImageProcessor(processor_of("vit"), 8)


def data_of(train: Path | str, **more: Any) -> Data:
    return Data.model_validate({"train": str(train), "eval_size": 6, **more})


def read(train: Path | str, processor: ImageProcessor, **more: Any) -> Any:
    return prepare(data_of(train, **more), processor, seed=1, samples=2)


def bytes_of(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: Any) -> np.ndarray:
    """The pixels of all rows in the order of their content, which does not depend on where they are."""
    rows = sorted((row for part in (data.train, data.eval) for row in part), key=lambda row: row["content"])
    return np.stack([np.asarray(open_row(row)) for row in rows])


# where images come from


def zipped(folder: Path, file: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return file


def with_metadata(folder: Path, name: str, target: Path) -> Path:
    """The images of a folder of classes in one folder, with a table of their labels."""
    target.mkdir()
    rows = []
    for path in sorted(folder.rglob("*.png")):
        copy = f"{path.parent.name}-{path.name}"
        (target / copy).write_bytes(path.read_bytes())
        rows.append({"file_name": copy, "label": path.parent.name})
    if name.endswith("csv"):
        with (target / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), target / name)
    else:
        (target / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def with_bytes(folder: Path, file: Path) -> Path:
    """A Parquet file as `datasets` writes it: bytes and path, and numbers with class names."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    paths = sorted(folder.rglob("*.png"))
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [CLASSES.index(path.parent.name) for path in paths],
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return file


def with_paths(folder: Path, file: Path) -> Path:
    rows = [{"image": str(path.relative_to(file.parent)), "label": path.parent.name} for path in sorted(folder.rglob("*.png"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_convention_gives_the_same_images(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 8)
    sources = {
        "folder": folder,
        "glob": f"{folder}/*/*.png",
        "zip": zipped(folder, tmp_path / "images.zip"),
        "zip in a folder": zipped(folder, tmp_path / "deep.zip", "some/"),
        "jsonl": with_metadata(folder, "metadata.jsonl", tmp_path / "jsonl"),
        "csv": with_metadata(folder, "metadata.csv", tmp_path / "csv"),
        "parquet": with_metadata(folder, "metadata.parquet", tmp_path / "parquet"),
        "bytes": with_bytes(folder, tmp_path / "rows.parquet"),
        "paths": with_paths(folder, tmp_path / "rows.jsonl"),
        "zip with metadata": zipped(tmp_path / "jsonl", tmp_path / "metadata.zip"),
    }
    first = read(folder, processor)
    assert first.label_names == CLASSES
    assert len(first.train) + len(first.eval) == 24
    for name, source in sources.items():
        found = read(source, processor)
        assert found.label_names == CLASSES, name
        assert np.array_equal(pixels_of(found), pixels_of(first)), name
        by_content = {row["content"]: row["label"] for part in (found.train, found.eval) for row in part}
        assert by_content == {row["content"]: row["label"] for part in (first.train, first.eval) for row in part}, name


def test_processors_compute_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches may be made within a forward pass of 16 bits; transformers' processors may use torch."""
    given, seen = processor_of("vit"), list[bool]()
    whole = type(given).__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(type(given), "__call__", call)
    plain, changing = ImageProcessor(given, 8), ImageProcessor(given, 8, Augmentation(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        plain.pixels([picture(1, 2)])
        changing.augmented(picture(1, 2), 1, 0)
    assert seen
    assert not any(seen)


def test_splits_are_folders_or_archives(tmp_path: Path, processor: ImageProcessor) -> None:
    whole = tmp_path / "splits"
    folder_of_classes(whole / "train", 8)
    folder_of_classes(whole / "test", 2, start=50)
    found = read(whole, processor, eval_split="test")
    assert (len(found.train), len(found.eval)) == (24, 6)
    archives = tmp_path / "archives"
    archives.mkdir()
    for split in ("train", "test"):
        zipped(whole / split, archives / f"{split}.zip")
    again = read(archives, processor, eval_split="test")
    assert np.array_equal(pixels_of(again), pixels_of(found))
    one = read(zipped(whole, tmp_path / "both.zip"), processor)
    assert len(one.train) + len(one.eval) == 24, "the archive's own training split is read"


def test_a_hub_data_set_is_read_undecoded(tmp_path: Path, processor: ImageProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    folder = folder_of_classes(tmp_path / "images", 6)
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(media_rows, "load_from_hub", lambda *_: rows)
    found = read("someone/flowers", processor)
    assert found.label_names == CLASSES
    assert np.array_equal(pixels_of(found), pixels_of(read(folder, processor)))


def test_memory_is_that_of_paths(tmp_path: Path, processor: ImageProcessor) -> None:
    found = read(folder_of_classes(tmp_path / "images", 4), processor)
    assert all(row["image"] is None for row in found.train), "images of files stay in their files"
    assert found.lengths.tolist() == [processor.tokens] * len(found.train)


def test_duplicates_conflicts_and_sizes_are_reported(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 12)
    (folder / "red" / "copy.png").write_bytes((folder / "red" / "000.png").read_bytes())
    (folder / "blue" / "other.png").write_bytes((folder / "red" / "001.png").read_bytes())
    held = folder_of_classes(tmp_path / "held", 2, start=90)
    (held / "red" / "seen.png").write_bytes((folder / "red" / "002.png").read_bytes())
    picture(0, 999, (64, 48)).save(folder / "blue" / "large.png")
    found = prepare(data_of(folder, eval=str(held)), processor, seed=1)
    said = "\n".join(found.lines())
    assert found.duplicates["train_duplicates"] == 2
    assert found.duplicates["eval_rows_in_train"] == 1
    assert found.duplicates["conflicting_images"] == 1
    assert "held/red/seen.png" in said
    assert "training images occur with different labels" in said
    assert "24 x 20 to 64 x 48 pixels, median 24 x 20; the model is given 32 x 32" in said


def test_few_images_of_a_class_are_named(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 20)
    for path in sorted((folder / "red").iterdir())[3:]:
        path.unlink()
    assert "fewer than 10 training images of red;" in "\n".join(read(folder, processor).lines())


def test_several_labels(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 8)
    paths = sorted(folder.rglob("*.png"))
    rows = [{"image": str(p), "labels": [p.parent.name, "dark"][: 1 + n % 2]} for n, p in enumerate(paths)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(file, processor)
    assert found.many
    batch = ImageCollator(processor, len(found.label_names), True)([found.train[0], found.train[1]])
    assert batch["labels"].shape == (2, 4)


def test_evaluation_by_the_labels_of_a_model(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 3)
    found = prepare_eval(data_of(folder), processor, ["red", "green", "blue"], False)
    assert found.label_names == ("red", "green", "blue")
    assert all(found.label_names[row["label"]] in row["path"] for row in found.eval)
    with pytest.raises(UserError, match="the model predicts red, green"):
        prepare_eval(data_of(folder), processor, ["red", "green"], False)


# conversions


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


GRADIENT = np.arange(24 * 20, dtype=np.uint8).reshape(20, 24) // 2


class Changed(NamedTuple):
    """An image that becomes RGB, and what is said of it."""

    name: str
    data: Callable[[], bytes]
    words: str
    size: tuple[int, int] = (24, 20)


def frames() -> bytes:
    first, second = (Image.new("P", (24, 20), index) for index in (0, 1))
    for image in (first, second):
        image.putpalette([200, 0, 0, 0, 200, 0])
    return bytes_of(first, "GIF", save_all=True, append_images=[second])


CHANGED = [
    Changed("grayscale", lambda: bytes_of(Image.fromarray(GRADIENT)), "a grayscale image, which becomes RGB"),
    Changed(
        "black and white", lambda: bytes_of(Image.fromarray(GRADIENT).convert("1")), "a grayscale image, which becomes RGB"
    ),
    Changed("16 bits", lambda: bytes_of(Image.fromarray(GRADIENT.astype(np.uint16) * 257)), "16-bit pixels, which are scaled"),
    Changed("palette", lambda: bytes_of(picture(0, 0).quantize(8)), "a palette image, which becomes RGB"),
    Changed("alpha", lambda: bytes_of(picture(0, 0).convert("RGBA")), "an alpha channel, which is dropped"),
    Changed("gray and alpha", lambda: bytes_of(picture(0, 0).convert("LA")), "an alpha channel, which is dropped"),
    Changed("CMYK", lambda: bytes_of(picture(0, 0).convert("CMYK"), "JPEG"), "a CMYK image, which becomes RGB"),
    Changed(
        "EXIF rotation", lambda: bytes_of(picture(0, 0), "JPEG", exif=exif(6)), "an EXIF rotation, which is applied", (20, 24)
    ),
    Changed("animated GIF", frames, "several frames, of which the first is used"),
    Changed("one pixel", lambda: bytes_of(Image.new("RGB", (1, 1), (9, 8, 7))), "", (1, 1)),
    Changed("BMP named .jpg", lambda: bytes_of(picture(0, 0), "BMP"), ""),
]


@pytest.mark.parametrize("case", CHANGED, ids=[case.name for case in CHANGED])
def test_every_kind_of_image_becomes_rgb(case: Changed, processor: ImageProcessor) -> None:
    found = decode(case.data())
    assert found.image.mode == "RGB"
    assert found.image.size == case.size
    assert case.words in "; ".join(found.changes)
    assert bool(found.changes) == bool(case.words)
    assert processor.pixels([found.image]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("case", [case for case in CHANGED if case.name != "16 bits"], ids=lambda case: case.name)
def test_a_pipeline_sees_the_same_image(case: Changed, tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    file = tmp_path / "image.png"
    file.write_bytes(case.data())
    assert np.array_equal(np.asarray(load_image(str(file))), np.asarray(decode(case.data()).image))


def test_16_bits_are_scaled_and_not_clipped() -> None:
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(decode(bytes_of(deep)).image)[:, :, 0], GRADIENT)


def test_what_was_converted_is_counted(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 10)
    for number, case in enumerate(CHANGED[:2]):
        (folder / "red" / f"changed{number}.png").write_bytes(case.data())
    assert "2 rows have a grayscale image, which becomes RGB" in "\n".join(read(folder, processor).lines())


# what is refused


class Bad(NamedTuple):
    """Data that are refused: what builds them (returning the source), and the beginning of the sentence's parts."""

    name: str
    build: Callable[[Path], Any]
    message: tuple[str, ...]


def plus(data: bytes, name: str = "bad.jpg") -> Callable[[Path], Path]:
    """A folder of nine images with one more, a tenth that is above the share which may be left out."""

    def build(root: Path) -> Path:
        folder = folder_of_classes(root / "images", 3)
        (folder / "red" / name).write_bytes(data)
        return folder

    return build


def table(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        folder_of_classes(root, 3)
        file = root / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return build


def metadata(text: str) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        root = root / "images"
        root.mkdir()
        picture(0, 0).save(root / "a.png")
        picture(1, 0).save(root / "b.png")
        (root / "metadata.jsonl").write_text(text)
        return root

    return build


def flat(root: Path) -> Path:
    (root / "images").mkdir()
    picture(0, 0).save(root / "images" / "a.png")
    return root / "images"


def empty(root: Path) -> Path:
    (root / "images" / "cat").mkdir(parents=True)
    return root / "images"


def only_test(root: Path) -> Path:
    folder_of_classes(root / "images" / "test", 3)
    return root / "images"


def one_class(root: Path) -> Path:
    folder = folder_of_classes(root / "images", 3)
    for name in ("green", "blue"):
        for file in (folder / name).iterdir():
            file.unlink()
    return folder


def broken_zip(root: Path) -> Path:
    (root / "images.zip").write_bytes(b"PK\x03\x04 and no more")
    return root / "images.zip"


def empty_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    return root / "images.zip"


def damaged_zip(root: Path) -> Path:
    file = zipped(folder_of_classes(root / "images", 3), root / "images.zip")
    content = bytearray(file.read_bytes())
    content[60:400] = bytes(340)
    file.write_bytes(bytes(content))
    return file


def single(root: Path) -> Path:
    picture(0, 0).save(root / "one.png")
    return root / "one.png"


def text_file(root: Path) -> Path:
    (root / "rows.txt").write_text("a line\n")
    return root / "rows.txt"


def huge_header() -> bytes:
    """A PNG of a few bytes whose header claims 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


PHOTO = bytes_of(picture(0, 0, (200, 200)), "JPEG")
BAD = [
    Bad("truncated JPEG", plus(PHOTO[: len(PHOTO) // 2]), ("1 of 10 images (10%) cannot be read", "red/bad.jpg", "truncated")),
    Bad("truncated PNG", plus(bytes_of(picture(0, 0))[:200], "bad.png"), ("red/bad.png", "cannot be decoded")),
    Bad("empty file", plus(b""), ("red/bad.jpg: the file is empty",)),
    Bad("text named .jpg", plus(b"<html>not found</html>"), ("not an image of a format that Pillow reads",)),
    Bad("Git LFS pointer", plus(b"version https://git-lfs.github.com/spec/v1\n"), ("not an image of a format",)),
    Bad("decompression bomb", plus(huge_header(), "bad.png"), ("it has more than 89,478,485 pixels",)),
    Bad("far too wide", plus(bytes_of(Image.new("RGB", (3000, 2))), "bad.png"), ("one side is more than 200 times the other",)),
    Bad(
        "32-bit floats",
        plus(bytes_of(Image.new("F", (9, 9)), "TIFF"), "bad.tif"),
        ("numbers of 32 bits", "save it with 8 bits"),
    ),
    Bad("SVG", plus(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad.png"), ("not an image of a format",)),
    Bad("images without classes", flat, ("1 images, such as a.png", "have no label", "a folder for each class")),
    Bad("empty folder", empty, ("contains no images; expected a folder for each class",)),
    Bad("only a test split", only_test, ("its parts are named test, and none is named train",)),
    Bad("one class", one_class, ("every row has the label 'red'; a classifier needs",)),
    Bad("broken zip", broken_zip, ("not a readable zip archive",)),
    Bad("zip without images", empty_zip, ("this archive contains no images",)),
    Bad("damaged zip", damaged_zip, ("cannot be read",)),
    Bad("one image", single, ("is a single image; expected a folder for each class",)),
    Bad("text file", text_file, ("a text file has no labels",)),
    Bad("no such folder", lambda root: root / "nowhere", ("no such file",)),
    Bad(
        "missing file",
        table({"image": "red/000.png", "label": "a"}, {"image": "no.png", "label": "b"}),
        ("no.png: no such file",),
    ),
    Bad("path of a folder", table({"image": "red", "label": "a"}, {"image": "red/000.png", "label": "b"}), ("it is a folder",)),
    Bad("no label", table({"image": "red/000.png"}), ("needs an image and a label; the data have image",)),
    Bad("no image", table({"text": "hello", "label": "a"}), ("needs an image and a label; the data have text, label",)),
    Bad(
        "image by another name",
        table({"photo": "red/000.png", "label": "a"}),
        ("Set `data.columns: {photo: image}`",),
    ),
    Bad("label is null", table({"image": "red/000.png", "label": None}), ("row 1: 'label' is null",)),
    Bad("label is a fraction", table({"image": "red/000.png", "label": 0.5}), ("row 1: 'label' is 0.5",)),
    Bad(
        "image is null",
        table({"image": "red/000.png", "label": "a"}, {"image": None, "label": "b"}),
        ("row 2: 'image' is null",),
    ),
    Bad("image is a number", table({"image": 7, "label": "a"}), ("row 1: 'image' is int, expected the path or the bytes",)),
    Bad("metadata without file_name", metadata('{"name": "a.png", "label": "x"}\n'), ("row 1: it has no file_name",)),
    Bad("metadata without label", metadata('{"file_name": "a.png"}\n'), ("needs an image and a label",)),
    Bad("metadata is no JSON", metadata("file_name: a.png\n"), ("metadata.jsonl:1", "not valid JSON")),
    Bad("metadata without rows", metadata("\n"), ("it has no rows",)),
    Bad(
        "metadata names no file",
        metadata('{"file_name": "a.png", "label": "x"}\n{"file_name": "c.png", "label": "y"}\n'),
        ("c.png: no such file",),
    ),
    Bad(
        "vectors of 0 and 1",
        table({"image": "red/000.png", "labels": [0, 1]}, {"image": "red/001.png", "labels": [1, 0]}),
        ("is a vector of 0 and 1",),
    ),
]


@pytest.mark.parametrize("case", BAD, ids=[case.name for case in BAD])
def test_bad_images_are_answered(case: Bad, tmp_path: Path, processor: ImageProcessor) -> None:
    source = case.build(tmp_path)
    with pytest.raises(UserError) as refused:
        prepare(data_of(source, eval_size=1), processor, seed=1)
    for part in case.message:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_corpus_is_a_corpus() -> None:
    assert len(BAD) >= 30
    assert len({case.name for case in BAD}) == len(BAD)


def test_a_few_unreadable_images_are_left_out_by_name(tmp_path: Path, processor: ImageProcessor) -> None:
    folder = folder_of_classes(tmp_path / "images", 10)
    (folder / "red" / "bad.jpg").write_bytes(PHOTO[:300])
    (folder / "notes.md").write_text("about these images")
    found = read(folder, processor)
    said = "\n".join(found.lines())
    assert "30 of 31 rows" in said
    assert "warning: left out: 1 image that cannot be read" in said
    assert "red/bad.jpg" in said
    assert "1 file not read, of other kinds than images: notes.md" in said


def test_an_image_that_disappears_is_named(tmp_path: Path, processor: ImageProcessor) -> None:
    found = read(folder_of_classes(tmp_path / "images", 4), processor)
    path = Path(found.train[0]["path"])
    path.unlink()
    with pytest.raises(UserError, match="no such file; it could be read when the data were prepared"):
        ImageCollator(processor, 3)([found.train[0]])


# augmentation


def test_augmentation_depends_on_seed_epoch_and_row_only() -> None:
    wanted = Augmentation()
    one, other = (ImageProcessor(processor_of("vit"), 8, wanted, seed) for seed in (1, 2))
    image = picture(0, 0)
    first = one.augmented(image, 5, 3)
    np.random.default_rng(0).random(100)
    assert bool((one.augmented(image, 5, 3) == first).all())
    for changed in (one.augmented(image, 5, 4), one.augmented(image, 6, 3), other.augmented(image, 5, 3)):
        assert not bool((changed == first).all())


def test_one_change_does_not_depend_on_another() -> None:
    """With the same numbers, mirroring happens in the same epochs whether colors change or not."""
    image = picture(0, 0)

    def mirrored(wanted: Augmentation, epoch: int) -> bool:
        plain = wanted._replace(flip=False)
        pair = [augment(image, each, (24, 20), np.random.default_rng(epoch)) for each in (wanted, plain)]
        return not np.array_equal(*map(np.asarray, pair))

    some = [mirrored(Augmentation(crop=1, color=0.0), epoch) for epoch in range(20)]
    assert some == [mirrored(Augmentation(crop=0.3, color=0.4), epoch) for epoch in range(20)]
    assert 2 < sum(some) < 18


@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (24, 20), (300, 7)])
def test_a_crop_is_inside_of_the_image(share: float, size: tuple[int, int]) -> None:
    source = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = crop_box(*size, share, float(source.uniform(0.75, 4 / 3)), tuple(source.random(2)))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert (right - left) * (bottom - top) <= share * size[0] * size[1] * 1.001


def test_rows_without_an_epoch_are_not_augmented(tmp_path: Path, processor: ImageProcessor) -> None:
    found = read(folder_of_classes(tmp_path / "images", 4), processor)
    changed = ImageCollator(ImageProcessor(processor_of("vit"), 8, Augmentation(), 1), 3)
    rows = [found.train[0], found.train[1]]
    plain = ImageCollator(processor, 3)(rows)["pixel_values"]
    assert bool((changed(rows)["pixel_values"] == plain).all())
    assert not bool((changed([row | {"epoch": 0} for row in rows])["pixel_values"] == plain).all())


@pytest.mark.parametrize("many", [False, True])
def test_mixed_images_are_shares_of_two_and_depend_on_no_batch(tmp_path: Path, processor: ImageProcessor, many: bool) -> None:
    from hfstrat.trainer.train_data import EpochRows

    found = read(folder_of_classes(tmp_path / "images", 4), processor)
    train = [{**row, "label": [row["label"]] if many else row["label"]} for row in found.train]
    mixing = ImageProcessor(processor_of("vit"), 8, Augmentation(mixup=0.4), 1)
    collate, plain = ImageCollator(mixing, 3, many), ImageCollator(ImageProcessor(processor_of("vit"), 8, Augmentation(), 1), 3)
    rows = EpochRows(train, collate)
    some = [rows[place] for place in range(len(train) + 6)]  # of two epochs
    batch = collate(some)
    assert batch["labels"].dtype == batch["pixel_values"].dtype == torch.float32
    assert torch.allclose(batch["labels"].sum(1), torch.ones(len(some)))
    for number, row in enumerate(some):
        alone = collate([row])
        assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][number])
        whole = {key: value for key, value in row.items() if key not in ("partner", "share")}
        one, two = (plain([{**each, "label": 0}])["pixel_values"][0] for each in (whole, row["partner"]))
        assert torch.allclose(batch["pixel_values"][number], row["share"] * one + (1 - row["share"]) * two, atol=1e-6)
        expected = torch.zeros(3)
        for each, share in ((row, row["share"]), (row["partner"], 1 - row["share"])):
            expected[each["label"][0] if many else each["label"]] += share
        assert torch.allclose(batch["labels"][number], expected)
    assert some[0]["share"] != some[len(train)]["share"], "another one in the next epoch"
    assert len({round(row["share"], 6) for row in some}) == len(some)
    assert all(0.5 <= row["share"] <= 1 for row in some)
    assert len({row["partner"]["row"] for row in some}) > 3


def test_a_task_is_detected_from_the_columns() -> None:
    from hfstrat.tasks import task_of_rows

    rows = [{"image": {"bytes": b"", "path": "a.png"}, "label": number % 2} for number in range(4)]
    assert task_of_rows(rows, "rows.parquet").name == TASKS["image-classification"].name


def test_pillow_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hfstrat\[vision\]'"):
        image_files.check_installed("image-classification")


def test_real_photographs_in_archives(shared: Path, processor: ImageProcessor) -> None:
    """The archives are read in place, each class as often as its README says."""
    found = read(shared / "data" / "cifar10_10k" / "test.zip", processor, eval_size=100)
    assert len(found.label_names) == 10
    assert len(found.train) + len(found.eval) == 2000
    assert found.counts.tolist() == [190] * 10
    assert not any("cannot be read" in line for line in found.lines())
