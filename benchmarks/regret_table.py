"""The table of benchmarks/regret.py, and notes on the cases that miss the goal."""

from __future__ import annotations

from typing import Any

WAYS = {"rules": "`advise`", "measured": "`advise --measure`"}
STRATEGIES = ("head", "partial", "lora", "full", "distill", "scratch")
CONDITIONS = (
    "Every run had one core of the machine that the JSON names to itself, one thread, one seed, and the seconds of the table"
    " for training. In each answer, the measured runs on the case's own data set were left out of those that `advise` learns"
    " from. The first answers are those with the earlier table of runs: with two threads, without the encoders' own pooling,"
    " with one learning rate for the head and the rest."
)


def table_of_cases(found: dict[str, dict[str, Any]]) -> list[str]:
    """Build the table, and below it the runs that failed."""
    columns = ["case", "budget"]
    for title in WAYS.values():
        columns += [title, "regret"]
    columns += ["always lora", "always head", "best", *STRATEGIES]
    made = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    made += [f"| {' | '.join(cells_of(name, one))} |" for name, one in found.items()]
    return [*made, "", *(line for name, one in found.items() for line in below(name, one))]


def cells_of(name: str, one: dict[str, Any]) -> list[str]:
    cells = [f"{name}: {one['case']['model']}, {one['train_rows']:,} examples", f"{one['case']['budget']} s"]
    for way in WAYS:
        cells += [one["latest"][way]["first"], regret_of(one, one["latest"][way])]
    for label in ("lora", "head"):
        regret = one["always"].get(label)
        cells.append("-" if regret is None else size_of(one, regret))
    cells.append(one["best"])
    return cells + [value(one, row["quality"]) if (row := one["measured"].get(each)) else "-" for each in STRATEGIES]


def value(one: dict[str, Any], quality: float) -> str:
    return f"{100 * quality:.1f} %" if one["higher_is_better"] else f"{quality:.3f}"


def size_of(one: dict[str, Any], regret: float) -> str:
    return f"{regret:.1f} {'pt' if one['higher_is_better'] else '%'}" if regret else "0"


def regret_of(one: dict[str, Any], answer: dict[str, Any]) -> str:
    words = size_of(one, answer["regret"])
    return words if answer["significant"] or not answer["regret"] else f"{words} (not significant)"


def below(name: str, one: dict[str, Any]) -> list[str]:
    return [f"- {name}: {label} failed: {sentence}" for label, sentence in one["failed"].items()]
