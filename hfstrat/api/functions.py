"""train, evaluate, load, advise, compare and tune, as functions."""

from __future__ import annotations

import json
import time as time_module
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfstrat.api import inputs, measure
from hfstrat.api.run import GIVEN_ROWS, IN_CACHE, Run
from hfstrat.errors import RunError, UserError, quiet_libraries
from hfstrat.tasks import report
from hfstrat.trainer import signals

if TYPE_CHECKING:
    from hfstrat.recipe.load import Loaded
    from hfstrat.run.setup import Job

WAIT, PAUSE = 3600.0, 0.5  # seconds: for the first process to verify the result, and between two looks
HERE = "recipe"  # the name of a recipe that was given in Python, in messages


def train(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Any] = (),
    overwrite: bool = False,
    **overrides: Any,
) -> Run:
    """Train a model; the same call again returns the finished run, or resumes an interrupted one.

    Args:
        recipe: a recipe file, the name of a bundled one (`hfstrat recipes ls`), or a dict with the keys of a recipe.
        model: a path, a Hub id or a `PreTrainedModel`, whose weights as they are now are the start.
        tokenizer: a path, a Hub id or a tokenizer, where it is not the model's own.
        train_dataset, eval_dataset: a path or Hub id, a `datasets.Dataset` or `DatasetDict`, a `pandas.DataFrame`, or a list of
            dicts.
        callbacks: `TrainerCallback` objects, besides those of hfstrat.
        overwrite: start again where the output folder holds another run.
        overrides: further keys of the recipe: `strategy="lora"`, `training={"max_steps": 100}`, `output_dir="runs/mine"`.

    Raises:
        UserError: a mistake, before anything is written.
        RunError: training failed; `code` is the exit code of the command.
    """
    check_callbacks(callbacks)
    with quiet():
        loaded = loaded_recipe(recipe, model, tokenizer, train_dataset, eval_dataset, overrides)
        return _train(loaded, callbacks, overwrite)


@contextmanager
def quiet() -> Iterator[None]:
    """The warnings of libraries are silenced as in the commands; afterwards the caller's filters apply again.

    Errors name rows that were given as an object so, not the file of the cache that holds them.
    """
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        except RunError as error:
            error.args = (IN_CACHE.sub(GIVEN_ROWS, str(error)), *error.args[1:])
            raise


def _train(loaded: Loaded, callbacks: Sequence[Any], overwrite: bool) -> Run:
    folder = Path(loaded.recipe.output_dir).expanduser()
    if not overwrite and is_finished(folder, loaded):
        print(f"{folder}: this recipe has been run (its files are not compared); overwrite=True trains it again")
        return Run(folder)
    from hfstrat.run.train import run

    def with_callbacks(job: Job) -> None:
        for callback in callbacks:
            job.trainer.add_callback(callback)

    with signals.listening():
        finished = run(loaded, overwrite, with_callbacks)
    if finished is None:  # another process than the first, which verifies the result and writes the report
        wait_for_report(folder)
    return Run(folder)


def wait_for_report(folder: Path) -> None:
    """Wait until the first process has ended the run. Raises RunError where it failed, or does not end."""
    until = time_module.monotonic() + WAIT
    while (status := report.status(folder)) in (None, "running"):
        if time_module.monotonic() > until:
            raise RunError(f"{folder}: the first process has not finished this run after {WAIT:.0f} s")
        time_module.sleep(PAUSE)
    if status != "done":
        raise RunError(f"{folder}: the run did not finish ({status}); the first process has the reason")


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises UserError for what is no callback."""
    if not callbacks:
        return
    from transformers import TrainerCallback

    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            raise UserError(f"callbacks: {callback!r}; expected objects of subclasses of transformers.TrainerCallback")


def is_finished(folder: Path, loaded: Loaded) -> bool:
    """Whether a folder has the finished run of this recipe."""
    found = report.read(folder)
    return found is not None and report.status(folder) == "done" and found.run.recipe == loaded.recipe


def loaded_recipe(
    recipe: Any, model: Any, tokenizer: Any, train_dataset: Any, eval_dataset: Any, overrides: Mapping[str, Any]
) -> Loaded:
    """The recipe of a call of `train`. Raises UserError."""
    from hfstrat.recipe.load import load_recipe

    given = recipe_dict(recipe)
    train_source, eval_source = inputs.data_sources(train_dataset, eval_dataset)
    changes: dict[str, Any] = {f"model.{key}": value for key, value in inputs.model_source(model, tokenizer).items()}
    if train_source is not None:
        changes["data.train"] = train_source
    if eval_source is not None:
        changes["data.eval"] = eval_source
    found = inputs.merged(inputs.merged(given, overrides), changes)
    if "output_dir" not in found:
        raise UserError('output_dir: missing; name the folder of the run, such as output_dir="runs/mine"')
    return load_recipe(HERE, text=yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


def recipe_dict(recipe: Any) -> dict[str, Any]:
    """The keys of a recipe file, of a bundled recipe, or of a mapping. Raises UserError."""
    from hfstrat.recipe import library
    from hfstrat.recipe import yaml as recipe_yaml

    if recipe is None:
        return {}
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if not isinstance(recipe, str | Path):
        raise UserError(f"recipe: a {type(recipe).__name__}; expected a path, the name of a bundled recipe, or a dict")
    file = Path(recipe).expanduser()
    if not file.is_file() and file.suffix not in (".yaml", ".yml"):
        file = library.find("recipes", str(recipe))
    found: dict[str, Any] = recipe_yaml.parse(recipe_yaml.read(str(file)), str(file))[0]
    return found


def load(target: str | Path) -> Run:
    """A run's folder, the folder of a model or an adapter, or a Hub id, to use from Python. Raises UserError."""
    return Run(target)


def evaluate(
    target: str | Path | Run, data: Any = None, *, against: str | Path | Run | None = None, **overrides: Any
) -> dict[str, Any]:
    """Measure a run or a model; prints the table of `hfstrat evaluate` and returns what it writes with `--json`.

    Args:
        data: examples in any form that `train` takes; default: the run's own evaluation examples.
        against: `base`, or another run or model, on the same examples.
        overrides: keys of the sections `data` and `evaluation`: `evaluation={"metrics": ["rouge"]}`.

    Raises:
        UserError: nothing to measure, or a wrong setting.
    """
    other = against.target if isinstance(against, Run) else against
    return measure.measure(target.target if isinstance(target, Run) else target, data, other, overrides)


def advise(model: str | None = None, data: Any = None, **options: Any) -> dict[str, Any]:
    """Recommend strategies; returns what `hfstrat advise --json` prints.

    Args:
        data: in any form that `train` takes.
        options: those of the command, with underscores: `time="2h"`, `memory="16GiB"`, `task`, `goal`, `strategies`, `measure`.

    Raises:
        UserError: a wrong option.
    """
    from hfstrat.advisor import decide, show
    from hfstrat.cli import advise as cli

    if model is not None and not isinstance(model, str):
        raise UserError(f"model: a {type(model).__name__}; expected the path or Hub id of a model")
    request = cli.Request(
        **_known(cli.Request, {"measure": "auto", **options}) | {"model": model, "data": inputs.data_source(data, "data")}
    )
    situation = cli.situation_of(request)
    names = cli.strategies_of(request.strategies, situation.data.task)
    situation, _ = cli.measured(situation, names, request.measure)
    found: dict[str, Any] = json.loads(json.dumps(show.as_json(situation, decide.decide(situation, names)), default=str))
    return found


def compare(
    recipes: str | Path | Sequence[str | Path] = (),
    *,
    budget: str,
    model: str | None = None,
    data: Any = None,
    eval_data: Any = None,
    output: str | Path = "runs/compare",
    strategies: str | Sequence[str] | None = None,
    task: str | None = None,
    seeds: int = 3,
    overrides: Mapping[str, Any] | None = None,
    retry: bool = False,
) -> dict[str, Any]:
    """Train recipes, or strategies for a model and data, side by side; returns the content of comparison.json.

    Args:
        budget: what each run may spend, such as `10min`, `2M-tokens` or `500-steps`.
        data, eval_data: in any form that `train` takes.
        overrides: keys of all recipes.

    Raises:
        UserError: a mistake, before anything is written.
        RunError: no run finished.
    """
    from hfstrat.advisor.recipes import predict
    from hfstrat.comparison import compare as comparison
    from hfstrat.engine.entries import Request, parse_budget

    train_data, held_out = inputs.data_source(data, "data"), inputs.data_source(eval_data, "eval_data")
    folder, files = Path(output), files_of(recipes)
    request = Request(
        files,
        measure.flat(overrides or {}),
        model,
        train_data,
        names(strategies, "strategies"),
        task,
        parse_budget(text(budget, "budget", "10min")),
        seeds,
        folder,
        held_out,
        None,
        retry,
    )
    with signals.restored():
        comparison.compare(request, predict)
    found: dict[str, Any] = json.loads((folder.expanduser() / "comparison.json").read_text(encoding="utf-8"))
    return found


def tune(
    recipes: str | Path | Sequence[str | Path] = (),
    *,
    time: str,
    model: str | None = None,
    data: Any = None,
    eval_data: Any = None,
    output_dir: str | Path = "runs/tune",
    strategies: str | Sequence[str] | None = None,
    search: str | Sequence[str] | None = None,
    task: str | None = None,
    seed: int = 42,
    overrides: Mapping[str, Any] | None = None,
) -> Run:
    """Search strategies and settings until a deadline; returns the best model as a finished run.

    Args:
        time: until the model is ready, verification included, such as `30min`.
        data, eval_data: in any form that `train` takes.
        search: keys that are searched besides the strategy, such as `learning_rate,r`.
        overrides: keys of all recipes.

    Raises:
        UserError: a mistake, before anything is written.
        RunError: nothing could be measured.
    """
    from hfstrat.cli import tune as cli
    from hfstrat.tuning import space
    from hfstrat.tuning import tune as tuning
    from hfstrat.tuning.options import Options, parse_time

    train_data, held_out = inputs.data_source(data, "data"), inputs.data_source(eval_data, "eval_data")
    folder, files = Path(output_dir).expanduser().absolute(), files_of(recipes)
    keys = space.parse_keys(names(search, "search"))
    options = Options(
        files,
        measure.flat(overrides or {}),
        model,
        train_data,
        names(strategies, "strategies"),
        task,
        parse_time(text(time, "time", "30min")),
        held_out,
        keys,
        str(folder),
        seed,
    )
    with signals.restored(), cli.helpers(folder):
        tuning.tune(options, cli.adviser(options), cli.runner)
    return Run(folder)


def files_of(recipes: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths of recipes. Raises UserError for anything else."""
    listed = [recipes] if isinstance(recipes, str | Path) else list(recipes)
    for one in listed:
        if not isinstance(one, str | Path):
            raise UserError(f"recipes: a {type(one).__name__}; expected paths of recipe files")
    return [str(one) for one in listed]


def names(value: str | Sequence[str] | None, key: str) -> str | None:
    """Names as the command takes them, with commas. Raises UserError."""
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(one, str) for one in listed):
        raise UserError(f"{key}: {value!r}; expected names, as a list or with commas")
    return ",".join(listed)


def text(value: Any, key: str, example: str) -> str:
    """An amount with its unit. Raises UserError for a number alone."""
    if not isinstance(value, str):
        raise UserError(f"{key}: {value!r}; expected text with a unit, such as {example!r}")
    return value


def _known(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the command has. Raises UserError for another one, with the nearest name."""
    from difflib import get_close_matches

    known = [name for name in kind.__dataclass_fields__ if name not in ("model", "data", "overrides")]  # type: ignore[attr-defined]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"advise: {name}: no such option; {hint}expected some of {', '.join(known)}")
    return dict(options)
