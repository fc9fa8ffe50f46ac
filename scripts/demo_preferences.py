"""Write preferences between two descriptions of a Python function: its own docstring, and that of another function.

    python scripts/demo_preferences.py data/docstrings data/preferences

`train.jsonl` and `eval.jsonl` have prompt, chosen and rejected; `labels.jsonl` has prompt, completion and label, for KTO.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ROWS = {"train": 1000, "eval": 200}


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pairs(rows: list[dict[str, str]], count: int, draw: random.Random) -> list[dict[str, object]]:
    """Each with the docstring of another function, never one with the same text."""
    chosen = draw.sample(rows, count)
    found: list[dict[str, object]] = []
    for row in chosen:
        other = draw.choice(rows)
        while other["completion"] == row["completion"]:
            other = draw.choice(rows)
        found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]})
    return found


def labels(rows: list[dict[str, object]], draw: random.Random) -> list[dict[str, object]]:
    """One answer of each pair with its label."""
    found: list[dict[str, object]] = []
    for row in rows:
        good = draw.random() < 0.5
        found.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return found


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in ROWS.items():
        made = pairs(read(source / f"{name}.jsonl"), count, draw)
        write(target / f"{name}.jsonl", made)
        if name == "train":
            write(target / "labels.jsonl", labels(made, draw))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
