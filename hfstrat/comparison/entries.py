"""What every run of a comparison may spend: a time, real tokens, or optimiser steps.

What makes two runs the same run: the resolved recipe, the bytes of data and model, the versions.

What is compared: recipes that share rows, evaluation and budget, each looked at before anything runs."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfstrat import __version__
from hfstrat.comparison import proposals
from hfstrat.data import cache, sources
from hfstrat.errors import UserError
from hfstrat.models.fingerprint import LIBRARIES, installed
from hfstrat.recipe.changes import flat
from hfstrat.recipe.load import Loaded, load_recipe
from hfstrat.recipe.section import seconds
from hfstrat.run import preflight
from hfstrat.strategies.base import Footprint

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


FREE = ["training.num_train_epochs=null", "training.max_steps=null", "training.max_time=null"]


@dataclass(frozen=True)
class Budget:
    """`amount` is seconds of training, real (unpadded) tokens that are trained on, or optimiser steps."""

    kind: str  # time, tokens or steps
    amount: float
    text: str  # as it was given

    def words(self, steps: int | None = None) -> list[str]:
        """The overrides of a recipe that spends it; of tokens the `steps` that they are enough for (1 to look at it)."""
        if self.kind == "time":
            return [*FREE[:2], f"training.max_time={self.amount:g}s"]
        count = int(self.amount) if self.kind == "steps" else steps or 1
        return [*FREE[::2], f"training.max_steps={count}"]


def parse(text: str) -> Budget:
    """'10min', '2M-tokens' or '500-steps'.

    Raises:
        UserError: anything else, or nothing to spend.
    """
    wanted = "expected a time such as 10min, tokens such as 2M-tokens, or steps such as 500-steps"
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGB]?)[ -]?(token|step)s?", text.strip())
    if match is None:
        try:
            return Budget("time", seconds(text), text.strip())
        except ValueError:
            raise UserError(f"--budget: {text}: {wanted}") from None
    amount = float(match[1]) * UNITS[match[2]]
    if amount < 1 or (match[3] == "step" and not amount.is_integer()):
        raise UserError(f"--budget: {text}: not one whole {match[3]}; {wanted}")
    return Budget(f"{match[3]}s", amount, text.strip())


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


DECIDED = ("seed", "output_dir", "data.eval_seed", "training.max_steps", "training.max_time", "training.num_train_epochs")


OPTIONS = {"model.name_or_path: ": "--model: ", "data.train: ": "--data: ", "data: ": "--data: "}


@dataclass(frozen=True)
class Asked:
    """What the user asked for, as it was written.

    `words` are overrides for all recipes; the recipes are files, or made for `strategies` from `model` and `data`.
    """

    recipes: list[str]
    words: list[str]
    model: str | None
    data: str | None
    strategies: str | None
    task: str | None
    budget: Budget
    seeds: int
    output: Path
    evaluate: str | None = None
    timeout: float | None = None  # seconds of one run
    retry: bool = False


@dataclass(frozen=True)
class Entry:
    """One recipe in a comparison; `words` are the overrides of all its runs but for seed, steps and folder."""

    label: str
    source: str  # the recipe's file; one that was made here is written there before the first run
    text: str | None  # of a recipe that was made here
    words: tuple[str, ...]
    loaded: Loaded  # with the budget, for the first seed
    footprint: Footprint | None

    @property
    def strategy(self) -> str:
        return self.loaded.recipe.strategy.name


@dataclass(frozen=True)
class Line:
    """What is compared, and what was left out with the reason."""

    entries: list[Entry]
    left_out: dict[str, str]
    remarks: list[str]

    def words(self, entry: Entry, index: int, budget: Budget, steps: int | None, folder: Path) -> list[str]:
        """The overrides of one run: seeds count up from the first recipe's, whose rows are held out in all."""
        recipe = self.entries[0].loaded.recipe
        own = [f"seed={recipe.seed + index}", f"output_dir={json.dumps(str(folder))}"]
        if recipe.data.eval is None and recipe.data.eval_split is None:
            own.append(f"data.eval_seed={recipe.data.drawn_by(recipe.seed)}")
        return [*entry.words, *budget.words(steps), *own]

    def seed(self, index: int) -> int:
        return self.entries[0].loaded.recipe.seed + index


def line_up(asked: Asked) -> Line:
    """Load and check every recipe. Nothing is written.

    Raises:
        UserError: a mistake in one of them, recipes that do not share their rows or their budget, nothing to compare.
    """
    for word in asked.words:
        if (key := word.partition("=")[0].strip()) in DECIDED:
            raise UserError(f"{word}: the comparison decides {key}: see --budget, --seeds and --output; remove it")
    entries, left_out, remarks = (_of_files if asked.recipes else _of_names)(asked)
    check_same(entries, asked.budget)
    return Line(entries, left_out, remarks)


def _of_files(asked: Asked) -> tuple[list[Entry], dict[str, str], list[str]]:
    named = {key: getattr(asked, key) for key in ("model", "data", "strategies", "task") if getattr(asked, key) is not None}
    if named:
        raise UserError(f"--{next(iter(named))}: recipes say that themselves; give recipes, or --model and --data")
    return [_entry(label, file, None, asked) for label, file in labels(asked.recipes).items()], {}, []


def labels(files: Iterable[str]) -> dict[str, str]:
    """A short name for each recipe file: its own, with as many folders before it as tell it from the others.

    Raises:
        UserError: a file that is named twice.
    """
    files = list(files)
    paths = [Path(file).expanduser().absolute().with_suffix("").parts[1:] for file in files]
    if twice := next((file for file, path in zip(files, paths, strict=True) if paths.count(path) > 1), None):
        raise UserError(f"{twice}: given twice; each recipe runs with several seeds already")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {re.sub(r"[^\w.-]+", "-", "-".join(path[-depth:])): file for file, path in zip(files, paths, strict=True)}


def _of_names(asked: Asked) -> tuple[list[Entry], dict[str, str], list[str]]:
    """One recipe a strategy. One that was not asked for by name, and cannot be, is left out."""
    if not asked.model or not asked.data:
        raise UserError("compare: nothing to compare: give recipes, or --model and --data with --strategies")
    names, by_name = proposals.strategies(asked.strategies)
    task, told = proposals.task_of(asked.data, asked.task)
    found, left_out, first = list[Entry](), dict[str, str](), None
    for name in names:
        try:
            text = proposals.recipe(name, task, asked.model, asked.data)
            found.append(_entry(name, str(asked.output / "recipes" / f"{name}.yaml"), text, asked))
        except UserError as error:
            if by_name:
                raise
            left_out[name], first = str(error).removeprefix(f"{name}: "), first or error
    if first and not found:
        raise first
    return found, left_out, [f"task: {task} ({told})"]


def _entry(label: str, file: str, text: str | None, asked: Asked) -> Entry:
    """The recipe with what all runs of a comparison share."""
    common = ["hub.push=false", "training.resume=never"]
    if asked.evaluate is not None:
        common += [_eval_word(asked), "data.eval_split=null"]
    words = [*asked.words, *common, *asked.budget.words()]
    try:
        loaded = load_recipe(file, words, text)
        if "baseline" in type(loaded.recipe.strategy).model_fields:  # a run to compare with is what is made here
            words.append("strategy.baseline=false")
        loaded = load_recipe(file, [*words, f"output_dir={json.dumps(str(asked.output / label / 'seed'))}"], text)
        footprint = preflight.check(loaded, overwrite=True)
    except UserError as error:
        message = _as_option(str(error), file, label) if text is not None else str(error)
        raise UserError(message.replace(_evaluated(asked), "--evaluate: ", 1)) from None
    kept = [word for word in words if word not in asked.budget.words()]
    return Entry(label, file, text, tuple(kept), loaded, footprint)


def _eval_word(asked: Asked) -> str:
    return f"data.eval={json.dumps(asked.evaluate)}"


def _evaluated(asked: Asked) -> str:
    """What a mistake in --evaluate begins with, as that is an override."""
    return f"command line: {_eval_word(asked)}: data.eval: "


def _as_option(message: str, file: str, label: str) -> str:
    """A mistake in a recipe that was made here, at the option that it came from."""
    message = re.sub(rf"^{re.escape(file)}(:\d+)?: ", "", message)
    for key, option in OPTIONS.items():
        if message.startswith(key):
            return option + message.removeprefix(key)
    return message if message.startswith("command line") else f"{label}: {message}"


def check_same(entries: list[Entry], budget: Budget) -> None:
    """Refuse recipes that would not be compared on the same rows, or that spend unlike budgets.

    Raises:
        UserError: the first key that differs.
    """
    if len(entries) < 1:
        raise UserError("compare: nothing to compare")
    first = entries[0]
    for other in entries[1:]:
        for key, ours, theirs in _differences(first.loaded, other.loaded):
            raise UserError(
                f"{key}: {first.label} has {ours!r}, {other.label} has {theirs!r}; a comparison is on the same rows: make them "
                f"equal, or give {key}=... for all of them"
            )
    sizes = {entry.label: entry.loaded.recipe.training.global_batch_size for entry in entries}
    if budget.kind == "steps" and len(set(sizes.values())) > 1:
        said = ", ".join(f"{label} {size}" for label, size in sizes.items())
        raise UserError(
            f"training.global_batch_size: {said}: as many steps are not the same budget; give training.global_batch_size=... "
            "for all of them, or a budget of time or tokens"
        )


def _differences(ours: Loaded, theirs: Loaded) -> Iterable[tuple[str, Any, Any]]:
    one, two = _of_rows(ours), _of_rows(theirs)
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            yield key, one.get(key), two.get(key)


def _of_rows(loaded: Loaded) -> dict[str, Any]:
    """What decides which rows are trained on and evaluated, and as what."""
    recipe = loaded.recipe
    data = flat(recipe.data.model_dump(), "data")
    data.pop("data.eval_seed", None)  # the first one's is everybody's
    return {"task": recipe.task, "evaluation.max_rows": recipe.evaluation.max_rows, **data}
