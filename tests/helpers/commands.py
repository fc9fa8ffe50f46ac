"""The commands of the tool, run as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.runs import run
from hfstrat.recipe.load import load_recipe

PYTHON = [sys.executable, "-m"]


def hfstrat(*words: str, module: str = "hfstrat", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYTHON, module, *words], capture_output=True, text=True, timeout=180, check=False, env={**os.environ, **environment}
    )


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "report.json").read_text())["result"]["losses"]]


ROOT = Path(__file__).parents[2]


MODEL, DATA = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "data" / "docstrings"


def quickstart(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    paths = (f"data.train={DATA / 'train.jsonl'}", f"data.eval={DATA / 'eval.jsonl'}", f"output_dir={tmp_path / 'run'}")
    short = ("training.max_steps=6", "training.eval_steps=6", "evaluation.max_rows=8", "evaluation.max_new_tokens=16")
    report = run(load_recipe(str(ROOT / "recipes" / "quickstart.yaml"), [f"model={MODEL}", *paths, *short, *overrides]))
    assert report is not None
    return report["result"]
