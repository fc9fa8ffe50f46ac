"""Predicted memory of complete runs of `hfstrat train` compared with the peak of the process, as its report has it.

    python -m benchmarks.memory_complete [--some N]

Writes benchmarks/results/memory_complete.json and .md, and the error that `hfstrat advise` quotes. Examples are those of the
first cases of benchmarks/regret; language models train for 20 steps, `full` on classes for 10. The share of the imported
libraries, the baselines and the features of a head were fitted on the trec6-1000 runs and on a set-up of sst2-all; the others
were measured after that, and nothing was changed in their light. Errors are also given of what is above the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import RESULTS, ROOT, machine, write
from benchmarks.memory_prediction import error_of, model_folder
from benchmarks.regret_cases import FIRST, rows_of

CASES = {  # data, strategy, max_length, steps
    "trec6-1000 head": ("trec6-1000", "head", 48, None),
    "sst2-all head": ("sst2-all", "head", 48, None),
    "imdb-500 head": ("imdb-500", "head", 256, None),
    "trec6-1000 full": ("trec6-1000", "full", 48, 10),
    "shakespeare full": ("shakespeare", "full", 512, 20),
    "stories lora": ("stories", "lora", 512, 20),
}


def recipe_of(name: str, folder: Path) -> Path:
    data, strategy, length, steps = CASES[name]
    case = FIRST[data]
    for part, rows in zip(("train", "eval"), rows_of(case), strict=True):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labeled = case.model == "MiniLM"
    recipe: dict[str, Any] = {
        "task": "text-classification" if labeled else "causal-lm",
        "model": model_folder(case.model),
        "strategy": {"name": strategy},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": length},
        "evaluation": {"samples": 0},
        "output_dir": str(folder / "run"),
    }
    recipe["data"] |= {} if labeled else {"overflow": "split"}
    recipe |= {"training": {"max_steps": steps, "eval_steps": 1.0}} if steps else {}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def measure(name: str) -> float:
    with tempfile.TemporaryDirectory() as place:
        file = recipe_of(name, Path(place))
        subprocess.run([sys.executable, "-m", "hfstrat", "train", str(file)], cwd=ROOT, capture_output=True, check=True)
        return float(json.loads((Path(place) / "run" / "report.json").read_text())["result"]["peak_memory_bytes"])


def compared(measured: dict[str, float]) -> list[dict[str, Any]]:
    from hfstrat.advisor import recipes, speed
    from hfstrat.advisor.hardware import import_bytes
    from hfstrat.recipe.load import load_recipe

    rows = []
    for name, peak in measured.items():
        with tempfile.TemporaryDirectory() as place:
            recipe = load_recipe(str(recipe_of(name, Path(place)))).recipe
            found = recipes.predict_one(recipe, speed.Rate(1e10, "any: memory alone is read"))[0]["memory_bytes"]
        above = (found - import_bytes(True)) / (peak - import_bytes(True)) - 1
        rows.append({"name": name, "measured": peak, "predicted": found, "error": above, "error_of_process": found / peak - 1})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--some", type=int, default=1000)
    left, stored = parser.parse_args().some, RESULTS / "memory_complete.json"
    measured = {row["name"]: row["measured"] for row in json.loads(stored.read_text())["rows"]} if stored.is_file() else {}
    for name in CASES:
        if name not in measured and left > 0:
            left -= 1
            measured[name] = measure(name)
            print(name, f"{measured[name] / 2**20:.0f} MiB", flush=True)
    rows = compared(measured)
    file = ROOT / "hfstrat" / "advisor" / "constants.json"
    constants = json.loads(file.read_text())
    constants["memory_band"] = {name: round(value, 4) for name, value in error_of(rows).items()}
    file.write_text(json.dumps(constants, indent=1) + "\n")
    result = {"machine": machine(), "rows": rows}
    write("memory_complete", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    rows, band = result["rows"], error_of(result["rows"])
    lines = [
        f"Error of what is above the imported libraries: median {band['median']:.1%}, worst {band['worst']:.1%}.",
        "",
        "| run | process peak | predicted | error | error above the imports |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[key] / 2**20:,.0f} MiB" for key in ("measured", "predicted"))
        lines.append(f"| {row['name']} | {sizes} | {row['error_of_process']:+.1%} | {row['error']:+.1%} |")
    return lines


if __name__ == "__main__":
    main()
