"""The rows of a comparison, looked at once before the first run, in a process of its own: it needs torch and gives it back.

Run as `python -m hfstrat.comparison.survey SPEC.json`: writes what it found beside it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfstrat import errors
from hfstrat.comparison.entries import Budget, Line
from hfstrat.errors import RunError, UserError


@dataclass(frozen=True)
class Rows:
    """What an entry trains on and is evaluated on."""

    train_rows: int
    train_tokens: int  # of one epoch
    eval_rows: int
    evaluated: str  # a hash of which rows are evaluated
    tokenizer: str  # a hash of it
    has_bytes: bool  # whether bits per byte can be told exactly
    steps: list[int]  # that a budget of tokens is enough for, by seed; empty for other budgets


def take(line: Line, budget: Budget, seeds: int) -> dict[str, Rows]:
    """Read the rows of every entry, by its label.

    Raises:
        UserError: rows that cannot be read, evaluations of other rows, a budget of tokens that is too small for one step.
    """
    spec = {
        "budget": budget.amount if budget.kind == "tokens" else None,
        "entries": [
            [entry.label, entry.source, entry.text, [line.words(entry, n, budget, None, Path("run")) for n in range(seeds)]]
            for entry in line.entries
        ],
    }
    with tempfile.TemporaryDirectory(prefix="hfstrat-survey-") as scratch:
        file, answer = Path(scratch) / "spec.json", Path(scratch) / "answer.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "hfstrat.comparison.survey", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if "error" in found:
        raise RunError(found["error"], found["code"])
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"the rows could not be looked at: {said}", errors.CRASH)
    rows = {label: Rows(**each) for label, each in found.items()}
    check(rows)
    return rows


def check(rows: dict[str, Rows]) -> None:
    """Refuse evaluations that cannot stand side by side.

    Raises:
        UserError: other rows are evaluated, or losses are of other tokens and cannot be told in bits a byte.
    """
    first, *others = rows.items()
    for label, each in others:
        if each.evaluated != first[1].evaluated:
            raise UserError(
                f"{first[0]} and {label} are evaluated on other rows (as one of them drops some of them: data.overflow, "
                "data.max_length); give both the same tokenizer, or data.overflow=truncate for all"
            )
    without = [label for label, each in rows.items() if not each.has_bytes]
    if len({each.tokenizer for each in rows.values()}) > 1 and without:
        raise UserError(
            f"{without[0]}: recipes with other tokenizers have losses of other tokens, and this one's tokens have no bytes of "
            "their own, so that bits a byte cannot be told; give all of them one tokenizer (model.tokenizer)"
        )


def _look(budget: float | None, label: str, source: str, text: str | None, words: list[list[str]]) -> dict[str, Any]:
    """The rows of one entry; `words` are the overrides of each seed."""
    import numpy as np

    from hfstrat import strategies
    from hfstrat.data import cache
    from hfstrat.data.corpus import held_out
    from hfstrat.data.token_bytes import token_bytes
    from hfstrat.recipe.load import load_recipe, located
    from hfstrat.tasks import TASKS
    from hfstrat.trainer.plan import make_plan

    seeds = [load_recipe(source, each, text) for each in words]
    recipe = seeds[0].recipe
    with located(seeds[0]):
        tokenizer = strategies.build(recipe.strategy).load_tokenizer(recipe)
        most = recipe.evaluation.max_rows
        data = TASKS[recipe.task].prepare(
            recipe.data, tokenizer, recipe.seed, 0, most, held_out(recipe, TASKS[recipe.task].reader)
        )
        make_plan(recipe.training, data.lengths, data.eval_lengths, processes=1)  # what it refuses, it refuses now
    return {
        "train_rows": len(data.train),
        "train_tokens": int(data.lengths.sum()),
        "eval_rows": len(set(data.eval["row"][:])),
        "evaluated": hashlib.sha256(np.unique(data.eval["row"][:]).astype(np.int64).tobytes()).hexdigest(),
        "tokenizer": cache.tokenizer_digest(tokenizer),
        "has_bytes": bool(data.label_names) or token_bytes(tokenizer) is not None,
        "steps": [enough_for(budget, data.lengths, each.recipe, label) for each in seeds] if budget else [],
    }


def enough_for(budget: float, lengths: Any, recipe: Any, label: str) -> int:
    """The steps that have at most so many real tokens, in the order in which a run takes its rows.

    Raises:
        UserError: not even the first one has so few.
    """
    from hfstrat.data.collate import BatchOrder
    from hfstrat.trainer.plan import ENDLESS

    training = recipe.training
    grouped = training.train_sampling_strategy == "group_by_length"
    order = BatchOrder(lengths, training.global_batch_size, ENDLESS, recipe.seed, group_by_length=grouped)
    left, steps = budget - order.tokens(0), 0
    if left < 0:
        raise UserError(
            f"--budget: {budget:,.0f} tokens are too few for one step of {label}: its first {training.global_batch_size} rows "
            f"have {order.tokens(0):,} tokens; give more, or a smaller training.global_batch_size"
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
        found: dict[str, Any] = {entry[0]: _look(spec["budget"], *entry) for entry in spec["entries"]}
    except Exception as error:
        named = errors.named(error)
        if named.code == errors.CRASH:
            raise
        found = {"error": str(named), "code": named.code}
    (file.parent / "answer.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
