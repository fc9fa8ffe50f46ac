"""Write prompts whose answers can be checked: the signature of a Python function, to be answered as JSON.

    python scripts/demo_rewards.py data/docstrings data/json_answers

`train.jsonl` and `eval.jsonl` have prompt and answer, a JSON object with the name of the function and its parameters.
"""

from __future__ import annotations

import ast
import json
import random
import sys
from pathlib import Path
from typing import Any

ROWS = {"train": 1000, "eval": 200}
PARAMETERS = (1, 4)
EXAMPLE = [  # one turn that shows the form
    {"role": "user", "content": "def add(x, y)"},
    {"role": "assistant", "content": '{"name": "add", "parameters": ["x", "y"]}'},
]


def signature(prompt: str) -> dict[str, Any] | None:
    """The prompt and the answer for the function in a prompt of the docstrings; None if it does not fit."""
    code = prompt.partition("```python\n")[2].partition("\n```")[0]
    try:
        found = ast.parse(code).body[0]
    except (SyntaxError, IndexError):
        return None
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    names = [argument.arg for argument in [*found.args.posonlyargs, *found.args.args] if argument.arg not in ("self", "cls")]
    if not PARAMETERS[0] <= len(names) <= PARAMETERS[1]:
        return None
    line = f"def {found.name}({', '.join(names)})"
    return {
        "prompt": [*EXAMPLE, {"role": "user", "content": line}],
        "answer": json.dumps({"name": found.name, "parameters": names}),
    }


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    draw, known = random.Random(0), set[str]()
    for name, count in ROWS.items():
        rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {
            row["answer"]: row for row in map(signature, (row["prompt"] for row in rows)) if row and row["answer"] not in known
        }
        chosen = draw.sample(list(found.values()), min(count, len(found)))
        known |= {row["answer"] for row in chosen}
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
