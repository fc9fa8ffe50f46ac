"""What is compared: recipes that share data, evaluation and budget, each checked before anything runs.

Also the budget of a run, the recipes proposed for strategies that are only named, and the fingerprint of a run, which decides
whether its result is still valid.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfstrat import __version__
from hfstrat.data import cache, readers, sources
from hfstrat.data.media_layout import holds
from hfstrat.errors import UserError
from hfstrat.models.fingerprint import LIBRARIES, installed
from hfstrat.models.load import read_json
from hfstrat.models.parameter_names import config_size
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import Loaded, load_data, load_recipe
from hfstrat.recipe.schema import STRATEGIES
from hfstrat.recipe.section import seconds
from hfstrat.recipe.stored import flat
from hfstrat.run import preflight
from hfstrat.strategies import defaults
from hfstrat.strategies.description import Footprint
from hfstrat.tasks import TASKS, AudioClassification, CausalLM, ImageClassification, task_of_rows

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
NO_LIMIT = ["training.num_train_epochs=null", "training.max_steps=null", "training.max_time=null"]
MODEL_KEYS = ("name_or_path", "tokenizer", "adapter", "model_class")  # keys whose value may be a local model
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.gguf", "*.py")
RESERVED = ("seed", "output_dir", "data.eval_seed", "training.max_steps", "training.max_time", "training.num_train_epochs")
OPTIONS = {"model.name_or_path: ": "--model: ", "data.train: ": "--data: ", "data: ": "--data: "}
HELD_OUT = 0.2  # of the examples (at most 1,000): more than for a single run, because differences are to be measured
LONGEST = 1024
UNKNOWN_DEPTH = 6  # blocks, where there is no config; the checks then report why


@dataclass(frozen=True)
class Budget:
    """What each run may spend: seconds of training, unpadded training tokens, or optimizer steps."""

    kind: str  # time, tokens or steps
    amount: float
    text: str  # as given

    def overrides(self, steps: int | None = None) -> list[str]:
        """The overrides that make a recipe spend it; a budget of tokens needs its number of `steps` (None: 1, for checks)."""
        if self.kind == "time":
            return [*NO_LIMIT[:2], f"training.max_time={self.amount:g}s"]
        count = int(self.amount) if self.kind == "steps" else steps or 1
        return [*NO_LIMIT[::2], f"training.max_steps={count}"]


def parse_budget(text: str) -> Budget:
    """'10min', '2M-tokens' or '500-steps'. Raises UserError for anything else, and for an empty budget."""
    expected = "expected a time such as 10min, tokens such as 2M-tokens, or steps such as 500-steps"
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGB]?)[ -]?(token|step)s?", text.strip())
    if match is None:
        try:
            return Budget("time", seconds(text), text.strip())
        except ValueError:
            raise UserError(f"--budget: {text}: {expected}") from None
    amount = float(match[1]) * UNITS[match[2]]
    if amount < 1 or (match[3] == "step" and not amount.is_integer()):
        raise UserError(f"--budget: {text}: not a positive whole number of {match[3]}s; {expected}")
    return Budget(f"{match[3]}s", amount, text.strip())


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    recipes: files; alternatively recipes are proposed for `strategies`, `model` and `data`.
    overrides: for all recipes.
    timeout: seconds of one run.
    """

    recipes: list[str]
    overrides: list[str]
    model: str | None
    data: str | None
    strategies: str | None
    task: str | None
    budget: Budget
    seeds: int
    output: Path
    evaluate: str | None = None
    timeout: float | None = None
    retry: bool = False


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison.

    source: its file; a proposed recipe is written there before the first run.
    text: the content of a proposed recipe.
    overrides: of all its runs, without seed, steps and folder.
    loaded: with the budget, for the first seed.
    """

    label: str
    source: str
    text: str | None
    overrides: tuple[str, ...]
    loaded: Loaded
    footprint: Footprint | None
    at_once: bool = False  # all is computed once, and takes seconds: a solved head

    @property
    def strategy(self) -> str:
        return self.loaded.recipe.strategy.name


@dataclass(frozen=True)
class Lineup:
    """The recipes that are compared, the strategies that are excluded with the reason, and remarks."""

    entries: list[Entry]
    excluded: dict[str, str]
    remarks: list[str]

    def overrides(self, entry: Entry, index: int, budget: Budget, steps: int | None, folder: Path) -> list[str]:
        """The overrides of one run. Seeds count up from the first recipe's, which also draws the held-out examples of all."""
        recipe = self.entries[0].loaded.recipe
        own = [f"seed={recipe.seed + index}", f"output_dir={json.dumps(str(folder))}"]
        if recipe.data.eval is None and recipe.data.eval_split is None:
            own.append(f"data.eval_seed={recipe.data.drawn_by(recipe.seed)}")
        return [*entry.overrides, *budget.overrides(steps), *own]

    def seed(self, index: int) -> int:
        return self.entries[0].loaded.recipe.seed + index


def line_up(request: Request) -> Lineup:
    """Load and check every recipe; writes nothing.

    Raises:
        UserError: a mistake in a recipe, recipes that do not share their data or their budget, or nothing to compare.
    """
    for override in request.overrides:
        if (key := override.partition("=")[0].strip()) in RESERVED:
            raise UserError(f"{override}: {key} is set by the comparison (--budget, --seeds, --output); remove it")
    lineup = _from_files(request) if request.recipes else _from_names(request)
    check_comparable(lineup.entries, request.budget)
    return lineup


def _from_files(request: Request) -> Lineup:
    for option in ("model", "data", "strategies", "task"):
        if getattr(request, option) is not None:
            raise UserError(f"--{option}: recipes already set it; give either recipes, or --model and --data")
    return Lineup([_entry(label, file, None, request) for label, file in labels(request.recipes).items()], {}, [])


def labels(files: Iterable[str]) -> dict[str, str]:
    """A short label for each recipe file: its name, with as many parent folders as needed to be unique.

    Raises:
        UserError: the same file twice.
    """
    files = list(files)
    paths = [Path(file).expanduser().absolute().with_suffix("").parts[1:] for file in files]
    if duplicate := next((file for file, path in zip(files, paths, strict=True) if paths.count(path) > 1), None):
        raise UserError(f"{duplicate}: given twice; each recipe already runs with several seeds (--seeds)")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {re.sub(r"[^\w.-]+", "-", "-".join(path[-depth:])): file for file, path in zip(files, paths, strict=True)}


def _from_names(request: Request) -> Lineup:
    """One proposed recipe per strategy. Without --strategies, impossible ones are excluded."""
    if not request.model or not request.data:
        raise UserError("compare: nothing to compare: give recipes, or --model and --data (and --strategies)")
    names = list(defaults.ORDER) if request.strategies is None else defaults.parse_names(request.strategies)
    task, how = task_of(request.data, request.task, request.overrides)
    found, errors = list[Entry](), dict[str, UserError]()
    for name in names:
        try:
            text = propose(name, task, request.model, request.data)
            found.append(_entry(name, str(request.output / "recipes" / f"{name}.yaml"), text, request))
        except UserError as error:
            if request.strategies is not None:
                raise
            errors[name] = error
    if not found:
        raise next(iter(errors.values()))
    return Lineup(
        found, {name: str(error).removeprefix(f"{name}: ") for name, error in errors.items()}, [f"task: {task} ({how})"]
    )


def task_of(data: str, wanted: str | None, overrides: Iterable[str] = ()) -> tuple[str, str]:
    """The task, and how it was chosen.

    Args:
        overrides: of all recipes; those of `data` say how the rows are read.

    Raises:
        UserError: no such task, or data that cannot be read.
    """
    if wanted is not None:
        if wanted not in TASKS:
            raise UserError(f"--task: {wanted}: no such task; expected one of {', '.join(TASKS)}")
        return wanted, "set by --task"
    for task in (ImageClassification, AudioClassification):
        if holds(data, task.rows.kind):
            return task.name, f"detected from its {task.rows.kind.plural}; set --task to change it"
    files = sources.local_files(data, "--data")
    if not files:
        return CausalLM.name, "not detected for a dataset of the Hub; set --task to change it"
    try:
        found = task_of_rows(readers.read_head(files[0]), data, data=load_data(data, overrides).recipe.data)
    except UserError:  # the checks of the recipes report it
        found = TASKS[CausalLM.name]
    return found.name, "detected from the columns; set --task to change it"


def propose(name: str, task: str, model: str, data: str) -> str:
    """A recipe for a strategy as YAML.

    Raises:
        UserError: the strategy is impossible with this model; the message begins with the strategy.
    """
    config = _config(model)
    architecture, width = str((config.get("architectures") or [""])[0]), config_size(config, "width")
    about = defaults.ModelFacts(task, model, config_size(config, "layers") or UNKNOWN_DEPTH, width, architecture)
    rate = defaults.learning_rate(name, 0 if STRATEGIES[name].random_weights else width)
    context = config_size(config, "context") or LONGEST
    room = context - 2 if "roberta" in str(config.get("model_type")) else context  # RoBERTa reserves two positions
    overflow = {"overflow": "split"} if TASKS[task].text.generates else {}  # as advise proposes it: no text is lost
    recipe = {
        "task": task,
        "model": model,
        "strategy": {"name": name, **defaults.section(name, about)},
        "data": {"train": data, "eval_size": HELD_OUT, "max_length": max(8, min(LONGEST, room)), **overflow},
        **({"training": {"learning_rate": rate}} if rate is not None else {}),
        "output_dir": f"runs/{name}",
    }
    return defaults.recipe_text(f"{name}, as proposed by `hfstrat compare`; edit it as needed.", recipe)


def _config(model: str) -> dict[str, Any]:
    """The config.json of a model, local or from the Hub; empty if it is unavailable (the checks then report why)."""
    folder = Path(model).expanduser()
    if folder.exists():
        return read_json(folder / "config.json")
    try:
        from huggingface_hub import hf_hub_download

        return read_json(Path(hf_hub_download(model, "config.json")))
    except Exception:  # the transport fails in many ways
        return {}


def _entry(label: str, file: str, text: str | None, request: Request) -> Entry:
    """The recipe with what all runs of a comparison share."""
    overrides = [*request.overrides, "hub.push_to_hub=false", "training.resume_from_checkpoint=never"]
    evaluation = f"data.eval={json.dumps(request.evaluate)}"
    if request.evaluate is not None:
        overrides += [evaluation, "data.eval_split=null"]
    spent, folder = request.budget.overrides(), f"output_dir={json.dumps(str(request.output / label / 'seed'))}"
    try:
        overrides += load_recipe(file, [*overrides, *spent], text).recipe.strategy.single_run
        loaded = load_recipe(file, [*overrides, *spent, folder], text)
        check_not_streamed(loaded.recipe.data)
        description = preflight.check(loaded, overwrite=True)
    except UserError as error:
        message = _as_option(str(error), file, label) if text is not None else str(error)
        raise UserError(message.replace(f"command line: {evaluation}: data.eval: ", "--evaluate: ", 1)) from None
    solved = bool(description and description.body_once) and not TASKS[loaded.recipe.task].text.generates
    return Entry(label, file, text, tuple(overrides), loaded, description and description.footprint, solved)


def changed(entry: Entry, request: Request, overrides: Iterable[str]) -> Entry:
    """An entry with further settings, checked again. Raises UserError."""
    return _entry(entry.label, entry.source, entry.text, replace(request, overrides=[*request.overrides, *overrides]))


def check_not_streamed(data: Data) -> None:
    """Raises UserError for data that are read while training: runs are compared on the same examples, whose number is known."""
    if data.streaming:
        raise UserError(
            "data.streaming: true: runs are compared, searched and predicted for data that are read completely; set it to "
            "false, with a part of the rows in a file of its own"
        )


def _as_option(message: str, file: str, label: str) -> str:
    """A mistake in a proposed recipe, reported at the option that it comes from."""
    message = re.sub(rf"^{re.escape(file)}(:\d+)?: ", "", message)
    for key, option in OPTIONS.items():
        if message.startswith(key):
            return option + message.removeprefix(key)
    return message if message.startswith("command line") else f"{label}: {message}"


def check_comparable(entries: list[Entry], budget: Budget) -> None:
    """Check that all recipes use the same data and spend the same budget.

    Raises:
        UserError: the first key that differs.
    """
    if not entries:
        raise UserError("compare: nothing to compare")
    first, *others = entries
    for other in others:
        one, two = _data_keys(first.loaded), _data_keys(other.loaded)
        if differing := sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)):
            key = differing[0]
            raise UserError(
                f"{key}: {one.get(key)!r} in {first.label}, {two.get(key)!r} in {other.label}; a comparison needs the same "
                f"data: make them equal, or add {key}=... for all of them"
            )
    batches = {entry.label: entry.loaded.recipe.training for entry in entries}
    sizes = {
        label: f"{one.global_batch_tokens:,} tokens" if one.global_batch_tokens else str(one.global_batch_size)
        for label, one in batches.items()
    }
    if budget.kind == "steps" and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{size} in {label}" for label, size in sizes.items())
        raise UserError(
            f"training.global_batch_size: {listed}; the same number of steps is then not the same budget: add "
            "training.global_batch_size=... for all of them, or give a budget of time or tokens"
        )


def _data_keys(loaded: Loaded) -> dict[str, Any]:
    """The keys that decide which examples are trained on and evaluated, and how they are read."""
    recipe = loaded.recipe
    data = flat(recipe.data.model_dump(), "data")
    data.pop("data.eval_seed", None)  # that of the first recipe is used for all
    return {
        "task": recipe.task,
        "objective": recipe.objective.measured,
        "evaluation.max_rows": recipe.evaluation.max_rows,
        **data,
    }


def fingerprint(loaded: Loaded, budget: Budget) -> str:
    """SHA-256 of everything that the result of a run depends on; `loaded` has the seed of the run.

    A budget of tokens is hashed as such and not as steps, which follow from the rest.
    """
    recipe = loaded.recipe.model_dump()
    for key in ("output_dir", "hub"):
        recipe.pop(key)
    for key in ("max_steps", "max_time", "num_train_epochs"):
        recipe["training"].pop(key)
    inputs = {
        "recipe": recipe,
        "budget": [budget.kind, budget.amount],
        "data": _data_digests(loaded),
        "models": {path: _file_stamps(path) for path in sorted(_model_paths(recipe))},
        "code": loaded.recipe.objective.code(),
        "version": __version__,
        "libraries": {name: installed(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _data_digests(loaded: Loaded) -> dict[str, Any]:
    """Hashes of the local sources; a dataset of the Hub is covered by the recipe."""
    data = loaded.recipe.data
    found: dict[str, Any] = {}
    for key, listed in (("data.train", data.train), ("data.eval", data.eval or [])):
        for source in listed:
            splits = sources.splits_of(source, data, key)[1]
            if digest := TASKS[loaded.recipe.task].rows.digest(source, data, key):
                found[f"{key} {source.path}"] = digest
                continue
            files = sources.local_files(source.path, key, splits)
            found[f"{key} {source.path}"] = _digest(tuple((file, file.stat().st_mtime_ns) for file in files or []))
    return found


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int], ...]) -> str:
    """The hash of files with their modification times; cached, because all recipes of a comparison share them."""
    return cache.digest_of(*(file for file, _ in files))


def _model_paths(tree: Any, key: str = "") -> set[str]:
    """Every local model, tokenizer, teacher, adapter or class named in a recipe."""
    if isinstance(tree, dict):
        return {path for name, value in tree.items() for path in _model_paths(value, name)}
    if key not in MODEL_KEYS or not isinstance(tree, str) or not tree:
        return set()
    path = tree.rpartition(":")[0] if key == "model_class" else tree
    return {path} if Path(path).expanduser().exists() else set()


def _file_stamps(path: str) -> list[Any]:
    """Sizes and times of the files of a model; hashing gigabytes of weights would take too long."""
    folder = Path(path).expanduser()
    files = [folder] if folder.is_file() else sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
