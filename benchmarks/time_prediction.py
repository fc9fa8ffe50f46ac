"""The advisor's predicted times compared with those of real runs: with `--measure`, and from the rate of a matrix product.

    python -m benchmarks.time_prediction [--some N]

Writes benchmarks/results/time_prediction.json and .md; `hfstrat advise` quotes their error bands. For each case a child process
takes real steps within 36 s, as for `hfstrat advise --measure`; then `hfstrat train` trains the recipe for some steps in one of
its own. Compared are the seconds of its steps (without evaluations and checkpoints). `others` is the prediction from the
measured steps of the other strategies with the same model, `product` that from the machine's matrix products alone. Finished
cases are stored in runs/benchmarks; other load on the machine distorts the result.

Predicted before the first run: with real steps a median of 8 %, worst 20 %, because widths change from step to step; from other
strategies 15 and 40 %; from the product 30 % and a factor of two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import ROOT, machine, write
from benchmarks.memory_prediction import error_of, model_folder

STORED = ROOT / "runs" / "benchmarks" / "time_prediction.jsonl"
SHARED = ROOT.parent / "shared" / "data"
STEPS, SECONDS = {"MiniLM": 40, "SmolLM2-135M": 8, "stories260K": 40}, 12.0
GOALS = {"median": 0.10, "worst": 0.25}
CASES = [
    (model, data, strategy)
    for model, data, strategies in (
        ("MiniLM", "trec6", ("partial", "lora", "full")),
        ("SmolLM2-135M", "docstrings", ("partial", "lora", "full")),
        ("stories260K", "docstrings", ("lora", "full")),
    )
    for strategy in strategies
]


def rows_of(data: str) -> str:
    return str(SHARED / "trec6" / "train.csv") if data == "trec6" else str(ROOT / "data" / "docstrings" / "train.jsonl")


def situation_of(model: str, data: str) -> Any:
    from hfstrat.cli.advise import Request, situation_of

    return situation_of(Request(model=model_folder(model), data=rows_of(data), memory="64GiB"))


def one(model: str, data: str, strategy: str) -> dict[str, Any]:
    """Return the measured rate (operations per second), and the seconds and operations of a real run."""
    from hfstrat.advisor import candidates, decide, measure, recipes, speed
    from hfstrat.trainer.plan import modest_micro_batch

    situation = situation_of(model, data)
    fitted = decide.decide(situation, [strategy]).ranked[0].fitted
    quick = measure.measure(situation, [strategy], 3 * SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes.recipe_of(fitted, situation, {})
        recipe["training"] |= {"max_steps": STEPS[model], "eval_steps": STEPS[model], "load_best_model_at_end": False}
        if "precompute" in type(fitted.candidate.strategy).model_fields:
            recipe["strategy"] = {**recipe["strategy"], "precompute": False}
        recipe["evaluation"] = {"eval_on_start": False, "samples": 0, "max_rows": 16}
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump({**recipe, "output_dir": str(Path(folder) / "run")}))
        words = [sys.executable, "-m", "hfstrat.train", str(file)]
        subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
        result = json.loads((Path(folder) / "run" / "report.json").read_text())["result"]
    found = candidates.propose(strategy, situation.model, situation.data)
    load = speed.work(
        found.model,
        found.description._replace(keeps_prefix=False),
        situation.data.mean_length,
        situation.data.supervised_share,
    )
    passes = -(-decide.GLOBAL_BATCH // modest_micro_batch(decide.GLOBAL_BATCH, situation.data.cut_lengths))
    product = speed.rate_of(situation.device)
    product = speed.on_cpu(product, found.model, found.description, load, situation.data.supervised_share, passes)
    return {
        "rate": quick.rates[strategy],
        "fixed": quick.fixed[strategy],
        "steps": STEPS[model],
        "product": product._asdict(),
        "tokens": result["tokens"],
        "seconds": result["step_seconds"],
        "operations": load.training * result["tokens"],
    }


def run_some(count: int) -> dict[str, dict[str, Any]]:
    STORED.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in STORED.read_text().splitlines()] if STORED.exists() else []
    done = {line["name"]: line["found"] for line in lines}
    for case in CASES:
        name = " ".join(case)
        if name in done or count <= 0:
            continue
        count -= 1
        done[name] = one(*case)
        with STORED.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "found": done[name]}) + "\n")
        print(name, done[name], flush=True)
    return done


def predictions(done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Predict each case from each source of the rate; `others` is the median of the same model's other strategies."""
    rows = []
    for name, found in done.items():
        beside = [other for key, other in done.items() if key.split()[0] == name.split()[0] and key != name]
        of_product = found["product"]
        rates = {"measured": (found["rate"], found["fixed"], 0.0)}
        rates |= {"product": (of_product["value"], of_product["fixed"], of_product["token"])}
        if beside:
            middle = [statistics.median(other[key] for other in beside) for key in ("rate", "fixed")]
            rates["others"] = (middle[0], middle[1], 0.0)
        for source, (rate, fixed, token) in rates.items():
            predicted = found["operations"] / rate + fixed * found["steps"] + token * found["tokens"]
            error = predicted / found["seconds"] - 1
            rows.append({"name": name, "source": source, "seconds": found["seconds"], "predicted": predicted, "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--some", type=int, default=1000)
    done = run_some(parser.parse_args().some)
    rows = predictions(done)
    if not rows:
        return
    sources = ("measured", "others", "product")
    bands = {
        source: error_of([row for row in rows if row["source"] == source])
        for source in sources
        if any(row["source"] == source for row in rows)
    }
    if len(done) == len(CASES):  # the bands need all of them
        file = ROOT / "hfstrat" / "advisor" / "constants.json"
        constants = json.loads(file.read_text())
        constants["time_bands"] = {name: {k: round(v, 4) for k, v in band.items()} for name, band in bands.items()}
        file.write_text(json.dumps(constants, indent=1) + "\n")
    result = {"machine": machine(), "goals": GOALS, "bands": bands, "rows": rows}
    write("time_prediction", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    errors = (f"{name}: median {band['median']:.1%}, worst {band['worst']:.1%}" for name, band in result["bands"].items())
    goals = f"goals with --measure {GOALS['median']:.0%} and {GOALS['worst']:.0%}"
    table = ["| run | rate from | measured | predicted | error |", "|---|---|---|---|---|"]
    table += [
        f"| {row['name']} | {row['source']} | {row['seconds']:.1f} s | {row['predicted']:.1f} s | {row['error']:+.1%} |"
        for row in rows
    ]
    return [f"{len({row['name'] for row in rows})} of {len(CASES)} cases. Errors: {'; '.join(errors)} ({goals}).", "", *table]


if __name__ == "__main__":
    main()
