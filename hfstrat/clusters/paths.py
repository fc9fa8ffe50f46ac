"""Which values of a recipe are files of this machine."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.recipe import yaml
from hfstrat.recipe.load import apply_override

KEYS = {
    *("adapter", "choices", "data", "eval", "include_path", "model", "model_class", "name_or_path", "path", "teacher"),
    *("tokenizer", "train"),
}
"""Keys whose values may be paths. A test holds that every text of the schema is here, below, or named there as no path."""
WORDS = {"chat_template", "control", "lm_eval", "name", "resume_from_checkpoint", "rewards", "template"}
"""Keys whose values are words, such as `chat` or `auto`, or paths: only what can be nothing else is a path."""
LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # folders that machines hardly ever share
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".gguf", ".jinja", ".py", ".yaml", ".yml")


class Place(NamedTuple):
    """A value of the recipe: its dotted key, the value, and its path without `:function`."""

    key: str
    value: str
    path: Path

    @property
    def is_here(self) -> bool:
        return self.path.exists() or (glob.has_magic(str(self.path)) and bool(glob.glob(str(self.path), recursive=True)))

    @property
    def looks_local(self) -> bool:
        """Whether the value can only be a path."""
        return self.value.startswith(("/", "~", "./", "../")) or str(self.path).endswith(SUFFIXES)

    @property
    def is_private(self) -> bool:
        """Whether it is in a folder that belongs to this machine alone."""
        return any(self.path.absolute().is_relative_to(folder) for folder in LOCAL)


def raw(source: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The recipe as it was written, with its overrides."""
    data: dict[str, Any] = yaml.parse(yaml.read(source), source)[0]
    for each in overrides:
        apply_override(each, data, {})
    return data


def places(data: Any, key: str = "") -> Iterator[Place]:
    """The values that may be paths, in a recipe or a part of it."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from places(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for value in data:
            yield from places(value, key)
    elif isinstance(data, str):
        place, name = Place(key, data, Path(_without_name(data)).expanduser()), key.rpartition(".")[2]
        if name in KEYS or (name in WORDS and place.looks_local):
            yield place


def replaced(data: Any, new: dict[str, str], key: str = "") -> Any:
    """A recipe with other paths; `new` maps the values that `places` found."""
    if isinstance(data, dict):
        return {name: replaced(value, new, str(name)) for name, value in data.items()}
    if isinstance(data, list):
        return [replaced(value, new, key) for value in data]
    return new.get(data, data) if isinstance(data, str) and key in KEYS | WORDS else data


def remote_names(found: list[Place]) -> dict[str, str]:
    """A name below `files/` for each value, with its `:function`; equal file names get a number."""
    names: dict[str, str] = {}
    for place in found:
        if place.value in names:
            continue
        folder = glob_root(place.path)
        name = folder.resolve().name.replace(" ", "_").replace(":", "_") or "root"
        taken = {value.split("/")[1] for value in names.values()}
        number = next(n for n in range(len(found) + 1) if (f"{n}-{name}" if n else name) not in taken)
        rest = str(place.path.relative_to(folder)) if folder != place.path else ""
        path = "/".join(part for part in ("files", f"{number}-{name}" if number else name, rest) if part and part != ".")
        names[place.value] = path + place.value[len(_without_name(place.value)) :]
    return names


def glob_root(path: Path) -> Path:
    """The file or folder to copy: for a pattern, the folder above its first wildcard."""
    if path.exists() or not glob.has_magic(str(path)):
        return path
    parts = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _without_name(value: str) -> str:
    """`file.py` of `file.py:function`."""
    file, sign, name = value.rpartition(":")
    return file if sign and file.endswith(".py") and name.isidentifier() else value
