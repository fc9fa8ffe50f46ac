"""Where rows come from: local files, folders, globs and the Hub. The checks here need neither torch nor `datasets`."""

from __future__ import annotations

import glob
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.data.readers import KINDS, kind_of
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from hfstrat.data_section import Data, Source

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
