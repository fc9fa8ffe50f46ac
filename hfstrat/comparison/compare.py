"""`hfstrat compare`: line up the recipes, read the data, execute the runs that are missing, report the results."""

from __future__ import annotations

import fcntl
import json
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from hfstrat import __version__, errors
from hfstrat.comparison import page, processes, results
from hfstrat.comparison.processes import DataFacts, Ending, Run
from hfstrat.comparison.results import Predict
from hfstrat.comparison.text import Screen
from hfstrat.engine.entries import Entry, Lineup, Request, fingerprint, line_up
from hfstrat.errors import RunError, UserError
from hfstrat.models.load import read_json
from hfstrat.recipe import yaml
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.stored import upgraded
from hfstrat.strategies.defaults import Prediction

LOCK = ".hfstrat.compare.lock"  # also marks the folder of a comparison
DATA, PAGE, BEFORE = "comparison.json", "report.html", "before.json"
EXTRA_SECONDS, EXTRA_TIMES = 600.0, 3.0  # a run with a budget of time may take EXTRA_SECONDS + EXTRA_TIMES * budget
ENVIRONMENT = {"python", "platform", "libraries", "processor", "threads", "gpus"}


def compare(request: Request, predict: Predict) -> int:
    """Run a comparison; returns the exit code, which is 0 even if some runs failed (the table shows them as failed).

    Args:
        request: the recipes and options.
        predict: predicts the runs before they are measured; must be fast and must not import torch.

    Raises:
        UserError: a mistake, before anything is written or run.
        RunError: no run finished, or an interruption; the same command resumes.
    """
    check_folder(request.output)
    lineup = line_up(request)
    check_proposed(lineup)
    screen = Screen()
    screen.remarks(request, lineup)
    planned = plan(request, lineup)
    data = stored_facts(request, planned)
    if data is None:
        screen.show("reading the data")
        data = processes.read_data(lineup, request.budget, request.seeds)
    planned = with_steps(request, lineup, planned, data)
    endings = {run: processes.read_ending(run) for run in planned}
    if request.retry:
        endings = {run: ending if ending and ending.is_done else None for run, ending in endings.items()}
    predictions = predict_once(request, lineup, planned, predict)
    comparison = Comparison(request, lineup, data, predictions, endings)
    with lock_folder(comparison):
        screen.begin(comparison.table(), endings)
        execute_all(comparison, screen)
        table = comparison.write()
    screen.result(table, request.output / PAGE)
    first, *_ = ended = [ending for ending in endings.values() if ending]
    if not any(ending.is_done for ending in ended):
        raise RunError(f"no run finished; the first: {first.status}: {first.sentence}", errors.CRASH)
    return errors.OK


def execute_all(comparison: Comparison, screen: Screen) -> None:
    """Execute the runs that have not ended. Raises RunError after an interruption."""
    endings = comparison.endings
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with screen.watching():
            for run in [run for run, ending in endings.items() if ending is None]:
                screen.starts(run)
                ending = endings[run] = processes.execute(run, time_limit(comparison.request), screen.look)
                screen.ended(run, ending, comparison.write())
    except KeyboardInterrupt:
        comparison.write()
        done = sum(ending is not None for ending in endings.values())
        raise RunError(
            f"interrupted; {done} of {len(endings)} runs have ended and are stored; the same command continues with the others",
            errors.INTERRUPTED,
        ) from None


def check_folder(folder: Path) -> None:
    """Check that the folder is empty, new, or that of a comparison. Raises UserError."""
    folder = folder.expanduser()
    if folder.is_file():
        raise UserError(f"--output: {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).is_file():
        raise UserError(f"--output: {folder} contains files that are not from hfstrat compare; choose another folder")


def check_proposed(lineup: Lineup) -> None:
    """Check that no proposed recipe would overwrite one that was edited. Raises UserError."""
    for entry in lineup.entries:
        file = Path(entry.source)
        if entry.text is not None and file.is_file():
            stored = upgraded(settings_of(file.read_text("utf-8")))  # may be from before a key was renamed
            if stored != settings_of(entry.text):
                raise UserError(
                    f"{file}: was edited, or proposed for another model or other data; to compare it as it is, give the recipe "
                    f"files instead of --model and --data (hfstrat compare {file.parent}/*.yaml); or choose another --output"
                )


def settings_of(text: str) -> dict[str, Any]:
    """The keys and values of a recipe; empty if it is not one any more."""
    try:
        return yaml.parse(text, "a proposed recipe")[0]
    except UserError:
        return {}


def plan(request: Request, lineup: Lineup) -> list[Run]:
    """All runs: every recipe with the first seed, then every recipe with the next, so that an interruption is fair."""
    planned = []
    for index in range(request.seeds):
        for entry in lineup.entries:
            folder = request.output / entry.label / f"seed-{lineup.seed(index)}"
            overrides = lineup.overrides(entry, index, request.budget, None, folder / processes.RESULT)
            identity = fingerprint(load_recipe(entry.source, overrides, entry.text), request.budget)
            planned.append(Run(entry.label, lineup.seed(index), entry.source, tuple(overrides), folder, identity))
    return planned


def stored_facts(request: Request, planned: list[Run]) -> dict[str, DataFacts] | None:
    """What an earlier start of the same comparison found about the data; None if there is none."""
    stored = read_json(request.output / BEFORE)
    if stored.get("runs") != [run.identity for run in planned]:
        return None
    return {label: DataFacts(**each) for label, each in stored["rows"].items()}


def with_steps(request: Request, lineup: Lineup, planned: list[Run], data: dict[str, DataFacts]) -> list[Run]:
    """The runs, with the number of steps that fits into a budget of tokens."""
    if request.budget.kind != "tokens":
        return planned
    entries, found = {entry.label: entry for entry in lineup.entries}, []
    for run in planned:
        index = run.seed - lineup.seed(0)
        overrides = lineup.overrides(entries[run.label], index, request.budget, data[run.label].steps[index], run.result)
        found.append(replace(run, overrides=tuple(overrides)))
    return found


def predict_once(request: Request, lineup: Lineup, planned: list[Run], predict: Predict) -> dict[str, Prediction]:
    """Predict each recipe with the first seed; predictions made before a run are stored and never replaced later."""
    first, stored = planned[: len(lineup.entries)], read_json(request.output / BEFORE).get("predicted", {})
    earlier = {run.label: stored[run.identity] for run in first if stored.get(run.identity)}
    if len(earlier) == len(first):
        return earlier
    texts = {entry.label: entry.text for entry in lineup.entries}
    predictions = predict({run.label: load_recipe(run.source, run.overrides, texts[run.label]) for run in first})
    return {**predictions, **earlier}


def lock_folder(comparison: Comparison) -> IO[str]:
    """Create and lock the folder; store the proposed recipes, the facts about the data, and the predictions in it.

    Raises:
        UserError: another comparison is using it.
    """
    folder, lineup, planned = comparison.request.output, comparison.lineup, list(comparison.endings)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--output: {folder} is in use by a running comparison; choose another folder") from None
    for entry in lineup.entries:
        file = Path(entry.source)
        if entry.text is not None and not (file.is_file() and settings_of(file.read_text("utf-8")) == settings_of(entry.text)):
            file.parent.mkdir(exist_ok=True)
            file.write_text(entry.text, encoding="utf-8")
    stored = {
        "runs": [run.identity for run in planned],
        "rows": {label: vars(each) for label, each in comparison.data.items()},
        "predicted": {run.identity: comparison.predictions.get(run.label, {}) for run in planned[: len(lineup.entries)]},
    }
    (folder / BEFORE).write_text(json.dumps(stored, indent=1), encoding="utf-8")
    return lock


def time_limit(request: Request) -> float | None:
    """Seconds after which a run is terminated; None: never."""
    if request.timeout is not None or request.budget.kind != "time":
        return request.timeout
    return EXTRA_SECONDS + EXTRA_TIMES * request.budget.amount


@dataclass(frozen=True)
class Comparison:
    """The results so far, written to comparison.json and report.html; `endings` has all runs in their order."""

    request: Request
    lineup: Lineup
    data: dict[str, DataFacts]
    predictions: dict[str, Prediction]
    endings: dict[Run, Ending | None]

    def table(self) -> dict[str, Any]:
        """Everything that is known; the same runs always give the same numbers."""
        entries, recipe = self.lineup.entries, self.lineup.entries[0].loaded.recipe
        quality = results.quality_of(recipe, len({each.tokenizer for each in self.data.values()}))
        of = {entry.label: [run for run in self.endings if run.label == entry.label] for entry in entries}
        done = {label: [run for run in its if (e := self.endings[run]) and e.is_done] for label, its in of.items()}
        reports = {label: [results.report_of(run) for run in its] for label, its in done.items() if its}
        rows = []
        for entry in entries:
            its_runs = [results.run_row(run, self.endings[run], quality) for run in of[entry.label]]
            rows.append(results.entry_row(entry, its_runs, self.predictions.get(entry.label), quality))
        best, baselines = results.compare_entries(rows, results.aligned(done, quality), quality)
        first = next((its[0] for its in reports.values()), None)
        return {
            "hfstrat": __version__,
            "task": recipe.task,
            "quality": quality._asdict(),
            "budget": vars(self.request.budget),
            "seeds": [self.lineup.seed(index) for index in range(self.request.seeds)],
            "rows": results.data_row(self.data),
            "about": about(entries),
            "best": best,
            "entries": rows,
            "baselines": baselines,
            "excluded": self.lineup.excluded,
            "samples": results.samples({label: its[0].finished for label, its in reports.items()}),
            "confusions": results.confusions({label: [each.finished for each in its] for label, its in reports.items()}),
            "environment": first.environment.model_dump(include=ENVIRONMENT) if first else {},
            "repeat": {"command": shlex.join(command_of(self.request)), "folder": str(Path.cwd())},
        }

    def write(self) -> dict[str, Any]:
        """Write comparison.json and report.html, each atomically."""
        table = self.table()
        text = json.dumps(table, indent=1, ensure_ascii=False, default=str) + "\n"
        for name, content in ((DATA, text), (PAGE, page.render(table))):
            partial = self.request.output / f"{name}.partial"
            partial.write_text(content, encoding="utf-8")
            partial.replace(self.request.output / name)
        return table


def about(entries: Sequence[Entry]) -> str:
    """The model and the data that are compared, by their names without folders: 'MiniLM on train.csv'."""
    recipes = [entry.loaded.recipe for entry in entries]
    models = dict.fromkeys(Path(recipe.model.name_or_path).name for recipe in recipes if recipe.model.name_or_path)
    data = dict.fromkeys(_short(source.path) for recipe in recipes for source in recipe.data.train)
    return " on ".join(filter(None, (", ".join(models), ", ".join(data))))


def _short(path: str) -> str:
    """A Hub id as it is; of a local path the last two parts, since many files are named train.csv."""
    return "/".join(Path(path).parts[-2:])


def command_of(request: Request) -> list[str]:
    """The command line that repeats the comparison."""
    given = {"model": request.model, "data": request.data, "strategies": request.strategies, "task": request.task}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += [f"--budget={request.budget.text}", f"--seeds={request.seeds}", f"--output={request.output}"]
    options += [f"--evaluate={request.evaluate}"] if request.evaluate else []
    options += [f"--timeout={request.timeout:g}s"] if request.timeout else []
    return ["hfstrat", "compare", *request.recipes, *request.overrides, *options]
