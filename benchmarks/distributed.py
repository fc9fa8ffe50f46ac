"""Speed of two processes relative to one process with two threads, on the same two cores.

    make quickstart && python -m benchmarks.distributed            # minutes; writes benchmarks/results/distributed.json and .md
    python -m benchmarks.distributed --dry-run                     # a tiny model, one round, writes nothing

The recipe is the quickstart's, shortened. Tokens per second are those of the report: of the training steps, without start and
end. Both cases have the same micro-batch, so that they run the same forward passes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

ROUNDS, STEPS, MICRO_BATCH = 3, 12, 2
CASES = {
    "1 process, 2 threads": (["--num-processes", "1"], "2"),
    "2 processes, 1 thread each": (["--num-processes", "2", "--accelerate-config", "cpu_ddp"], "1"),
}
FREE = ["model.dtype=float32"]  # settings of the dry run


def one(case: str, folder: Path, recipe: str, more: list[str], steps: int) -> dict[str, Any]:
    words, threads = CASES[case]
    settings = [
        f"training.max_steps={steps}",
        f"training.per_device_train_batch_size={MICRO_BATCH}",
        f"training.eval_steps={steps}",
        "training.load_best_model_at_end=false",
        "evaluation.max_rows=8",
        "evaluation.eval_on_start=false",
        "evaluation.samples=0",
        f"output_dir={folder}",
        *more,
    ]
    command = [sys.executable, "-m", "hfstrat", "train", recipe, *settings, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{case}: {ended.stdout[-1000:]}{ended.stderr[-2000:]}")
    result = json.loads((folder / "report.json").read_text())["result"]
    fields = ("tokens_per_second", "train_seconds", "total_seconds", "peak_memory_bytes")
    return {"case": case, **{key: result[key] for key in fields}, "loss": result["losses"][-1]["loss"]}


def tiny(folder: Path) -> tuple[str, list[str]]:
    """Return a recipe with a model and examples built here, and settings for it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_model, sentences, write_jsonl

    texts = sentences(400, seed=1)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": f"{n} {a}", "completion": b} for n, (a, b) in enumerate(pairs)])
    file = folder / "recipe.yaml"
    file.write_text(
        f"model: {make_model(folder / 'model')}\nstrategy: {{name: lora, r: 4}}\n"
        f"data: {{train: {rows}, eval_size: 8, max_length: 128}}\n"
        "training: {max_steps: 4, global_batch_size: 8, learning_rate: 1e-3, logging_steps: 1}\noutput_dir: run\n"
    )
    return str(file), FREE


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, one round; write nothing")
    dry = parser.parse_args().dry_run
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe, more = tiny(folder) if dry else ("recipes/quickstart.yaml", [])
        steps = 4 if dry else STEPS
        runs = []
        for turn in range(1 if dry else ROUNDS):
            for case in CASES if turn % 2 == 0 else reversed(CASES):
                runs.append(one(case, folder / f"{turn}-{case[0]}", recipe, more, steps))
                print(runs[-1], flush=True)
    speeds = speeds_of(runs)
    first, second = (statistics.median(speeds[case]) for case in CASES)
    result = {"machine": machine(), "runs": runs, "ratio": second / first}
    if dry:
        print("\n".join(lines_of(result)))
    else:
        write("distributed", result, lines_of(result))


def speeds_of(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Group tokens per second by case."""
    return {case: [run["tokens_per_second"] for run in runs if run["case"] == case] for case in CASES}


def lines_of(result: dict[str, Any]) -> list[str]:
    table = ["| | tokens/s (median) | range | loss of the last step |", "|---|---|---|---|"]
    for case, found in speeds_of(result["runs"]).items():
        loss = next(run["loss"] for run in result["runs"] if run["case"] == case)
        table.append(f"| {case} | {statistics.median(found):.0f} | {min(found):.0f} to {max(found):.0f} | {loss:.4f} |")
    return [
        *table,
        "",
        f"Two processes reach {result['ratio']:.2f} times the tokens per second of one process with two threads.",
    ]


if __name__ == "__main__":
    main()
