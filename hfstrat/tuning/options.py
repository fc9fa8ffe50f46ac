"""The options of `hfstrat tune`, and everything that is checked before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from hfstrat.data import readers, sources
from hfstrat.engine import entries
from hfstrat.engine.entries import Budget, Entry, Lineup, Request
from hfstrat.errors import UserError
from hfstrat.objectives import task_of
from hfstrat.recipe import format
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import Loaded
from hfstrat.recipe.section import seconds
from hfstrat.tasks import Task
from hfstrat.tasks.media import MediaRows
from hfstrat.tuning import space
from hfstrat.tuning.store import LOCK

RESERVED = (
    "seed",
    "output_dir",
    "training.max_steps",
    "training.max_time",
    "training.num_train_epochs",
    "training.lr_scheduler_type",
)

MOST_COUNTED, ASSUMED_ROWS = 20_000, 1_000
WARMUP = 10  # steps, where a recipe gives a share of a length that is not known yet
WARMUP_SHARE = 0.05  # of the steps that the time allows, where these are few
EVALUATION_SHARE = 0.04  # of the time, for one evaluation
CONTROL_ROWS = 16  # of texts, whose evaluation takes about as long as that of the control text
FINISHING_SHARE = 0.3  # of the time that is reserved for evaluations at the end before one is measured, at most
LEAST_ROWS = 24  # held-out rows that choose, however slow they are


@dataclass(frozen=True)
class Options:
    """The command line.

    time: seconds, everything included.
    eval_data: measures the winner; chooses nothing.
    search: the keys that are searched besides the strategy.
    """

    recipes: list[str]
    overrides: list[str]
    model: str | None
    data: str | None
    strategies: str | None
    task: str | None
    time: float
    eval_data: str | None
    search: tuple[str, ...]
    output: str
    seed: int = 42

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()


@dataclass(frozen=True)
class Advice:
    """What the advisor knows before anything runs.

    order: the candidates, best first; those that do not fit into memory are missing.
    least: by candidate, seconds of the shortest complete run without evaluations: start, loading, a step, verification.
    excluded: by candidate, the reason.
    lines: for the terminal.
    evaluation: by candidate, seconds of one evaluation on all held-out rows. rows: their number.
    step: by candidate, seconds of an optimizer step.
    samples: by candidate, seconds of the answers that the final run shows.
    unlikely: candidates that are unlikely to be the best.
    sized: by candidate with new weights, the settings of a model that suits data and time.
    """

    order: list[str]
    least: dict[str, float]
    excluded: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    step: dict[str, float] = field(default_factory=dict)
    samples: dict[str, float] = field(default_factory=dict)
    unlikely: tuple[str, ...] = ()
    sized: dict[str, list[str]] = field(default_factory=dict)

    def rows_within(self, time: float, labels: Sequence[str]) -> int:
        """How many held-out rows each of some candidates evaluates within a small share of the time."""
        slowest = max((self.evaluation.get(label, 0.0) for label in labels), default=0.0)
        if slowest <= EVALUATION_SHARE * time:
            return self.rows
        return min(self.rows, max(LEAST_ROWS, int(self.rows * EVALUATION_SHARE * time / slowest)))

    def seconds_of(self, label: str, rows: int) -> float:
        """Predicted seconds of evaluating so many rows."""
        return self.evaluation.get(label, 0.0) / max(1, self.rows) * rows

    def needed(self, label: str, time: float, others: int) -> float:
        """Seconds of the shortest search with this candidate alone."""
        most = self.rows_within(time, [label])
        evaluated = self.seconds_of(label, most + CONTROL_ROWS + min(others, most))
        return self.least.get(label, 0.0) + evaluated + self.samples.get(label, 0.0)

    def warmup(self, label: str, time: float) -> int:
        """Steps of the warmup: a share of those that the time allows, at most WARMUP."""
        step = self.step.get(label, 0.0)
        return WARMUP if not step else min(WARMUP, max(1, round(WARMUP_SHARE * time / step)))


Advise = Callable[[Mapping[str, Loaded], float], Advice]
"""Advice for recipes by label; may measure for so many seconds. Must not import torch."""


def parse_time(text: str) -> float:
    """Seconds in `--time 30min`. Raises UserError."""
    if not text:
        raise UserError("--time: missing; give the time until the model is to be ready, such as 30min")
    try:
        return seconds(text)
    except ValueError as error:
        raise UserError(f"--time: {text}: {error}") from None


@dataclass(frozen=True)
class Setting:
    """A search that has passed all checks. `others`: data that measure the winner; None: a part of the held-out rows."""

    options: Options
    lineup: Lineup
    others: str | None
    other_rows: int
    in_bytes: bool
    most_rows: int | None = None  # held-out rows that are evaluated; None: all of them
    evaluating: float = 0.0  # predicted seconds of evaluating the held-out rows
    finishing: float = 0.0  # predicted seconds of the other rows that the final run measures
    answering: float = 0.0  # predicted seconds of the answers that the final run shows
    warmups: Mapping[str, int] = field(default_factory=dict)  # steps, by candidate
    unlikely: tuple[str, ...] = ()  # candidates that are left out where the time does not allow all
    sized: Mapping[str, Sequence[str]] = field(default_factory=dict)  # settings that the advisor has added, by candidate

    @property
    def entries(self) -> list[Entry]:
        return self.lineup.entries

    def entry(self, label: str) -> Entry:
        return next(entry for entry in self.entries if entry.label == label)

    @property
    def can_vary(self) -> bool:
        return any(space.searched(self.options.search, entry) for entry in self.entries)

    def identity(self) -> str:
        """A hash of everything that decides what a score means; the time may be another one."""
        options = {name: value for name, value in asdict(self.options).items() if name not in ("time", "output", "strategies")}
        inputs = [entries.fingerprint(entry.loaded, Budget("time", 0.0, "")) for entry in self.entries]
        return hashlib.sha256(json.dumps([options, inputs], sort_keys=True).encode()).hexdigest()


def check(options: Options) -> Setting:
    """Load and check all recipes; writes nothing. Raises UserError."""
    check_folder(options.folder)
    if not options.recipes and not (options.model and options.data):
        raise UserError("tune: nothing to tune: give recipes, or --model and --data")
    for override in options.overrides:
        if (key := override.partition("=")[0].strip()) in RESERVED:
            raise UserError(f"{override}: {key} is set by the search (--time, --seed, --output-dir); remove it")
    lineup = entries.line_up(request_of(options))
    if not (task := task_of(lineup.entries[0].loaded.recipe)).model.has_predicted_costs:
        raise UserError(
            f"tune: for task: {task.name} it cannot predict times, so it would not keep its deadline: "
            f"{task.model.costs_unknown}; `hfstrat compare` with --budget trains recipes side by side"
        )
    others = options.eval_data or evaluation_data(lineup.entries[0])
    for entry in lineup.entries:
        if getattr(entry.loaded.recipe.strategy, "gradual_unfreezing", None) is not None:
            raise UserError(
                f"{entry.label}: strategy.gradual_unfreezing follows the length of a run, which a search does not know; "
                "remove it"
            )
    space.check(options.search, lineup.entries)
    rows = count_rows(others, task) if others is not None else 0
    return Setting(options, lineup, others, rows, compares_bytes(lineup.entries))


def request_of(options: Options) -> Request:
    """The options as those of a comparison with one run for each candidate."""
    given = (options.recipes, options.overrides, options.model, options.data, options.strategies, options.task)
    return Request(*given, Budget("time", options.time, format.duration(options.time)), 1, options.folder)


def compares_bytes(candidates: Sequence[Entry]) -> bool:
    """Whether losses are compared in bits per byte, because tokenizers differ."""
    differ = len({entry.loaded.recipe.strategy.new_tokenizer is not None for entry in candidates}) > 1
    return differ and task_of(candidates[0].loaded.recipe).metrics.of_tokens


def resized(setting: Setting, sized: Mapping[str, Sequence[str]]) -> Setting:
    """The candidates with the settings that the advisor has added to some. Raises UserError."""
    request = request_of(setting.options)
    found = [
        entries.changed(entry, request, sized[entry.label]) if entry.label in sized else entry for entry in setting.entries
    ]
    lineup = replace(setting.lineup, entries=found)
    return replace(setting, lineup=lineup, in_bytes=compares_bytes(found), sized=dict(sized))


def evaluation_data(entry: Entry) -> str | None:
    """The evaluation data of a recipe, which measure the winner; rows for choosing are held out of its training data."""
    data = entry.loaded.recipe.data
    if data.eval_split is not None or len(data.eval or []) > 1:
        raise UserError(
            f"{entry.label}: data.eval: a search chooses on held-out training rows and measures the winner on one file or "
            "folder; give it as --eval-data, and remove data.eval and data.eval_split"
        )
    return data.eval[0].path if data.eval else None


def count_rows(source: str, task: Task) -> int:
    """The number of rows of local data, up to MOST_COUNTED, for planning the time; an assumed one for a Hub dataset.

    Raises:
        UserError: data that cannot be read.
    """
    if isinstance(task.rows, MediaRows) and sources.is_local(source):
        data = Data.model_validate({"train": source})
        return sum(1 for _ in islice(task.rows.opens.open(data.train[0], data, "data.eval").rows(), MOST_COUNTED))
    files = sources.local_files(source, "--eval-data", ("test", "validation", "train"))
    if files is None:
        return ASSUMED_ROWS
    return sum(1 for file in files for _ in readers.read(file, MOST_COUNTED))


def check_folder(folder: Path) -> None:
    """Check that the folder is new, empty, or that of a search. Raises UserError."""
    if folder.is_file():
        raise UserError(f"--output-dir: {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).is_file():
        raise UserError(f"--output-dir: {folder} contains files that are not from hfstrat tune; choose another folder")


def ordered(setting: Setting, advice: Advice) -> Setting:
    """The candidates in the order of the advisor, without those that do not fit.

    Raises:
        UserError: none fits, or the time is too short for the fastest.
    """
    if not advice.order:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in advice.excluded.items())
        raise UserError(f"--model: no strategy fits into the memory of this machine: {reasons}")
    setting = resized(setting, advice.sized)
    time, others = setting.options.time, setting.other_rows
    needed = {label: advice.needed(label, time, others) for label in advice.order}
    fastest = min(needed, key=lambda label: needed[label])
    if setting.options.time < needed[fastest]:
        raise UserError(
            f"--time: {format.duration(setting.options.time)} is too short for even one candidate: {fastest} needs about "
            f"{format.duration(needed[fastest])} to load, train a step, evaluate and verify the result; give more time"
        )
    affordable = [label for label in advice.order if needed[label] <= setting.options.time]
    late = {
        label: f"it needs about {format.duration(needed[label])}, which is more than --time"
        for label in advice.order
        if label not in affordable
    }
    excluded = setting.lineup.excluded | advice.excluded | late
    lineup = replace(setting.lineup, entries=[setting.entry(label) for label in affordable], excluded=excluded)
    warmups = {label: advice.warmup(label, time) for label in affordable}
    most = advice.rows_within(time, affordable)
    answering = max(advice.samples.get(label, 0.0) for label in affordable)
    evaluating, finishing = (
        min(FINISHING_SHARE * time, max(advice.seconds_of(label, rows) for label in affordable))
        for rows in (most, CONTROL_ROWS + others)
    )
    limit = most if most < advice.rows else None
    unlikely = tuple(label for label in affordable if label in advice.unlikely and not setting.entry(label).at_once)
    setting = replace(setting, lineup=lineup, most_rows=limit, warmups=warmups, unlikely=unlikely)
    return replace(setting, evaluating=evaluating, finishing=finishing, answering=answering)
