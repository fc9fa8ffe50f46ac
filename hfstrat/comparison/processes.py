"""The processes of a comparison: one that reads the data once, because that needs torch, then one per run.

`python -m hfstrat.comparison.processes SPEC.json` reads the data and writes answer.json next to the specification.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfstrat import errors
from hfstrat.engine import children
from hfstrat.engine.entries import Budget, Lineup
from hfstrat.errors import RunError, UserError
from hfstrat.models.load import read_json
from hfstrat.run import launch
from hfstrat.tasks import report
from hfstrat.trainer import checkpoints, heartbeat

STATE, LOG, RESULT, CACHE = "state.json", "log.txt", "run", "cache"  # in the folder of a run


@dataclass(frozen=True)
class Run:
    """One recipe with one seed. `identity` is a hash of everything that its result depends on."""

    label: str
    seed: int
    source: str
    overrides: tuple[str, ...]
    folder: Path
    identity: str

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def command(self) -> list[str]:
        """The equivalent command line."""
        return ["hfstrat", "train", self.source, *self.overrides, "--overwrite"]


@dataclass(frozen=True)
class Ending:
    """How a run ended: `status` is one of `errors.NAMES` or timed-out, `sentence` the reason."""

    identity: str
    status: str
    sentence: str
    wall_seconds: float  # of the process

    @property
    def is_done(self) -> bool:
        return self.status == errors.NAMES[errors.OK]


def read_ending(run: Run) -> Ending | None:
    """The stored ending; None if the run has not ended, has changed since, or is finished but has no report."""
    stored = read_json(run.folder / STATE)
    if stored.get("identity") != run.identity:
        return None
    try:
        ending = Ending(**stored)
    except TypeError:
        return None
    return ending if not ending.is_done or report.status(run.result) == "done" else None


def execute(run: Run, limit: float | None, look: Callable[[], None]) -> Ending:
    """Start a run, wait for its end and store the ending.

    A run always starts over with its own empty cache, so that its time is comparable with that of the other runs.

    Args:
        run: what to start.
        limit: seconds after which it is terminated.
        look: called twice per second.

    Raises:
        KeyboardInterrupt: was passed on to the run, which has ended; no ending is stored.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    reported = run.folder / "outcome.json"
    for file in (run.folder / STATE, reported):
        file.unlink(missing_ok=True)
    kills, since = children.kernel_kills(), time.monotonic()
    with run.log.open("w", encoding="utf-8") as log:
        planned = launch.plan_launch([run.source, *run.overrides, "--overwrite"], None, None)
        environment = planned.environment | {heartbeat.FILE: str(reported), "HFSTRAT_CACHE": str(run.folder / CACHE)}
        child = children.start(planned.command, environment, log)
        try:
            in_time = children.wait(child, since, limit, look)
        except BaseException:
            children.terminate(child)
            raise
        finally:  # the checkpoints of many runs would fill the disk, and none is resumed
            for folder in (run.folder / CACHE, *checkpoints.all_checkpoints(run.result)):
                shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - since
    status, sentence = children.outcome(
        child.returncode, read_json(reported), children.kernel_kills() - kills, None if in_time else limit
    )
    for file in run.folder.glob(f"{reported.name}*"):  # also the file with its process id
        file.unlink(missing_ok=True)
    ending = Ending(run.identity, status, sentence, seconds)
    partial = run.folder / f"{STATE}.partial"
    partial.write_text(json.dumps(asdict(ending), indent=1), encoding="utf-8")
    partial.replace(run.folder / STATE)
    return ending


# data


@dataclass(frozen=True)
class DataFacts:
    """What an entry is trained on and evaluated on."""

    train_rows: int
    train_tokens: int  # of one epoch
    eval_rows: int
    evaluated: str  # hash of the evaluated examples
    tokenizer: str  # hash of the tokenizer
    has_bytes: bool  # whether bits per byte are exact
    steps: list[int]  # that fit into a budget of tokens, by seed; empty for other budgets


def read_data(lineup: Lineup, budget: Budget, seeds: int) -> dict[str, DataFacts]:
    """Read the data of every entry, by its label.

    Raises:
        UserError: data that cannot be read, different evaluation examples, or a budget of tokens below one step.
    """
    spec = {
        "budget": budget.amount if budget.kind == "tokens" else None,
        "entries": [
            [
                entry.label,
                entry.source,
                entry.text,
                [lineup.overrides(entry, n, budget, None, Path("run")) for n in range(seeds)],
            ]
            for entry in lineup.entries
        ],
    }
    with tempfile.TemporaryDirectory(prefix="hfstrat-survey-") as scratch:
        file, answer = Path(scratch) / "spec.json", Path(scratch) / "answer.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "hfstrat.comparison.processes", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if "error" in found:
        raise RunError(found["error"], found["code"])
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"the data could not be read: {last}", errors.CRASH)
    facts = {label: DataFacts(**each) for label, each in found.items()}
    check(facts)
    return facts


def check(facts: dict[str, DataFacts]) -> None:
    """Check that the evaluations are comparable.

    Raises:
        UserError: different examples are evaluated, or tokenizers differ and bits per byte are unknown.
    """
    first, *others = facts.items()
    for label, each in others:
        if each.evaluated != first[1].evaluated:
            raise UserError(
                f"{first[0]} and {label} are evaluated on different examples (one of them drops some: data.overflow, "
                "data.max_length); use the same tokenizer for both, or add data.overflow=truncate for all"
            )
    without = [label for label, each in facts.items() if not each.has_bytes]
    if len({each.tokenizer for each in facts.values()}) > 1 and without:
        raise UserError(
            f"{without[0]}: losses per token are not comparable across tokenizers, and this tokenizer's tokens have no defined "
            "bytes, so bits per byte are not comparable either; use one tokenizer for all of them (model.tokenizer)"
        )


def _facts(budget: float | None, label: str, source: str, text: str | None, overrides: list[list[str]]) -> dict[str, Any]:
    """The data of one entry; `overrides` are those of each seed."""
    import numpy as np

    from hfstrat import strategies
    from hfstrat.data import cache
    from hfstrat.data.token_bytes import token_bytes
    from hfstrat.recipe.load import load_recipe, located
    from hfstrat.trainer.plan import make_plan

    seeds = [load_recipe(source, each, text) for each in overrides]
    recipe = seeds[0].recipe
    with located(seeds[0]):
        tokenizer, data = strategies.build(recipe.strategy).read(recipe)
        make_plan(recipe.training, data.lengths, data.eval_lengths, processes=1)  # raises now rather than in the first run
    return {
        "train_rows": len(data.train),
        "train_tokens": int(data.lengths.sum()),
        "eval_rows": len(set(data.eval["row"][:])),
        "evaluated": hashlib.sha256(np.unique(data.eval["row"][:]).astype(np.int64).tobytes()).hexdigest(),
        "tokenizer": cache.tokenizer_digest(tokenizer),
        "has_bytes": bool(data.label_names) or token_bytes(tokenizer) is not None,
        "steps": [affordable_steps(budget, data.lengths, each.recipe, label) for each in seeds] if budget else [],
    }


def affordable_steps(budget: float, lengths: Any, recipe: Any, label: str) -> int:
    """The number of steps with at most so many unpadded tokens, in the order in which a run takes its examples.

    Raises:
        UserError: the first step alone has more.
    """
    from hfstrat.data.collate import BatchOrder
    from hfstrat.trainer.plan import ENDLESS, dense_order

    training = recipe.training
    grouped = training.train_sampling_strategy == "group_by_length"
    order = dense_order(training, lengths, 1, recipe.seed) or BatchOrder(
        lengths, training.global_batch_size, ENDLESS, recipe.seed, group_by_length=grouped
    )
    left, steps = budget - order.tokens(0), 0
    if left < 0:
        raise UserError(
            f"--budget: {budget:,.0f} tokens are too few for one step of {label}: its first {len(order.batch(0))} "
            f"examples have {order.tokens(0):,} tokens; raise the budget, or lower training."
            f"{'global_batch_tokens' if training.global_batch_tokens else 'global_batch_size'}"
        )
    while left >= 0 and steps < ENDLESS:
        steps += 1
        left -= order.tokens(steps)
    return steps


def _main(spec_file: str) -> None:
    file = Path(spec_file)
    spec = json.loads(file.read_text(encoding="utf-8"))
    errors.quiet_libraries()
    try:
        found: dict[str, Any] = {entry[0]: _facts(spec["budget"], *entry) for entry in spec["entries"]}
    except Exception as error:
        named = errors.named(error)
        if named.code == errors.CRASH:
            raise
        found = {"error": str(named), "code": named.code}
    (file.parent / "answer.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
