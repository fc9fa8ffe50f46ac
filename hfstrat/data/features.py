"""Names of classes that `datasets` stores with its files: in the schema of Parquet and Arrow, and in saved folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hfstrat.data import readers
from hfstrat.errors import UserError

INFO = "dataset_info.json"  # of a saved folder


def class_names(files: Iterable[Path]) -> dict[str, list[str]]:
    """The names of label ids by column, equal in all files that have some.

    Raises:
        UserError: two files have different names for one column.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        for column, names in _names_of(file).items():
            if found.setdefault(column, names) != names:
                raise UserError(
                    f"{file}: the class names of '{column}' are {', '.join(names)}, in another file "
                    f"{', '.join(found[column])}; train on each file as a source of its own, with names instead of numbers"
                )
    return found


def _names_of(file: Path) -> dict[str, list[str]]:
    if readers.file_kind(file) not in ("parquet", "arrow"):
        return {}
    try:
        stored = json.loads((readers.table_schema(file).metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        stored = {}
    features = (stored.get("info") or {}).get("features") if isinstance(stored, dict) else None
    return of_features(features or _of_folder(file.parent))


def _of_folder(folder: Path) -> Any:
    try:
        stored = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored.get("features") if isinstance(stored, dict) else {}


OBJECTS = "objects"  # a column of boxes with their classes


def of_objects(files: Iterable[Path]) -> dict[str, list[str]]:
    """The names of class numbers within `objects`, by their key, in the first file that has some."""
    for file in files:
        if readers.file_kind(file) in ("parquet", "arrow"):
            try:
                stored = json.loads((readers.table_schema(file).metadata or {}).get(b"huggingface", b"{}"))
            except ValueError:
                continue
            if found := within(((stored.get("info") or {}).get("features") or {}) if isinstance(stored, dict) else {}):
                return found
    return {}


def within(features: Any) -> dict[str, list[str]]:
    """The names of class numbers within `objects`: a dict of lists, or a list of dicts."""
    inner = features.get(OBJECTS) if isinstance(features, Mapping) else None
    inner = inner[0] if isinstance(inner, list) and inner else inner
    inner = _get(inner, "feature") or inner
    return of_features(inner) if isinstance(inner, Mapping) else {}


def of_features(features: Any) -> dict[str, list[str]]:
    """The names of each column of class labels, or of lists of them.

    Args:
        features: as `datasets` writes them to JSON, or its `Features`.
    """
    found = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = _get(inner, "feature") or inner  # of a list of labels
        names = _get(inner, "names")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = list(names)
    return found


def _get(feature: Any, key: str) -> Any:
    return feature.get(key) if isinstance(feature, Mapping) else getattr(feature, key, None)
