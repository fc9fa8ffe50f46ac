"""Recordings of folders, archives and tables become rows; what cannot be used is refused in a sentence."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.sounds import CLASSES, RATE, bytes_of, config_of, extractor_of, folder_of_classes, tone

from hfstrat.data.audio_batches import AudioCollator, AudioProcessor, augment, moved, open_row, without_band
from hfstrat.data.audio_classes import prepare
from hfstrat.data.audio_files import decode
from hfstrat.data.media_files import Unreadable
from hfstrat.errors import UserError
from hfstrat.recipe.audio import Changes
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS
from hfstrat.tasks.audio_classification.processor import made


@pytest.fixture(scope="module")
def processor() -> AudioProcessor:
    return made(extractor_of("wav2vec2"), config_of("wav2vec2").to_dict(), 2.0)


def data_of(train: Path | str, **more: Any) -> Data:
    return Data.model_validate({"train": str(train), "eval_size": 6, **more})


def read(train: Path | str, processor: AudioProcessor, **more: Any) -> Any:
    return prepare(data_of(train, **more), processor, seed=1, samples=2)


def zipped(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder).as_posix())
    return file


def with_metadata(folder: Path, target: Path) -> Path:
    """The recordings of a folder of classes in one folder, with a table of their labels."""
    target.mkdir()
    rows = []
    for path in sorted(folder.rglob("*.wav")):
        (target / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
        rows.append({"file_name": f"{path.parent.name}-{path.name}", "label": path.parent.name})
    (target / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def with_bytes(folder: Path, file: Path) -> Path:
    """A Parquet file as `datasets` writes it: bytes and path, and numbers with class names."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(folder.rglob("*.wav"))
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [CLASSES.index(path.parent.name) for path in paths],
    }
    pq.write_table(pa.table(rows, schema=features.arrow_schema), file)
    return file


def with_paths(folder: Path, file: Path) -> Path:
    lines = [f"{path.relative_to(file.parent)},{path.parent.name}" for path in sorted(folder.rglob("*.wav"))]
    file.write_text("\n".join(["audio,label", *lines]) + "\n")
    return file


def test_every_convention_gives_the_same_recordings(tmp_path: Path, processor: AudioProcessor) -> None:
    folder = folder_of_classes(tmp_path / "sounds", 4)
    sources = {
        "folder": folder,
        "glob": f"{folder}/*/*.wav",
        "zip": zipped(folder, tmp_path / "sounds.zip"),
        "jsonl": with_metadata(folder, tmp_path / "jsonl"),
        "zip with metadata": zipped(tmp_path / "jsonl", tmp_path / "metadata.zip"),
        "bytes": with_bytes(folder, tmp_path / "rows.parquet"),
        "paths": with_paths(folder, tmp_path / "rows.csv"),
    }

    def samples_of(data: Any) -> list[np.ndarray]:
        rows = sorted((row for part in (data.train, data.eval) for row in part), key=lambda row: row["content"])
        return [open_row(row, processor) for row in rows]

    first = samples_of(read(folder, processor))
    for name, source in sources.items():
        found = read(source, processor)
        assert found.label_names == CLASSES, name
        assert all(np.array_equal(a, b) for a, b in zip(samples_of(found), first, strict=True)), name


@pytest.mark.parametrize("family", ["wav2vec2", "whisper", "ast"])
def test_a_batch_made_within_autocast_is_the_same(family: str) -> None:
    """Features are computed in batches that are made under the autocast of the model, on the CPU too."""
    processor = made(extractor_of(family), config_of(family).to_dict(), 1.0)
    samples = [tone(label, 1, 0.5) for label in CLASSES[:2]]
    plain = processor.inputs(samples)
    with torch.autocast("cpu", torch.bfloat16):
        within = processor.inputs(samples)
    assert all(torch.equal(value, within[name]) for name, value in plain.items())


def test_duplicates_conflicts_and_durations_are_reported(tmp_path: Path, processor: AudioProcessor) -> None:
    import soundfile

    folder = folder_of_classes(tmp_path / "sounds", 12)
    (folder / "low" / "copy.wav").write_bytes((folder / "low" / "000.wav").read_bytes())
    (folder / "high" / "other.wav").write_bytes((folder / "low" / "001.wav").read_bytes())
    (folder / "high" / "stereo.wav").write_bytes(bytes_of(np.stack([tone("high", 99)] * 2, axis=1), rate=44_100))
    (folder / "high" / "silent.wav").write_bytes(bytes_of(np.zeros(8000)))
    (folder / "high" / "long.wav").write_bytes(bytes_of(tone("high", 50, 3.0)))
    held = folder_of_classes(tmp_path / "held", 2, start=90)
    (held / "low" / "seen.wav").write_bytes((folder / "low" / "002.wav").read_bytes())
    found = prepare(data_of(folder, eval=str(held)), processor, seed=1)
    said = "\n".join(found.lines())
    assert found.duplicates["train_duplicates"] == 2
    assert found.duplicates["eval_rows_in_train"] == 1
    assert found.duplicates["conflicting_recordings"] == 1
    assert "training recordings occur with different labels" in said
    assert "warning: 1 recording without sound" in said
    assert "high/silent.wav" in said
    assert "several channels, which are averaged" in said
    assert "longer than the model is given" in said
    assert "up to 2 s at 16,000 Hz, resampled from 16,000 and 44,100 Hz" in said
    middle = np.median([soundfile.info(file).duration for file in folder.rglob("*.wav")])
    assert f"to 3.00 s, median {middle:.2f} s" in said


# decoding

SOUND = tone("low", 3)


def short_wav() -> bytes:
    return bytes_of(SOUND)[:-3000]


def float_wav(value: float) -> bytes:
    samples = SOUND.copy()
    samples[100] = value
    return bytes_of(samples, subtype="FLOAT")


def streamed_wav() -> bytes:
    """As a pipe writes it: the size of the samples in the header was never filled in."""
    found = bytearray(bytes_of(SOUND))
    place = found.index(b"data")
    found[place + 4 : place + 8] = struct.pack("<I", 0xFFFFFFFF)
    return bytes(found)


class Read(NamedTuple):
    """A recording that can be used, and what is said of it."""

    name: str
    data: Callable[[], bytes]
    changes: tuple[str, ...] = ()
    near: float = 1e-3  # largest difference from the samples


READ = [
    Read("wav", lambda: bytes_of(SOUND), near=1e-4),
    Read("float wav", lambda: bytes_of(SOUND, subtype="FLOAT"), near=0),
    Read("24 bits", lambda: bytes_of(SOUND, subtype="PCM_24"), near=1e-6),
    Read("8 bits", lambda: bytes_of(SOUND, subtype="PCM_U8"), ("have 8-bit samples",), 0.01),
    Read("mu-law", lambda: bytes_of(SOUND, subtype="ULAW"), near=0.02),
    Read("stereo", lambda: bytes_of(np.stack([SOUND, SOUND], axis=1)), ("have several channels, which are averaged",)),
    Read("flac", lambda: bytes_of(SOUND, "FLAC"), near=1e-4),
    Read("ogg", lambda: bytes_of(SOUND, "OGG"), near=0.1),
    Read("mp3", lambda: bytes_of(SOUND, "MP3"), near=0.2),
    Read("aiff", lambda: bytes_of(SOUND, "AIFF"), near=1e-4),
    Read("streamed wav", streamed_wav, near=1e-4),
    Read("one sample", lambda: bytes_of(SOUND[:1]), near=1e-4),
]


@pytest.mark.parametrize("case", READ, ids=[case.name for case in READ])
def test_formats_become_samples(case: Read) -> None:
    found = decode(case.data(), RATE, 10)
    assert tuple(found.changes) == case.changes
    assert found.samples.dtype == np.float32
    count = min(len(found.samples), len(SOUND))
    assert np.abs(found.samples[:count] - SOUND[:count]).max() <= case.near


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_a_rate_is_changed_and_not_the_tone(rate: int) -> None:
    found = decode(bytes_of(tone("middle", 1, 0.5, rate), rate=rate), RATE, 10).samples
    assert abs(len(found) - RATE * 0.52) < 3
    peak = np.abs(np.fft.rfft(found)).argmax() * RATE / len(found)
    assert 890 < peak < 960


def test_only_the_beginning_of_a_long_recording_is_decoded() -> None:
    """Ten minutes take no longer than the two seconds that the model is given."""
    import time

    long = bytes_of(np.tile(tone("low", 0, 1.0), 600))
    started = time.perf_counter()
    found = decode(long, RATE, 2)
    assert time.perf_counter() - started < 1
    assert (len(found.samples), round(found.seconds)) == (2 * RATE, 600)
    assert found.changes == ["are longer than the model is given: the rest is left out"]


class Bad(NamedTuple):
    name: str
    data: Callable[[], bytes]
    message: str


UNUSABLE = [
    Bad("no bytes", lambda: b"", "the file is empty"),
    Bad("no samples", lambda: bytes_of(np.zeros(0)), "it has no samples"),
    Bad("truncated wav", short_wav, "it is truncated: 3,000 bytes of its samples are missing"),
    Bad("truncated flac", lambda: bytes_of(SOUND, "FLAC")[:3000], ""),
    Bad("header alone", lambda: bytes_of(SOUND)[:44], "samples"),
    Bad("text", lambda: b"hello, this is no sound at all\n" * 9, "not a recording of a format that libsndfile reads"),
    Bad("NaN", lambda: float_wav(float("nan")), "it has samples that are not numbers (NaN or infinity)"),
    Bad("infinity", lambda: float_wav(float("inf")), "it has samples that are not numbers"),
    Bad(
        "m4a", lambda: b"\0\0\0\x20ftypM4A " + bytes(90), "the format MPEG-4 (m4a), which libsndfile does not read; convert it"
    ),
    Bad("rate", lambda: bytes_of(SOUND, rate=200), "its sample rate is 200 Hz"),
    Bad("zip named wav", lambda: b"PK\x03\x04" + bytes(90), "not a recording of a format"),
]


@pytest.mark.parametrize("case", UNUSABLE, ids=[case.name for case in UNUSABLE])
def test_what_is_no_recording_is_named(case: Bad) -> None:
    with pytest.raises(Unreadable) as refused:
        decode(case.data(), RATE, 10)
    assert case.message in str(refused.value)
    assert "\n" not in str(refused.value)


# what is refused


def plus(data: bytes, name: str = "bad.wav") -> Callable[[Path], Path]:
    """A folder of nine recordings with one more, a tenth that is above the share which may be left out."""

    def build(root: Path) -> Path:
        folder = folder_of_classes(root / "sounds", 3)
        (folder / "low" / name).write_bytes(data)
        return folder

    return build


def table(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        folder_of_classes(root, 3)
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return root / "rows.jsonl"

    return build


def metadata(text: str) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        (root / "sounds").mkdir()
        (root / "sounds" / "a.wav").write_bytes(bytes_of(SOUND))
        (root / "sounds" / "metadata.jsonl").write_text(text)
        return root / "sounds"

    return build


def without(*parts: str) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        folder = folder_of_classes(root / "sounds", 3)
        for part in parts:
            for file in (folder / part).iterdir():
                file.unlink()
        return folder

    return build


def single(root: Path) -> Path:
    (root / "a.wav").write_bytes(bytes_of(SOUND))
    return root / "a.wav"


def loose(root: Path) -> Path:
    (root / "sounds").mkdir()
    (root / "sounds" / "a.wav").write_bytes(bytes_of(SOUND))
    return root / "sounds"


def archive_of_text(root: Path) -> Path:
    with zipfile.ZipFile(root / "sounds.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    return root / "sounds.zip"


def no_archive(root: Path) -> Path:
    (root / "sounds.zip").write_bytes(b"PK\x03\x04 and no more")
    return root / "sounds.zip"


class Refused(NamedTuple):
    name: str
    build: Callable[[Path], Any]
    message: tuple[str, ...]


REFUSED = [
    Refused(
        "empty file", plus(b""), ("1 of 10 recordings (10%) cannot be read", "bad.wav: the file is empty", "Repair or remove")
    ),
    Refused("truncated", plus(short_wav()), ("bad.wav: it is truncated",)),
    Refused("text", plus(b"some text"), ("bad.wav: not a recording of a format",)),
    Refused("aac", plus(b"\xff\xf1" + bytes(90), "bad.aac"), ("bad.aac: ",)),
    Refused("too short", plus(bytes_of(SOUND[:90])), ("it has 90 samples at 16,000 Hz, and this model needs", "ms)")),
    Refused("NaN", plus(float_wav(float("nan"))), ("samples that are not numbers",)),
    Refused("single file", single, ("is a single recording; expected a folder for each class",)),
    Refused("no class", loose, ("1 recordings, such as a.wav, are in no folder of a class, so they have no label",)),
    Refused("empty folders", without(*CLASSES), ("this folder contains no recordings; expected a folder for each class",)),
    Refused("one class", without("low", "high"), ("label",)),
    Refused("archive of text", archive_of_text, ("this archive contains no recordings",)),
    Refused("no archive", no_archive, ("not a readable zip archive",)),
    Refused(
        "missing file", table({"audio": "low/000.wav", "label": "a"}, {"audio": "no.wav", "label": "b"}), ("no such file",)
    ),
    Refused(
        "folder as file", table({"audio": "low", "label": "a"}, {"audio": "low/000.wav", "label": "b"}), ("it is a folder",)
    ),
    Refused("null", table({"audio": None, "label": "a"}), ("'audio' is null, expected the path or the bytes of a recording",)),
    Refused("number", table({"audio": 7, "label": "a"}), ("'audio' is int, expected the path or the bytes of a recording: 7",)),
    Refused("no audio column", table({"sound": "low/000.wav", "label": "a"}), ("needs a recording and a label", "sound")),
    Refused("no label column", table({"audio": "low/000.wav", "kind": "a"}), ("needs a recording and a label",)),
    Refused("null label", table({"audio": "low/000.wav", "label": None}, {"audio": "low/001.wav", "label": "a"}), ("'label'",)),
    Refused("metadata without names", metadata('{"label": "a"}\n'), ("row 1: it has no file_name, the path of a recording",)),
    Refused("metadata of a missing file", metadata('{"file_name": "b.wav", "label": "a"}\n'), ("b.wav: no such file",)),
    Refused("metadata without labels", metadata('{"file_name": "a.wav"}\n'), ("needs a recording and a label",)),
    Refused("nowhere", lambda root: root / "nowhere", ("no such file",)),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_bad_data_are_refused_in_a_sentence(case: Refused, tmp_path: Path, processor: AudioProcessor) -> None:
    with pytest.raises(UserError) as refused:
        read(case.build(tmp_path), processor)
    said = str(refused.value)
    assert all(part in said for part in case.message), said
    assert "\n" not in said


def test_a_few_unreadable_recordings_are_left_out_and_named(tmp_path: Path, processor: AudioProcessor) -> None:
    folder = folder_of_classes(tmp_path / "sounds", 10)
    (folder / "low" / "broken.wav").write_bytes(b"")
    found = read(folder, processor)
    assert len(found.train) + len(found.eval) == 30
    assert "warning: left out: 1 recording that cannot be read" in "\n".join(found.lines())


# batches


def test_augmentation_depends_on_seed_epoch_and_row_alone() -> None:
    def view(seed: int = 3, row: int = 5, epoch: int = 1) -> np.ndarray:
        one = made(extractor_of("wav2vec2"), config_of("wav2vec2").to_dict(), 2.0, Changes(), seed)
        return one.augmented(SOUND, row, epoch)

    assert np.array_equal(view(), view())
    assert all(not np.array_equal(view(), other) for other in (view(seed=4), view(row=6), view(epoch=2)))
    assert view().dtype == np.float32
    assert len(view()) == len(SOUND)


def test_each_change_is_what_it_says() -> None:
    still = {"shift": 0.0, "noise": 0.0, "time_mask": 0.0, "frequency_mask": 0.0}

    def only(**given: float) -> np.ndarray:
        return augment(SOUND, Changes(**{**still, **given}), RATE, np.random.default_rng(1))

    assert np.array_equal(only(), SOUND)
    assert (only(time_mask=0.9) == 0).sum() > 0.05 * len(SOUND)
    level = np.sqrt(np.mean(SOUND**2))
    assert 0 < np.sqrt(np.mean((only(noise=0.5) - SOUND) ** 2)) <= 0.55 * level
    assert np.array_equal(moved(SOUND, 40)[40:], SOUND[:-40])
    assert np.array_equal(moved(SOUND, -40)[:-40], SOUND[40:])
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    removed = np.abs(np.fft.rfft(without_band(noise, 0.2, 0.5, RATE))) < 1e-2
    assert 0.02 < removed.mean() < 0.4
    assert np.diff(np.flatnonzero(removed)).max() == 1, "one band"


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2-group", "whisper", "ast"])
def test_a_recording_has_the_same_inputs_alone_and_in_a_batch(family: str, tmp_path: Path) -> None:
    one = made(extractor_of(family), config_of(family).to_dict(), None)
    data = read(folder_of_classes(tmp_path / "sounds", 4), one)
    rows = [data.train[0], data.train[1], data.train[2]]
    batch = AudioCollator(one)(rows)
    for index, row in enumerate(rows):
        alone = one.one(open_row(row, one))[one.column][0]
        assert torch.equal(batch[one.column][index][: len(alone)], alone)
        if not one.is_fixed:
            assert int(batch["attention_mask"][index].sum()) == len(alone)
            assert not batch[one.column][index][len(alone) :].any()


def test_a_column_of_text_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is for task: audio-classification"):
        TASKS["text-classification"].rows.read_format(
            [{"text": "a", "label": "b"}], "x", Data(train=["x"]), wanted="audio-classification"
        )
