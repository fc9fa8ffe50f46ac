"""Quality of the advisor's first choice. Regret is the best measured result less that of its first choice.

    python -m benchmarks.regret [--only sst2-100,stories] [--ask-only] [--measure-again]

Writes benchmarks/results/regret.json and .md. For each case the advisor is queried twice with the case's data, memory and time
(the budget plus the overhead of a run beyond its training): without measuring (`rules`) and with `--measure`. Then `hfstrat
compare` measures its own recipes of all strategies that fit: the same examples, the same budget, one seed, evaluated on
examples of a test set that it has not seen. Regret is in points of accuracy, or in percent of the best loss (bits per byte
where the tokenizers of the strategies differ); the goal is 1 point or 2 %. Differences that are not significant (paired
bootstrap) are marked. `benchmarks.tune_deadline` compares `hfstrat tune` with these runs.

Everything is stored in runs/benchmarks/regret: finished work is not repeated, and an interrupted case resumes. `--ask-only`
queries the advisor again, after a change of it, and measures nothing; the runs are those of the committed results where they
are not stored here. The first answer is stored too, and the table distinguishes it from a later one. What `--measure` found the
first time is used again, unless `--measure-again` is given: it has to be found on the machine, with the threads, of the runs,
or the steps that it predicts are not theirs. Reads ../shared, the demo model, data/docstrings, and MiniLM. To use both cores of
a machine, run one process on each: `taskset -c 0 env OMP_NUM_THREADS=1 python -m benchmarks.regret --only ... --no-table`, then
once `--ask-only` for the table.

Predicted before the first run of all, with the rules of that time (best; regret of the rules / after measuring):
  sst2-100       full .75                     2 points / 1
  trec6-100      full .72                     4 / 3
  trec6-1000     full .93                     1 / 1
  sst2-all       full .86                     1 / 1
  banking77-all  head .93                    10 / 10: 77 classes need more steps than there is time for
  stories        full                         2 % / 2 %
  shakespeare    full                         8 % / 8 %: one layer is too little for different texts
  docstrings     lora                       150 % / 150 %: scratch, as the others cannot take 20 steps in the time

  agnews-400     full .87                     1 point / 1
  imdb-500       lora .86                     0 / 0
  wikitext       full                         1 % / 2 %
  instructions   lora                         0 / 0
What was predicted for the second twelve cases stands in benchmarks/regret_cases.py. The first answers to them are a test of the
predictions, which learned from the first twelve alone; since then from all, each without its own data set.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, machine, write
from benchmarks.memory_prediction import model_folder
from benchmarks.regret_cases import CASES, SECOND, SETS, Case, rows_of
from benchmarks.regret_table import CONDITIONS, WAYS, table_of_cases
from hfstrat.advisor import decide

STORED = ROOT / "runs" / "benchmarks" / "regret"
MEMORY, MEASURING = "8GiB", 30.0
GOALS = {"points": 1.0, "percent": 2.0}
# of accuracy, or of the base's loss: strategies expected that far behind are not measured, nor are classifiers from scratch
HOPELESS = 0.5


OVERRIDES = ("evaluation.samples=0", "training.eval_steps=0.5")


def write_rows(case: Case, folder: Path) -> None:
    if (folder / "eval.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), rows_of(case), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ask(case: Case, folder: Path, measured: bool, known: dict[str, Any]) -> dict[str, Any]:
    """Return the advisor's answer, and write its recipes; `known` is what it measured in an earlier query."""
    from hfstrat.advisor import measure, recipes, show, speed
    from hfstrat.cli.advise import Request, situation_of
    from hfstrat.strategies import defaults

    (folder / "no-reports").mkdir(exist_ok=True)  # the times of earlier cases stay unknown, so that the order does not matter
    deadline = f"{case.budget + speed.START_SECONDS:.0f}s"
    past, data = folder / "no-reports", folder / "train.jsonl"
    request = Request(model_folder(case.model), str(data), memory=MEMORY, time=deadline, reports=str(past))
    situation = situation_of(request)
    if measured:
        found = decide.Measured(**known) if known else measure.measure(situation, defaults.ORDER, MEASURING)
        situation = replace(situation, measured=found)
    situation = replace(situation, runs=tuple(run for run in situation.runs if run.group != SETS.get(case.data, case.data)))
    advice = decide.decide(situation, defaults.ORDER)
    if not measured:
        made, top = folder / "recipes", max(scored.expected.merit for scored in advice.ranked)
        made.mkdir(exist_ok=True)
        for place, scored in enumerate(advice.ranked, 1):
            unknown = scored.expected.value is None and not situation.data.labels
            near = unknown or scored.expected.merit > top - HOPELESS
            if near and scored.name not in case.without and scored.fitted.fits_here:
                (made / f"{scored.name}.yaml").write_text(recipes.text_of(scored, place, situation), encoding="utf-8")
    answer: dict[str, Any] = json.loads(json.dumps(show.as_json(situation, advice), default=str))
    return answer


def answers_of(name: str, again: bool, measures: bool) -> dict[str, Any]:
    """Return the `first` and the `latest` answer of the advisor, each by rules and measured.

    Args:
        again: the latest answer is a new one.
        measures: and what `--measure` finds is measured again for it.
    """
    folder, case = STORED / name, CASES[name]
    write_rows(case, folder)
    file = folder / "advice.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if again or not found:
        known = found["latest"]["measured"]["measured"] if found and not measures else {}
        latest = {way: ask(case, folder, way == "measured", known) for way in ("rules", "measured")}
        found = {"first": found.get("first", latest), "latest": latest}
        file.write_text(json.dumps(found, indent=1))
    return found


def measure(name: str) -> None:
    """Run `hfstrat compare` on the advisor's recipes, as a user would; it resumes where it stopped."""
    folder = STORED / name
    files = [str(file) for file in sorted((folder / "recipes").glob("*.yaml"))]
    words = [sys.executable, "-m", "hfstrat", "compare", *files, *OVERRIDES, f"--budget={CASES[name].budget}s", "--seeds=1"]
    words += [f"--evaluate={folder / 'eval.jsonl'}", f"--output={folder / 'measured'}"]
    subprocess.run(words, cwd=ROOT, check=True)


def choice(answer: dict[str, Any]) -> list[str]:
    return [each["name"] for each in answer["strategies"] if each.get("can")]


def outcome(name: str) -> dict[str, Any] | None:
    """Return the regret by rules and after measuring; None where nothing is measured yet."""
    answers, runs = STORED / name / "advice.json", compared(name)
    if runs is None or not answers.is_file():
        return committed().get(name)
    entries = runs["measured"]
    best = entries[runs["best"]]

    def regret(label: str) -> float:
        distance = abs(best["quality"] - entries[label]["quality"])
        return 100 * distance / (1 if runs["higher_is_better"] else best["quality"])

    found = runs | {
        "goal": GOALS["points" if runs["higher_is_better"] else "percent"],
        "always": {label: regret(label) for label in ("lora", "head") if label in entries},
    }
    for when, ways in json.loads(answers.read_text()).items():
        for way, answer in ways.items():
            order = [label for label in choice(answer) if label in entries]
            one = {"order": order, "first": order[0], "regret": regret(order[0])} | predicted(answer, entries)
            found.setdefault(when, {})[way] = one | {
                "significant": entries[order[0]]["significant"],
                "steps": steps_of(answer, entries, runs["train_rows"]),
                "domain_gap": answer["measured"].get("domain_gap"),
                "probe_gain": answer["measured"].get("probe_gain"),
            }
    if (known := committed().get(name)) is not None:  # the folder of stored answers may be a new one
        found["first"] = known["first"]
    return found


def committed() -> dict[str, Any]:
    """The cases of the committed results."""
    file = ROOT / "benchmarks" / "results" / "regret.json"
    found: dict[str, Any] = json.loads(file.read_text())["cases"] if file.is_file() else {}
    return found


def compared(name: str) -> dict[str, Any] | None:
    """The compared runs of a case: those stored here, else the committed ones; None if there are none."""
    file = STORED / name / "measured" / "comparison.json"
    if not file.is_file():
        known = committed().get(name)
        return None if known is None else {key: value for key, value in known.items() if key not in ("first", "latest")}
    table = json.loads(file.read_text())
    if any(row["status"] == "waiting" for row in table["entries"]):
        return None
    entries = {row["label"]: row for row in table["entries"] if row["quality"] is not None}
    return {
        "case": CASES[name]._asdict(),
        "train_rows": table["rows"]["train_rows"],
        "eval_rows": table["rows"]["eval_rows"],
        "metric": table["quality"]["metric"],
        "higher_is_better": table["quality"]["higher_is_better"],
        "best": table["best"],
        "measured": {
            label: {key: row[key] for key in ("quality", "before", "seconds", "peak_memory_bytes")}
            | {"significant": (row.get("against_best") or {}).get("significant"), "steps": row["runs"][0].get("steps")}
            for label, row in entries.items()
        },
        "failed": {row["label"]: row["sentence"] for row in table["entries"] if row["quality"] is None},
    }


def steps_of(answer: dict[str, Any], entries: dict[str, Any], rows: int) -> dict[str, float]:
    """Predicted steps at the deadline, in multiples of those that were taken, of each strategy that takes steps."""
    found = {}
    for each in answer["strategies"]:
        taken = (entries.get(each["name"]) or {}).get("steps") or 0
        if each.get("can") and taken > 1:
            found[each["name"]] = each["time"]["epochs"] * rows / decide.GLOBAL_BATCH / taken
    return found


def predicted(answer: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """The expected quality of each strategy, and whether its measurement is within the 80 % interval."""
    places = {each["name"]: each for each in answer["strategies"] if each.get("can")}
    bases = [entries[name]["before"] for name in ("lora", "partial", "full", "head") if name in entries]
    found: dict[str, Any] = {name: each["expected"]["value"] for name, each in places.items()}
    inside = {}
    for name, row in entries.items():
        about = places.get(name, {}).get("expected", {})
        if about.get("value") is not None:
            value = row["quality"] if about["higher_is_better"] else row["quality"] / bases[0]
            inside[name] = bool(about["low"] <= value <= about["high"])
    return {"expected": found, "inside": inside}


def covered(found: dict[str, dict[str, Any]]) -> str:
    """State how many predictions hold the measurement in their interval."""
    inside = [flag for one in found.values() for flag in one["latest"]["measured"].get("inside", {}).values()]
    steps = [ratio for one in found.values() for ratio in one["latest"]["measured"].get("steps", {}).values()]
    words = f" {sum(inside)} of {len(inside)} predictions after measuring are within their 80 % interval." if inside else ""
    if steps:
        low, middle, high = np.quantile(steps, [0.1, 0.5, 0.9])
        words += f" Steps predicted after measuring, in multiples of those taken: median {middle:.2f}, "
        words += f"80 % from {low:.2f} to {high:.2f}."
    return words


def within(found: dict[str, dict[str, Any]], when: str = "latest") -> str:
    """State how many cases are within the goal, and how many more are not significantly worse.

    Args:
        when: `first` for the answers before anything was learned from these runs.
    """
    counts = []
    for way, words in WAYS.items():
        answers = [(one[when][way], one["goal"]) for one in found.values()]
        met = sum(answer["regret"] <= goal for answer, goal in answers)
        alike = sum(answer["regret"] > goal and not answer["significant"] for answer, goal in answers)
        counts.append(f"{words} {met} of {len(found)} cases ({alike} more are not significantly worse)")
    if when == "first":
        return ", ".join(counts)
    for label in ("lora", "head"):
        met = sum(one["always"].get(label, math.inf) <= one["goal"] for one in found.values())
        counts.append(f"always {label} {met}")
    return ", ".join(counts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CASES), help="cases")
    parser.add_argument("--ask-only", action="store_true", help="query the advisor again, and measure nothing")
    parser.add_argument("--measure-again", action="store_true", help="with --ask-only: also what `advise --measure` finds")
    parser.add_argument("--no-table", action="store_true", help="leave the results to another process")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := {*names} - {*CASES}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; cases are {', '.join(CASES)}")
    for name in names:
        for when, answer in answers_of(name, given.ask_only, given.measure_again).items():
            print(name, when, {way: choice(each) for way, each in answer.items()}, flush=True)
        if not given.ask_only:
            measure(name)
    found = {name: one for name in CASES if not given.no_table and (one := outcome(name)) is not None}
    if not found:
        return
    result = {"machine": machine(), "goals": GOALS, "cases": found}
    write("regret", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    found = result["cases"]
    words = f"Within {GOALS['points']:g} point, or {GOALS['percent']:g} % of the loss, of the best: {within(found)}. One seed."
    words += covered(found)
    words += f" The first answers: {within(found, 'first')}"
    if unseen := {name: one for name, one in found.items() if name in SECOND}:
        words += f"; of the second twelve, from which nothing had been learned yet: {within(unseen, 'first')}"
    words += "."
    return [words, CONDITIONS, "", *table_of_cases(found)]


if __name__ == "__main__":
    main()
