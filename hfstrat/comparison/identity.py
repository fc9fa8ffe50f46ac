"""What makes two runs the same run: the resolved recipe, the bytes of data and model, the versions."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from hfstrat import __version__
from hfstrat.comparison.budget import Budget
from hfstrat.data import cache, sources
from hfstrat.loading import Loaded
from hfstrat.report import LIBRARIES, installed

NAMING = ("name_or_path", "tokenizer", "adapter", "model_class")
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.gguf", "*.py")


def fingerprint(loaded: Loaded, budget: Budget) -> str:
    """SHA-256 over all that a run's result depends on; `loaded` is with the run's seed.

    A budget of tokens stands for itself, not for the steps that it is enough for: those follow from the rest.
    """
    recipe = loaded.recipe.model_dump()
    for key in ("output_dir", "hub"):
        recipe.pop(key)
    for key in ("max_steps", "max_time", "num_train_epochs"):
        recipe["training"].pop(key)
    inputs = {
        "recipe": recipe,
        "budget": [budget.kind, budget.amount],
        "data": _data(loaded),
        "models": {path: _stamps(path) for path in sorted(_paths(recipe))},
        "version": __version__,
        "libraries": {name: installed(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _data(loaded: Loaded) -> dict[str, Any]:
    """The bytes of each local source; a data set of the Hub is what the recipe says of it."""
    data = loaded.recipe.data
    found = {}
    for key, listed in (("data.train", data.train), ("data.eval", data.eval or [])):
        for source in listed:
            files = sources.local_files(source.path, key, sources.splits_of(source, data, key)[1])
            found[f"{key} {source.path}"] = _digest(tuple((file, file.stat().st_mtime_ns) for file in files or []))
    return found


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int], ...]) -> str:
    """Of files with their times: all recipes of a comparison have the same ones."""
    return cache.digest_of(*(file for file, _ in files))


def _paths(tree: Any, key: str = "") -> set[str]:
    """Every local model, tokenizer, teacher, adapter or class that a recipe names."""
    if isinstance(tree, dict):
        return {path for name, value in tree.items() for path in _paths(value, name)}
    if key not in NAMING or not isinstance(tree, str) or not tree:
        return set()
    path = tree.rpartition(":")[0] if key == "model_class" else tree
    return {path} if Path(path).expanduser().exists() else set()


def _stamps(path: str) -> list[Any]:
    """Sizes and times of a model's files: hashing gigabytes of weights would take longer than it saves."""
    folder = Path(path).expanduser()
    files = [folder] if folder.is_file() else sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
