"""Sources of rows: local files, folders, globs and Hub data sets. Checking a source imports neither torch nor `datasets`."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data import cache, features, prose, readers
from hfstrat.data.formats import RowFormat
from hfstrat.data.readers import HEAD_ROWS, KINDS, file_kind
from hfstrat.data.values import ROWS_VERSION, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = {  # words in file names, and the split they mean
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
CHECKED_FILES = 20  # files of a source of which the first rows are looked at
METADATA_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # of a saved `datasets` folder: no rows
EVALUATION_SPLITS = ("validation", "test")  # of a folder given for evaluation: the first that is present is read
BYTES_PER_TEXT_BYTE = 2  # a token id and a label, of four bytes each, for about every four bytes of text
COMPRESSION = 3  # text bytes per byte of a compressed file, roughly


def local_file(source: str, key: str) -> Path | None:
    """The single local file that `source` names, or None for a Hub id.

    Raises:
        UserError: a missing or empty file, a folder, or an unsupported suffix.
    """
    if Path(source).expanduser().is_dir():
        raise UserError(f"{key}: {source} is a folder; name a file in it")
    files = local_files(source, key)
    if files is None or len(files) == 1:
        return files[0] if files else None
    raise UserError(f"{key}: {source}: {len(files)} files match; name one of them")


def is_local(source: str) -> bool:
    """Whether a source is files that are there."""
    return Path(source).expanduser().exists() or glob.has_magic(source)


def local_files(source: str, key: str, splits: tuple[str, ...] = ("train",)) -> list[Path] | None:
    """The local files that `source` names, sorted by name, or None for a Hub id.

    If the files of a folder are named by split (train.csv, test.csv), only those of the first of `splits` that is present are
    returned, so that test rows of a folder never mix with its training rows.

    Raises:
        UserError: a missing or empty file, an unsupported suffix, or a folder or glob without files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [_check_file(path, source, key)]
    if path.is_dir():
        return _folder_files(path, source, key, splits)
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{key}: {source}: no file matches; searched in {Path().resolve()}")
        return [_check_file(file, str(file), key) for file in found]
    looks_local = source.startswith(("/", ".", "~")) or file_kind(path) is not None or source.count("/") > 1
    if not looks_local:
        return None
    folder = path.parent if path.parent.is_dir() else None
    near = get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1) if folder else []
    hint = f"did you mean {folder / near[0]}?" if folder and near else f"searched in {path.parent.resolve()}"
    raise UserError(f"{key}: {source}: no such file; {hint}")


def _check_file(path: Path, source: str, key: str) -> Path:
    if file_kind(path) is None:
        raise UserError(f"{key}: {source}: unsupported file type; expected one of {', '.join(KINDS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {source}: the file is empty")
    return path


def _folder_files(folder: Path, source: str, key: str, splits: tuple[str, ...]) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():  # of `DatasetDict.save_to_disk`: a folder for each split
        return _folder_files(_split_folder(folder, source, key, splits), source, key, splits)
    if (folder / "config.json").is_file() and (folder / "tokenizer_config.json").is_file() | any(folder.glob("*.safetensors")):
        raise UserError(f"{key}: {source} is a model folder; name a file or a folder with rows")
    files = _saved_files(folder)
    if files is not None:
        return [_check_file(file, str(file), key) for file in files]
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and file_kind(p) and p.name not in METADATA_FILES]
    if not files:
        raise UserError(f"{key}: {source}: this folder contains no data files; expected files such as {', '.join(KINDS)}")
    named = {file: split_in_name(file.name) for file in files}
    present = {split for split in named.values() if split}
    if present:
        wanted = next((split for split in splits if split in present), None)
        if wanted is None:
            raise UserError(
                f"{key}: {source}: the files in this folder are named {', '.join(sorted(present))}, and none is named "
                f"{splits[0]}; name one of the files"
            )
        files = [file for file, split in named.items() if split == wanted]
    return [_check_file(file, str(file), key) for file in files]


def _split_folder(folder: Path, source: str, key: str, splits: tuple[str, ...]) -> Path:
    names = [p.name for p in sorted(folder.iterdir()) if (p / "state.json").is_file()]
    named = {name: SPLITS.get(name, name) for name in names}
    for wanted in splits:
        if found := next((name for name in names if wanted in (name, named[name])), None):
            return folder / found
    raise UserError(f"{key}: {source}: it has the splits {', '.join(names) or '(none)'}, and none is named {splits[0]}")


def _saved_files(folder: Path) -> list[Path] | None:
    """The files of a folder that `Dataset.save_to_disk` wrote (its cache may lie beside them); None for any other folder."""
    try:
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [folder / entry["filename"] for entry in listed] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def splits_of(source: Source, data: Data, key: str) -> tuple[str, tuple[str, ...]]:
    """The split of a Hub data set to load, and the splits whose files of a folder to read (the first that is present).

    Args:
        key: `data.eval` for evaluation rows; `data.eval_split` names a split of the training sources.
    """
    split = data.eval_split if key == "data.eval" and data.eval_split else source.split
    if split is None and key == "data.eval":
        return data.split, EVALUATION_SPLITS
    split = split or data.split
    return split, (SPLITS.get(split, split),)


def split_in_name(name: str) -> str | None:
    """The split that a file name contains, if any: `my-valid.csv` is of validation."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def check_split(source: str, key: str, split: str) -> None:
    """Refuse a split that a local file or folder cannot have; splits of Hub data sets are checked when they are loaded.

    Raises:
        UserError: a slice or a sum of splits of a local source, or a split of a single file.
    """
    path = Path(source).expanduser()
    if split == "train" or not (path.exists() or glob.has_magic(source)):
        return
    if re.search(r"[\[+]", split):
        raise UserError(f"{key}: {split}: {source} is local, and only Hub data sets have slices and sums of splits; name files")
    if not path.is_dir():
        raise UserError(f"{key}: {split}: {source} has no splits; name another file")


def load_from_hub(source: str, key: str, config: str | None, split: str, revision: str | None) -> Dataset:
    """All rows of a Hub data set, memory-mapped from the cache of `datasets`.

    Raises:
        UserError: the data set cannot be loaded.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}: {source} is neither a local file nor a data set that can be loaded from the Hub ({first}); "
            "check the name, data.config, data.split, data.revision and your login"
        ) from error


@dataclass
class DataSource:
    """One source of a recipe, opened: its rows can be read any number of times.

    Args:
        count: rows, once they have been read.
        detect: chooses how to read the rows, from the first of them.
        part: of each file, if a file is one document: all, head (to train on) or tail (held out).
        is_checked: whether its files have been found to be of one format.
    """

    source: Source
    data: Data
    files: list[Path] | None
    hub: Dataset | None
    count: int = 0
    detect: Callable[..., Any] = RowFormat.detect
    part: str = "all"
    is_checked: bool = False

    @classmethod
    def open(cls, source: Source, data: Data, key: str) -> DataSource:
        """The source, checked (local) or loaded (Hub)."""
        split, folder_splits = splits_of(source, data, key)
        files = local_files(source.path, key, folder_splits)
        if files is not None:
            return cls(source, data, files, None)
        config, revision = data.of(source, "config"), data.of(source, "revision")
        return cls(source, data, None, load_from_hub(source.path, key, config, split, revision))

    @property
    def wanted(self) -> tuple[str, dict[str, str]]:
        """Format and columns as the recipe sets them."""
        return self.data.of(self.source, "format"), self.data.of(self.source, "columns")

    def read(self) -> tuple[Iterator[Row], Any]:
        """The rows, and how to read them."""
        if len(self.files or []) > 1 and self.data.documents == "lines":
            self.check_files()
        return detect_format(self.rows(), self.source.path, *self.wanted, self.detect, self.class_names)

    def check_files(self) -> None:
        """Refuse files of different formats: all rows of a source are read in the way of the first ones."""
        if self.is_checked:
            return
        kinds: dict[str, Path] = {}
        for file in (self.files or [])[:CHECKED_FILES]:
            head = readers.read_head(file, skips=self.data.bad_rows == "skip")
            reading = self.detect(head, str(file), *self.wanted, self.class_names)
            kinds.setdefault(reading.kind, file)
        if len(kinds) > 1:
            listed = ", ".join(f"{file.name} ({kind})" for kind, file in kinds.items())
            raise UserError(f"{self.source.path}: its files have different formats: {listed}; name each as a source of its own")
        self.is_checked = True

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        """The names of label ids by column, if the source has some."""
        return features.class_names(self.files or []) if self.hub is None else features.of_features(self.hub.features)

    def remarks(self) -> list[str]:
        """What the text files look like, if that is something else than lines of which each is an example."""
        if self.data.documents == "files" or "documents" in self.data.model_fields_set:
            return []
        texts = [file for file in self.files or [] if readers.file_kind(file) == "text"]
        for file in texts[:CHECKED_FILES]:
            if why := prose.describe(readers.first_lines(file, prose.LINES)):
                return [
                    f"warning: {file.name} looks like one text ({why}), but each line that is not blank is an example; to "
                    "train on complete files set `data.documents: files` and `data.overflow: split` (`data.documents: lines` "
                    "confirms lines)"
                ]
        return []

    def rows(self) -> Iterator[Row]:
        if self.hub is not None:
            return (readers.drop_nulls(row) for row in self.hub)
        if self.data.documents == "files":
            return (self._part_of_document(readers.read_document(file), file) for file in self.files or [])
        return itertools.chain.from_iterable(map(readers.read, self.files or []))

    def _part_of_document(self, row: Row, file: Path) -> Row:
        """The part of a document, cut after the line in which its last `eval_size` begins."""
        if self.part == "all":
            return row
        text = row["text"]
        cut = text.find("\n", int(len(text) * (1 - self.data.eval_size))) + 1
        if not text[:cut].strip() or not text[cut:].strip():
            raise UserError(
                f"data.eval_size: {file}: the last {self.data.eval_size:.0%} contain no complete line to hold out; "
                "set data.eval, or raise data.eval_size"
            )
        return {"text": text[:cut] if self.part == "head" else text[cut:]}

    def fingerprint_inputs(self) -> dict[str, Any]:
        """Everything that its rows depend on."""
        return {
            "bytes": self.digest(),
            "kinds": [readers.file_kind(file) for file in self.files or []],
            "hub": self.hub_identity(),
            "format": self.wanted[0],
            "columns": self.wanted[1],
            "rows_version": ROWS_VERSION,
            "part": [self.part, self.data.eval_size if self.part != "all" else None],
        }

    def estimate_bytes(self) -> int:
        """Bytes that the tokenized rows will take, roughly."""
        if self.hub is not None:
            return BYTES_PER_TEXT_BYTE * sum(Path(file["filename"]).stat().st_size for file in self.hub.cache_files)
        compression = {".gz": COMPRESSION, ".parquet": COMPRESSION}
        return BYTES_PER_TEXT_BYTE * sum(file.stat().st_size * compression.get(file.suffix, 1) for file in self.files or [])

    def hub_identity(self) -> list[Any] | None:
        """Which Hub data set this is, if it is one."""
        if self.hub is None:
            return None
        options = [self.data.of(self.source, name) for name in ("config", "revision")]
        return [self.source.path, *options, str(self.hub.split), len(self.hub)]

    def digest(self) -> str:
        """SHA-256 over the bytes that the rows are read from."""
        if self.hub is None:
            return cache.digest_of(*(self.files or []))
        stored = [Path(file["filename"]) for file in self.hub.cache_files]
        if stored:
            return cache.digest_of(*stored)
        digest = hashlib.sha256()
        for row in self.hub:  # a data set in memory
            digest.update(json.dumps(row, default=str).encode())
        return digest.hexdigest()


def detect_format(
    rows: Iterable[Row],
    source: str,
    wanted: str,
    mapping: dict[str, str],
    detect: Callable[..., Any] = RowFormat.detect,
    class_names: dict[str, list[str]] | None = None,
) -> tuple[Iterator[Row], Any]:
    """All rows, and how to read them, which `detect` chooses from the first `HEAD_ROWS`. Raises UserError without rows."""
    rows = iter(rows)
    head = list(itertools.islice(rows, HEAD_ROWS))
    if not head:
        raise UserError(f"{source}: it has no rows; expected at least one")
    return itertools.chain(head, rows), detect(head, source, wanted, mapping, class_names)
