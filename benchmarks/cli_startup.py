"""Response time of the command line: help, a mistake in a recipe, a mistake in the data.

    python -m benchmarks.cli_startup

Writes benchmarks/results/cli_startup.json and .md. Each command is a fresh process. The cases are interleaved, so that noise on
the machine affects all of them. A bare `python -c pass` is the lower limit for any tool.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import interleaved, machine, write

GOALS = {"help": 0.4, "a misspelled key": 0.5, "a missing file": 0.5, "an invalid row": 0.5}


def cases(folder: Path) -> dict[str, list[str]]:
    good = "strategy: lora\noutput_dir: " + str(folder / "run") + "\nmodel: " + str(folder / "model") + "\n"
    (folder / "misspelled.yaml").write_text(good + "data: rows.jsonl\ntraining: {learning_rat: 1e-4}\n")
    (folder / "missing.yaml").write_text(good + f"data: {folder / 'nothing.jsonl'}\n")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 100 + '{"prompt": \n')
    (folder / "broken.yaml").write_text(good + f"data: {folder / 'broken.jsonl'}\n")
    run = ["-m", "hfstrat"]
    return {
        "python -c pass": ["-c", "pass"],
        "help": [*run, "--help"],
        "a misspelled key": [*run, "train", str(folder / "misspelled.yaml")],
        "a missing file": [*run, "check", str(folder / "missing.yaml")],
        "an invalid row": [*run, "train", str(folder / "broken.yaml")],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        timings = interleaved(cases(Path(scratch)), repeats=11)
    result = {"machine": machine(), "goals_s": GOALS, "timings_s": timings}
    write("cli_startup", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = ["| command | median | slowest | goal |", "|---|---|---|---|"]
    for name, seconds in result["timings_s"].items():
        goal = f"{GOALS[name]:.1f} s" if name in GOALS else "-"
        table.append(f"| {name} | {seconds['median']:.3f} s | {seconds['max']:.3f} s | {goal} |")
    return table


if __name__ == "__main__":
    main()
