"""`hfstrat tune` killed at random moments (kill -9), again and again, beside the same search without a kill.

    python -m benchmarks.tune_kills [--kills 20] [--seed 0]

MiniLM on 1,000 rows of trec6, 90 seconds of search. After each kill the same command continues. Checked: every rung that was
recorded before a kill is there after it, with the same score; the search finishes; the result is verified. Time that a kill
made vain does not count, so both searches have the same time, but not the same moments: their winners are compared by accuracy
on the test rows. Writes benchmarks/results/tune_kills.json and .md.

Predicted before the first run: nothing lost in 20 kills, the same strategy wins, test accuracy within 2 points.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write
from benchmarks.memory_prediction import model_folder
from benchmarks.regret import write_rows
from benchmarks.regret_cases import FIRST

FOLDER = ROOT / "runs" / "benchmarks" / "tune_kills"
SEARCH, LONGEST = "90s", 25.0  # seconds until a kill, at most


def command(output: Path) -> list[str]:
    words = [sys.executable, "-m", "hfstrat", "tune", f"--model={model_folder('MiniLM')}", f"--data={FOLDER / 'train.jsonl'}"]
    words += [f"--eval-data={FOLDER / 'eval.jsonl'}", "--strategies=head,partial,lora,full", "evaluation.samples=0"]
    return [*words, f"--time={SEARCH}", f"--output-dir={output}"]


def rungs(output: Path) -> dict[tuple[int, int], float]:
    """The score of each recorded rung, by trial and rung."""
    from hfstrat.tuning.store import Store

    if not (output / "study.log").is_file():
        return {}
    trials = Store(output, 42).trials()
    return {(trial.number, place): rung.score for trial in trials for place, rung in enumerate(trial.rungs)}


def killed(output: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Run the search with kills; returns how many there were, and what was lost."""
    done, lost, known = 0, 0, dict[tuple[int, int], float]()
    while True:
        child = subprocess.Popen(command(output), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        until = time.monotonic() + draw.uniform(1.0, LONGEST) if done < kills else float("inf")
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if child.poll() is not None:
            code = child.returncode
            break
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        done += 1
        found = rungs(output)
        lost += sum(found.get(key) != score for key, score in known.items())
        known = found
        print(f"kill {done}: {len(known)} rungs recorded, {lost} lost", flush=True)
    lost += sum(rungs(output).get(key) != score for key, score in known.items())
    return {"kills": done, "lost": lost, "code": code, **result_of(output)}


def result_of(output: Path) -> dict[str, Any]:
    table = json.loads((output / "tune.json").read_text())
    won = next(trial for trial in table["trials"] if trial["wins"])
    report = json.loads((output / "report.json").read_text())
    return {
        "winner": won["label"],
        "settings": won["settings"],
        "trials": len(table["trials"]),
        "accuracy": table["luck"]["value"],
        "low": table["luck"]["low"],
        "high": table["luck"]["high"],
        "verified": bool(report["result"]["verified"]["bit_equal"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    write_rows(FIRST["trec6-1000"], FOLDER)
    whole = killed(FOLDER / "whole", 0, random.Random(given.seed))
    stopped = killed(FOLDER / "killed", given.kills, random.Random(given.seed))
    result = {"machine": machine(), "search": SEARCH, "whole": whole, "killed": stopped}
    write("tune_kills", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        "| search | kills | rungs lost | trials | winner | accuracy on test rows (95 %) | verified |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("whole", "killed"):
        one = result[name]
        accuracy = f"{one['accuracy']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
        won = f"{one['winner']} ({one['settings']})"
        cells = [name, one["kills"], one["lost"], one["trials"], won, accuracy, one["verified"]]
        table.append(f"| {' | '.join(map(str, cells))} |")
    return table


if __name__ == "__main__":
    main()
