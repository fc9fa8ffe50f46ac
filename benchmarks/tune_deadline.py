"""`hfstrat tune` with no more than the time of one run: is its result as good as the best strategy's, and is it in time?

    python -m benchmarks.tune_deadline [--only CASE,...] [--core N] [--table]

For each case of `benchmarks.regret`: the time that each of its compared runs had for training, plus that of a start. The result
is measured on the same rows and in the same metric as those runs, whose measurements are those in results/regret.json; its
distance from the best of them is that of two means, and it is called significant where it is larger than the 95 % interval of a
difference of two independent means of this width, which is wider than a paired one. One core, one thread, one seed. The machine
has to be of the kind of those runs. The advisor, which orders the candidates, has not seen the runs on the case's data set.
`--table` writes the results of all cases that have run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write
from benchmarks.memory_prediction import model_folder
from benchmarks.regret import GOALS, OVERRIDES, STORED, committed, write_rows
from benchmarks.regret_cases import CASES, SETS

ROWS = "evaluation rows"
SEEN = False  # whether the advisor has learned from the compared runs
# the command, whose advisor has not seen the runs on the case's own data set
WITHOUT = """
import sys, tempfile
from pathlib import Path
from hfstrat.advisor import measured_runs
from hfstrat.cli import advise
group = sys.argv.pop(1)
with tempfile.TemporaryDirectory() as folder:
    others = [run for run in measured_runs.read(measured_runs.FILE) if run.group != group]
    measured_runs.write(others, Path(folder) / "runs.csv")
    measured_runs.FILE = Path(folder) / "runs.csv"
    advise.RUNS = folder  # no runs of ours
    from benchmarks.tune_ways import follow
    follow(sys.argv.pop(1))
    from hfstrat.cli.main import main
    main()
"""
TUNE = "tune"  # the way in which `hfstrat tune` searches; benchmarks.tune_ways has others
STRATEGIES = ("head", "partial", "lora", "full", "distill", "scratch")


def place_of(name: str, way: str) -> Path:
    """The folder of a search; the file beside it has what came out."""
    return STORED / name / ("deadline" if way == TUNE else f"deadline-{way}")


def run(name: str, core: int, way: str = TUNE) -> None:
    """Search in some way, and store what came out."""
    from hfstrat.advisor import speed
    from hfstrat.data import cache

    case, folder = CASES[name], STORED / name
    tuned, data = place_of(name, way), folder / "eval.jsonl"
    file = tuned.with_suffix(".json")
    if file.is_file():
        return
    write_rows(case, folder)
    known = compared()[name]
    deadline = case.budget + speed.START_SECONDS
    named = ",".join(each for each in STRATEGIES if each in known["measured"])
    words = [sys.executable, "-c", WITHOUT, SETS.get(case.data, case.data), way, "tune"]
    words += [f"--model={model_folder(case.model)}", f"--data={folder / 'train.jsonl'}"]
    words += [f"--strategies={named}", OVERRIDES[0], f"--time={deadline:.0f}s", f"--eval-data={data}", f"--output-dir={tuned}"]
    with tempfile.TemporaryDirectory() as fresh:  # nothing but the speed of the machine is known from earlier runs
        if (rates := cache.folder() / speed.RATES_FILE).is_file():
            shutil.copy(rates, fresh)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HFSTRAT_CACHE": fresh}
        started = time.monotonic()
        subprocess.run(["taskset", "-c", str(core), *words], cwd=ROOT, check=True, env=environment)
        seconds = time.monotonic() - started
    table = json.loads((tuned / "tune.json").read_text())
    won = next(trial for trial in table["trials"] if trial["wins"])
    found = {
        "strategy": won["label"],
        "settings": won["settings"],
        "candidates": len(table["trials"]),
        "deadline": deadline,
        "seconds": seconds,
        **measured(tuned, data, known["metric"], core),
    }
    file.write_text(json.dumps(found, indent=1))


def measured(tuned: Path, data: Path, metric: str, core: int) -> dict[str, float]:
    """The result on all rows of a file: what `tune` measured, or `hfstrat evaluate` where it had no time for all of them."""
    file, rows = tuned / "other_rows.json", len(data.read_text().splitlines())
    if not file.is_file() or json.loads(file.read_text())["measured"][ROWS]["rows"] < rows:
        file = tuned / "all_rows.json"
        words = [sys.executable, "-m", "hfstrat", "evaluate", str(tuned), f"--data={data}", f"--json={file}", *OVERRIDES[:1]]
        subprocess.run(["taskset", "-c", str(core), *words], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, float] = json.loads(file.read_text())["measured"][ROWS]["after"][metric]
    return {key: found[key] for key in ("value", "low", "high")}


def compared() -> dict[str, Any]:
    """The compared runs of each case."""
    return committed()


def outcome(name: str, way: str = TUNE) -> dict[str, Any] | None:
    """The regret of a case; None where it has not run."""
    file = place_of(name, way).with_suffix(".json")
    if not file.is_file():
        return None
    found, known = json.loads(file.read_text()), compared()[name]
    best = known["measured"][known["best"]]["quality"]
    worse = (best - found["value"]) if known["higher_is_better"] else (found["value"] - best)
    width = math.sqrt(2) * (found["high"] - found["low"]) / 2
    scale = 100 if known["higher_is_better"] else 100 / best
    about = {"metric": known["metric"], "best": known["best"], "best_quality": best, "goal": known["goal"]}
    return found | about | {"regret": scale * worse, "significant": abs(worse) > width}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases; default: all that were compared")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only write the results")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(compared())
    for name in names if not given.table else []:
        run(name, given.core)
    found = {name: one for name in compared() if (one := outcome(name)) is not None}
    result = {"machine": machine(), "goals": GOALS, "seen": SEEN, "cases": found}
    if given.table:
        write("tune_deadline", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    cases = result["cases"].values()
    met = sum(one["regret"] <= one["goal"] for one in cases)
    alike = sum(one["regret"] > one["goal"] and not one["significant"] for one in cases)
    late = [one["seconds"] / one["deadline"] - 1 for one in cases]
    words = (
        f"Within {GOALS['points']:g} point, or {GOALS['percent']:g} % of the loss, of the best compared run: {met} of "
        f"{len(cases)} cases, and {alike} more are not significantly worse. More than 5 % late: "
        f"{sum(each > 0.05 for each in late)}; at most {max(late):+.0%}. One core and thread, one seed; the compared runs are "
        "those of regret.json"
    )
    words += ", and the advisor, which orders the candidates, had seen them." if result["seen"] else "."
    titles = ["case", "deadline", "took", "best compared", "`tune` chose", "candidates", "its result", "regret"]
    rows = [cells_of(name, one) for name, one in result["cases"].items()]
    return [words, "", *(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))]


def cells_of(name: str, one: dict[str, Any]) -> list[str]:
    is_share = one["metric"] not in ("loss", "bits_per_byte")

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if is_share else f"{value:.3f}"

    regret = f"{one['regret']:.1f} {'pt' if is_share else '%'}"
    chance = "" if one["significant"] or one["regret"] <= one["goal"] else " (not significant)"
    return [
        name,
        f"{one['deadline']:.0f} s",
        f"{one['seconds']:.0f} s",
        f"{one['best']} {show(one['best_quality'])}",
        f"{one['strategy']}, {one['settings']}" if one["settings"] else one["strategy"],
        str(one["candidates"]),
        f"{show(one['value'])} ({show(one['low'])} to {show(one['high'])})",
        regret + chance,
    ]


if __name__ == "__main__":
    main()
