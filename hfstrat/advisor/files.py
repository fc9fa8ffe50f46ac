"""Statistics of images and recordings: labels of all rows, sizes of a sample by headers, seconds to decode a few. No torch."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hfstrat.data.media_files import MediaRef, Unreadable
from hfstrat.data.media_layout import holds
from hfstrat.data.media_rows import MediaSource, check_unreadable, example_of
from hfstrat.data.readers import HEAD_ROWS, read_head
from hfstrat.data.sources import is_local, local_files
from hfstrat.data.stats import Statistics
from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.recipe.data import Data
from hfstrat.tasks import TASKS, task_of_rows
from hfstrat.tasks.base import Given, Task
from hfstrat.tasks.media import PROCESSOR, MediaRows

MOST_READ = 50_000  # rows whose labels are read; of more files every second, third ... one
KEPT, KEPT_OF_TABLES = 600, 200  # files of the sample; those of tables are in memory
LEAST_KEPT = 80  # of them that are measured, however long they take to decode
HEADERS = 300  # of which the header is read
DECODED, DECODE_SECONDS = 9, 0.5
FEW = 10  # examples of a class, below which it is named


@dataclass
class Files:
    """What is known of files, and of what a model is given of them.

    labels: number of rows per label, of the rows that were read.
    sample: files with their labels, evenly drawn.
    headers: sizes of files of the sample.
    reading: seconds to decode a file and bring it to the size of the model.
    """

    given: Given
    plural: str
    format: str = ""
    rows: int = 0
    many: bool = False
    labels: dict[str, int] = field(default_factory=dict)
    sample: list[tuple[MediaRef, list[str]]] = field(default_factory=list, repr=False)
    headers: list[Any] = field(default_factory=list, repr=False)
    reading: float = 0.0
    remarks: list[str] = field(default_factory=list)
    estimated: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        """Positions of the files of the sample."""
        return np.asarray([self.given.positions(header) for header in self.headers], dtype=np.int64)

    def write_sample(self, folder: Path, seconds: float) -> Path:
        """Write files of the sample, as they are, into a folder with metadata.jsonl, for training on them alone.

        Args:
            seconds: that decoding all of them may take.
        """
        most = max(LEAST_KEPT, int(seconds / max(1e-9, self.reading)))
        folder.mkdir(parents=True)
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as rows:
            for number, (ref, labels) in enumerate(self.sample[:most]):
                name = f"{number:05}{PurePosixPath(ref.member or ref.path).suffix.lower() or '.bin'}"
                try:
                    (folder / name).write_bytes(ref.read())
                except Unreadable:
                    continue
                row = {"file_name": name} | ({"labels": labels} if self.many else {"label": labels[0]})
                rows.write(json.dumps(row) + "\n")
        return folder


def task_of(data: Data, wanted: str | None) -> Task | None:
    """The task of data whose examples are files; None where they are texts.

    Args:
        wanted: the task that is set.

    Raises:
        UserError: a task whose memory and time are not predicted.
    """
    source, found = data.train[0].path, None if wanted is None else TASKS.get(wanted)
    if wanted is None and is_local(source):
        found = _detected(source, data)
    if found is None or not (found.rows.kind or found.model.sees_images):
        kinds = [task.rows.kind for task in TASKS.values() if task.rows.kind]
        if (kind := next((kind for kind in kinds if holds(source, kind)), None)) is not None:
            raise UserError(f"--data: {source} contains {kind.plural}, which are not for task {wanted}; remove --task")
        return None
    if not found.model.has_predicted_costs:
        raise UserError(
            f"--task: {found.name}: memory and time are not predicted: {found.model.costs_unknown}; measure instead: `hfstrat "
            "compare` with --budget trains strategies side by side on your data"
        )
    return found


def _detected(source: str, data: Data) -> Task | None:
    """The task whose first rows these are."""
    kind = next((task.rows for task in TASKS.values() if task.rows.kind and holds(source, task.rows.kind)), None)
    if kind is not None and isinstance(kind, MediaRows):
        rows = list(itertools.islice(kind.opens.open(data.train[0], data, "--data").rows(), HEAD_ROWS))
        return task_of_rows(rows, source, data=data)
    try:
        files = local_files(source, "--data")
        return task_of_rows(read_head(files[0]), source, data=data) if files else None
    except UserError:  # the reader of texts reports it
        return None


def processor_of(folder: Path | None, name: str) -> dict[str, Any]:
    """The preprocessor_config.json of a model; empty where there is none."""
    if folder is not None and (folder / PROCESSOR).is_file():
        return read_json(folder / PROCESSOR)
    if Path(name).expanduser().exists():
        return {}
    try:
        from huggingface_hub import hf_hub_download

        return read_json(Path(hf_hub_download(name, PROCESSOR)))
    except Exception:  # the transport fails in many ways; the family's own size is assumed
        return {}


def look(data: Data, task: Task, given: Given, proposes: bool = True) -> Files:
    """Read the labels of all rows, the headers of a sample, and decode a few files. Raises UserError as training does.

    Args:
        proposes: whether a size of the model's inputs may be proposed that no recipe sets.
    """
    assert isinstance(task.rows, MediaRows)
    source = task.rows.opens.open(data.train[0], data, "--data")
    source.detect = task.rows.reader
    found, stats = Files(given, task.rows.kind.plural), Statistics(source.source.path, warnings=[])
    _read_rows(source, found, stats)
    _read_headers(found, stats, task.rows.kind)
    if proposes:
        found.given = given.fitted(found.headers)
    found.remarks = [*stats.remarks(), *_few(found)]
    return found


def _read_rows(source: MediaSource, found: Files, stats: Statistics) -> None:
    """Labels and the sample."""
    rows, reading = source.read()
    total = _count(source)
    step = max(1, -(-total // MOST_READ))
    counts, draw = Counter[str](), np.random.default_rng(0)
    stream, count = itertools.islice(rows, 0, None, step), 0
    for number, row in enumerate(itertools.islice(stream, MOST_READ)):
        example = example_of(row, reading, number * step)
        counts.update(example.labels)
        count += 1
        most = KEPT if example.file.data is None else KEPT_OF_TABLES
        place = int(draw.integers(0, count))
        if len(found.sample) < most:
            found.sample.append((example.file, example.labels))
        elif place < most:
            found.sample[place] = (example.file, example.labels)
    if not count:
        raise UserError(f"{source.source.path}: it has no rows; expected at least one")
    found.sample = [found.sample[place] for place in draw.permutation(len(found.sample))]
    beyond = sum(1 for _ in stream)
    found.rows = total if step > 1 else count + beyond
    if found.rows > count:
        found.estimated.append(f"the number of {found.plural} of each class, from {count:,} of {found.rows:,}")
    found.labels = {name: round(number * found.rows / count) for name, number in counts.most_common()}
    found.many, found.format = reading.many, reading.kind
    stats.rows_read, stats.warnings = found.rows, [*stats.warnings, *reading.remarks, *source.remarks()]


def _count(source: MediaSource) -> int:
    """The number of rows, so that an even part of them is read; a table of another format than Parquet is read for it."""
    if source.layout is not None:
        return len(source.layout.names)
    if source.paths:
        return len(source.paths)
    if source.files and all(file.suffix == ".parquet" for file in source.files):
        import pyarrow.parquet

        return sum(pyarrow.parquet.ParquetFile(file).metadata.num_rows for file in source.files)
    return sum(1 for _ in source.rows())


def _read_headers(found: Files, stats: Statistics, kind: Any) -> None:
    """Sizes of files, and the seconds that decoding takes."""
    chosen, bad = found.sample[:: max(1, len(found.sample) // HEADERS)][:HEADERS], list[str]()
    for ref, _ in chosen:
        try:
            found.headers.append(found.given.header(ref))
        except Unreadable as error:
            bad.append(f"{ref.name}: {error}")
    stats.rows_read = len(chosen)
    check_unreadable(stats, bad, kind)
    if len(chosen) < found.rows:
        found.estimated.append(f"sizes, from {len(chosen):,} {found.plural}")
    seconds, began = list[float](), time.monotonic()
    for ref, _ in chosen[:DECODED]:
        started = time.monotonic()
        try:
            found.given.decode(ref)
        except Unreadable:
            continue
        seconds.append(time.monotonic() - started)
        if time.monotonic() - began > DECODE_SECONDS and len(seconds) > 1:
            break
    found.reading = statistics.median(seconds[1:] or seconds or [0.0])  # the first one imports the decoder


def _few(found: Files) -> list[str]:
    few = [name for name, count in found.labels.items() if count < FEW]
    named = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
    return [f"warning: fewer than {FEW} {found.plural} of {named}; its scores will be mostly chance"] if few else []
