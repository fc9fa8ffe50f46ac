"""Where rows come from: local files, folders, globs and the Hub. The checks here need neither torch nor `datasets`.

Where rows come from: one source of a recipe, whose rows can be read again at any time."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data import cache, readers
from hfstrat.data.formats import Reading, read_as
from hfstrat.data.readers import KINDS, Row, kind_of
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source

if TYPE_CHECKING:
    from datasets import Dataset


SPLITS = {  # words in file names, and the split they mean
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


NO_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside the rows of a saved `datasets` folder


EVALUATION = ("validation", "test")  # which files of a folder that is named for evaluation are read, the first there are


def local_file(source: str, key: str) -> Path | None:
    """The one local file that `source` means, or None for a Hub id.

    Raises:
        UserError: a missing or empty file, a folder, or a suffix that is not read.
    """
    if Path(source).expanduser().is_dir():
        raise UserError(f"{key}: {source}: this is a folder; name a file in it")
    files = local_files(source, key)
    if files is None or len(files) == 1:
        return files[0] if files else None
    raise UserError(f"{key}: {source}: {len(files)} files; name one of them")


def local_files(source: str, key: str, splits: tuple[str, ...] = ("train",)) -> list[Path] | None:
    """The local files that `source` means, in the order of their names, or None for a Hub id.

    Where the files of a folder are named for splits (train.csv, test.csv), only those of the first of `splits` that is
    there are taken, so that a folder never mixes its test rows into the training rows.

    Raises:
        UserError: a missing or empty file, a suffix that is not read, a folder or a glob without files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [_checked(path, source, key)]
    if path.is_dir():
        return _in_folder(path, source, key, splits)
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{key}: {source}: no file matches; looked in {Path().resolve()}")
        return [_checked(file, str(file), key) for file in found]
    looks_local = source.startswith(("/", ".", "~")) or kind_of(path) is not None or source.count("/") > 1
    if not looks_local:
        return None
    folder = path.parent if path.parent.is_dir() else None
    near = get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1) if folder else []
    hint = f"did you mean {folder / near[0]}?" if folder and near else f"looked in {path.parent.resolve()}"
    raise UserError(f"{key}: {source}: no such file; {hint}")


def _checked(path: Path, source: str, key: str) -> Path:
    if kind_of(path) is None:
        raise UserError(f"{key}: {source}: files of this kind are not read; expected one of {', '.join(KINDS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {source}: the file is empty")
    return path


def _in_folder(folder: Path, source: str, key: str, splits: tuple[str, ...]) -> list[Path]:
    if (folder / "config.json").is_file() and (folder / "tokenizer_config.json").is_file() | any(folder.glob("*.safetensors")):
        raise UserError(f"{key}: {source}: this is a folder with a model; name a file or a folder with rows")
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and kind_of(p) and p.name not in NO_ROWS]
    if not files:
        raise UserError(f"{key}: {source}: this is a folder without rows; expected files such as {', '.join(KINDS)} in it")
    named = {file: split_of(file.name) for file in files}
    there = {split for split in named.values() if split}
    if there:
        wanted = next((split for split in splits if split in there), None)
        if wanted is None:
            raise UserError(
                f"{key}: {source}: the files in this folder are those of {', '.join(sorted(there))}, none is of {splits[0]}; "
                "name one of them"
            )
        files = [file for file, split in named.items() if split == wanted]
    return [_checked(file, str(file), key) for file in files]


def splits_of(source: Source, data: Data, key: str) -> tuple[str, tuple[str, ...]]:
    """Which split of a Hub data set to load, and the files of which splits of a folder to read, the first there are.

    Args:
        key: `data.eval` for rows to evaluate on; `data.eval_split` names those of the training sources.
    """
    asked = data.eval_split if key == "data.eval" and data.eval_split else source.split
    if asked is None and key == "data.eval":
        return data.split, EVALUATION
    asked = asked or data.split
    return asked, (SPLITS.get(asked, asked),)


def split_of(name: str) -> str | None:
    """The split that a file's name speaks of, if it does: `my-valid.csv` is of validation."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def check_split(source: str, key: str, split: str) -> None:
    """Refuse a split that a local file or folder cannot have; Hub data sets are asked when they are loaded.

    Raises:
        UserError: a slice or a sum of a local source, or a split of one file.
    """
    path = Path(source).expanduser()
    if split == "train" or not (path.exists() or glob.has_magic(source)):
        return
    if re.search(r"[\[+]", split):
        raise UserError(f"{key}: {split}: {source} is local, and parts of splits are taken of Hub data sets only; name files")
    if not path.is_dir():
        raise UserError(f"{key}: {split}: {source} has no splits; name another file")


def load_from_hub(source: str, key: str, config: str | None, split: str, revision: str | None) -> Dataset:
    """All rows of a Hub data set, memory-mapped from the cache of `datasets`.

    Raises:
        UserError: what cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}: {source} is neither a local file nor a data set that the Hub gives us ({first}); "
            "check the name, data.config, data.split, data.revision and your login"
        ) from error


TOKENS_PER_TEXT = 2  # an id and a label, of four bytes each, for every four bytes of text or so


PACKED = 3  # a compressed file, once it is text


@dataclass
class Origin:
    """One source: its rows can be read again at any time."""

    source: Source
    data: Data
    files: list[Path] | None
    hub: Dataset | None
    count: int = 0
    told: Callable[..., Any] = Reading.of  # how to read its rows, from the first of them
    part: str = "all"  # of each file, where a file is a document: all, head (to train on) or tail (held out)

    @classmethod
    def of(cls, source: Source, data: Data, key: str) -> Origin:
        split, of_files = splits_of(source, data, key)
        files = local_files(source.path, key, of_files)
        if files is not None:
            return cls(source, data, files, None)
        config, revision = data.of(source, "config"), data.of(source, "revision")
        return cls(source, data, None, load_from_hub(source.path, key, config, split, revision))

    def rows(self) -> Iterator[Row]:
        if self.hub is not None:
            return (readers.without_fill(row) for row in self.hub)
        if self.data.documents == "files":
            return (self._cut(readers.read_whole(file), file) for file in self.files or [])
        return itertools.chain.from_iterable(map(readers.read, self.files or []))

    @property
    def wanted(self) -> tuple[str, dict[str, str]]:
        """Format and columns that the recipe names."""
        return self.data.of(self.source, "format"), self.data.of(self.source, "columns")

    def read(self) -> tuple[Iterator[Row], Any]:
        return read_as(self.rows(), self.source.path, *self.wanted, self.told)

    def _cut(self, row: Row, file: Path) -> Row:
        """The document's part, cut behind the line that its last `eval_size` begins in."""
        if self.part == "all":
            return row
        text = row["text"]
        place = text.find("\n", int(len(text) * (1 - self.data.eval_size))) + 1
        if not text[:place].strip() or not text[place:].strip():
            raise UserError(
                f"data.eval_size: {file}: its last {self.data.eval_size:.0%} hold no whole line to hold out; "
                "name data.eval, or raise eval_size"
            )
        return {"text": text[:place] if self.part == "head" else text[place:]}

    def inputs(self) -> dict[str, Any]:
        """What its rows depend on, for a fingerprint."""
        return {
            "bytes": self.digest(),
            "kinds": [readers.kind_of(file) for file in self.files or []],
            "hub": self.identity(),
            "format": self.wanted[0],
            "columns": self.wanted[1],
            "part": [self.part, self.data.eval_size if self.part != "all" else None],
        }

    def predicted(self) -> int:
        """Bytes that the rows will take as tokens, roughly."""
        if self.hub is not None:
            return TOKENS_PER_TEXT * sum(Path(file["filename"]).stat().st_size for file in self.hub.cache_files)
        packed = {".gz": PACKED, ".parquet": PACKED}
        return TOKENS_PER_TEXT * sum(file.stat().st_size * packed.get(file.suffix, 1) for file in self.files or [])

    def identity(self) -> list[Any] | None:
        """Which data set of the Hub this is, if it is one."""
        if self.hub is None:
            return None
        asked = [self.data.of(self.source, name) for name in ("config", "revision")]
        return [self.source.path, *asked, str(self.hub.split), len(self.hub)]

    def digest(self) -> str:
        """Over the bytes that the rows come from."""
        if self.hub is None:
            return cache.digest_of(*(self.files or []))
        stored = [Path(file["filename"]) for file in self.hub.cache_files]
        if stored:
            return cache.digest_of(*stored)
        digest = hashlib.sha256()
        for row in self.hub:  # made in memory
            digest.update(json.dumps(row, default=str).encode())
        return digest.hexdigest()
