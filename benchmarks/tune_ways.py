"""Other ways of spending the time of `hfstrat tune`: equal shares for all strategies, and Optuna alone.

    python -m benchmarks.tune_ways [--only CASE,...] [--core N]

The same candidates, settings, processes, held-out rows and deadlines as in `benchmarks.tune_deadline`, whose results are those
of `hfstrat tune`; only what is done next is decided differently:

- shares: each strategy, with its default settings, is given the same time, and the best on the held-out rows is finished.
- optuna: TPE proposes a strategy and a learning rate; each trial trains for a share of the time as above, until all is spent.

Both measure a head that is solved first, as `hfstrat tune` does, and load the libraries once. Predicted before the first run:
within the goal, or not told apart from the best compared run: `tune` in 7 of the 8 cases, shares in 5, Optuna in 3, since the
time allows each strategy only a few seconds of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import machine, write
from hfstrat.tuning import schedule
from hfstrat.tuning.schedule import LEAST_SECONDS, Bracket, Candidates, Next, Trial, fixed_seconds

CASES = ("trec6-100", "trec6-1000", "agnews-400", "banking77-1000", "stories", "instructions", "trec6-all", "trec6-smollm2")
Decide = Callable[[Candidates, Sequence[Trial], Sequence[Bracket], float], Next]


def follow(way: str) -> None:
    """Let searches of this process decide in some way."""
    if way in WAYS:
        schedule.decide = WAYS[way]  # type: ignore[assignment]


def shares(candidates: Candidates, trials: Sequence[Trial], brackets: Sequence[Bracket], left: float) -> Next:
    """Each strategy with its default settings, for the same time."""
    if (action := begin(candidates, trials, brackets)) is not None:
        return action
    tried = [trial for trial in trials if trial.bracket == 1]
    for trial in tried:
        if not trial.rungs and not trial.failed:
            waiting = len(candidates.others) - len(tried) + 1
            return train(trial, left / waiting - fixed_seconds(candidates, trials))
    if len(tried) < len(candidates.others) and left > LEAST_SECONDS:
        return Next("new", 1, label=candidates.others[len(tried)])
    return Next("stop")


def optuna(candidates: Candidates, trials: Sequence[Trial], brackets: Sequence[Bracket], left: float) -> Next:
    """What TPE proposes, one complete trial after the other, each as long as a share would be at the start."""
    if (action := begin(candidates, trials, brackets)) is not None:
        return action
    fixed = fixed_seconds(candidates, trials)
    spent = sum(rung.seconds for trial in trials if trial.bracket == 1 for rung in trial.rungs)
    share = (left + spent) / len(candidates.others)
    for trial in trials:
        if trial.bracket == 1 and not trial.rungs and not trial.failed:
            return train(trial, min(share, left) - fixed)
    return Next("new", 1) if left >= min(share, fixed + LEAST_SECONDS) else Next("stop")


def begin(candidates: Candidates, trials: Sequence[Trial], brackets: Sequence[Bracket]) -> Next | None:
    """What both do first: a head that is solved, and the one round of all other trials."""
    for trial in trials:
        if trial.bracket == 0 and not trial.rungs and not trial.failed:
            return train(trial, LEAST_SECONDS)
    for label in candidates.at_once:
        if not any(trial.label == label for trial in trials):
            return Next("new", label=label)
    return None if brackets else Next("open", 1, opened=Bracket(len(candidates.others), LEAST_SECONDS))


def train(trial: Trial, seconds: float) -> Next:
    return Next("train", trial.bracket, trial=trial.number, seconds=max(LEAST_SECONDS, seconds))


WAYS: dict[str, Decide] = {"shares": shares, "optuna": optuna}


def lines_of(result: dict[str, Any]) -> list[str]:
    from benchmarks.tune_deadline import TUNE

    cases, ways = result["cases"], (TUNE, *WAYS)
    counts = {way: [cases[name][way] for name in cases if way in cases[name]] for way in ways}
    lines = [
        f"{way}: {sum(one['regret'] <= one['goal'] for one in found)} of {len(found)} cases within the goal, "
        f"{sum(one['regret'] > one['goal'] and not one['significant'] for one in found)} more not significantly worse."
        for way, found in counts.items()
    ]
    lines += ["", "| case | deadline | best compared | " + " | ".join(ways) + " |", "|---" * (3 + len(ways)) + "|"]
    for name, found in cases.items():
        cells = [cell(found.get(way)) for way in ways]
        any_of = next(iter(found.values()))
        lines.append(f"| {name} | {any_of['deadline']:.0f} s | {any_of['best']} | {' | '.join(cells)} |")
    return lines


def cell(one: dict[str, Any] | None) -> str:
    """'lora, regret 1.2 (2 candidates)'."""
    if one is None:
        return "-"
    unit = "%" if one["metric"] in ("loss", "bits_per_byte") else "pt"
    chance = "" if one["significant"] or one["regret"] <= one["goal"] else ", not significant"
    return f"{one['strategy']}: {one['regret']:.1f} {unit}{chance} ({one['candidates']} candidates)"


def main() -> None:
    from benchmarks.tune_deadline import TUNE, outcome, run

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--core", type=int, default=0)
    given = parser.parse_args()
    for name in given.only.split(","):
        for way in (TUNE, *WAYS):
            run(name, given.core, way)
    found = {name: {way: one for way in (TUNE, *WAYS) if (one := outcome(name, way)) is not None} for name in CASES}
    result = {"machine": machine(), "cases": {name: ways for name, ways in found.items() if ways}}
    write("tune_ways", result, lines_of(result))


if __name__ == "__main__":
    main()
