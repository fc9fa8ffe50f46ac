"""All GPU checks in one call: the tests, then a table of the cost of each way to distribute.

    python -m benchmarks.gpu [--model Qwen/Qwen2.5-0.5B] [--gpus 8]      # writes benchmarks/results/gpu.json and .md
    python -m benchmarks.gpu --dry-run                                   # on CPUs, with a tiny model; writes nothing

The tests (tests/gpu) run first; a failure is reported in the table and does not stop the rest. Then the same recipe runs on one
GPU and on all of them, with LoRA and full fine-tuning, for every Accelerate config that this machine supports.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.distributed import tiny
from benchmarks.measure import ROOT, machine, write

CONFIGS = ("single", "ddp", "fsdp2", "fsdp2_offload", "deepspeed_zero2", "deepspeed_zero3")
STRATEGIES = ("lora", "full")
FIELDS = ("tokens_per_second", "train_seconds", "peak_memory_bytes")


def configs(gpus: int, dry: bool) -> list[tuple[str, int]]:
    """List the Accelerate configs to run, each with its number of processes."""
    if dry:
        return [("single", 1), ("cpu_ddp", 2)]
    several = [name for name in CONFIGS[1:] if not name.startswith("deepspeed") or importlib.util.find_spec("deepspeed")]
    return [("single", 1), *((name, gpus) for name in several if gpus > 1)]


def one(recipe: str, settings: list[str], strategy: str, config: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train once; return the result, or the exit code and the last line of the error."""
    words = [f"strategy={strategy}", *settings, f"output_dir={folder}", "--accelerate-config", config]
    command = [sys.executable, "-m", "hfstrat", "train", recipe, *words, "--num-processes", str(processes)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"strategy": strategy, "config": config, "processes": processes, "code": ended.returncode}
    if ended.returncode:
        return row | {"error": (ended.stderr.strip().splitlines() or ["?"])[-1]}
    result = json.loads((folder / "report.json").read_text())["result"]
    return row | {key: result[key] for key in FIELDS} | {"loss": result["metrics_after"]["loss"]}


def tests(dry: bool) -> dict[str, Any]:
    words = ["--collect-only"] if dry else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines()
    return {"code": ended.returncode, "last": lines[-1] if lines else "", "skipped": [s for s in lines if s.startswith("SKIP")]}


def data(folder: Path) -> tuple[str, list[str]]:
    """Build the quickstart's data (at most 384 tokens each); return its recipe and settings."""
    subprocess.run([sys.executable, "scripts/demo_data.py", str(folder)], cwd=ROOT, check=True)
    return "recipes/quickstart.yaml", [f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder or a Hub id")
    parser.add_argument("--gpus", type=int, help="number of GPUs; default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dry-run", action="store_true", help="on CPUs, with a tiny model; write nothing")
    given = parser.parse_args()
    from hfstrat.run.launch import count_gpus

    gpus = given.gpus or count_gpus()
    if not gpus and not given.dry_run:
        sys.exit("this machine has no GPU; use --dry-run to see what would run")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tested = tests(given.dry_run)
    print(f"tests/gpu: {tested['last']}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.dry_run:
            recipe, settings = tiny(folder)
        else:
            recipe, settings = data(folder)
            settings += [f"model={given.model}", f"training.max_steps={given.steps}", "training.global_batch_size=64"]
            settings += ["training.per_device_train_batch_size=4", "training.learning_rate=2e-5", "evaluation.samples=0"]
        rows = []
        for strategy in STRATEGIES:
            for config, processes in configs(gpus, given.dry_run):
                rows.append(one(recipe, settings, strategy, config, processes, folder / f"{strategy}-{config}"))
                print(rows[-1], flush=True)
    result = {"machine": machine(), "gpus": gpus, "model": given.model, "tests": tested, "runs": rows}
    if given.dry_run:
        print("\n".join(lines_of(result)))
    else:
        write("gpu", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        f"tests/gpu: {result['tests']['last']}",
        "",
        "| strategy | config | processes | tokens/s | peak memory of rank 0 | eval loss |",
    ]
    table.append("|---|---|---|---|---|---|")
    for row in result["runs"]:
        start = f"| {row['strategy']} | {row['config']} | {row['processes']} |"
        if row["code"]:
            table.append(f"{start} ended with {row['code']}: {row['error'][:80]} | | |")
        else:
            peak = row["peak_memory_bytes"] / 2**30
            table.append(f"{start} {row['tokens_per_second']:.0f} | {peak:.2f} GiB | {row['loss']:.4f} |")
    return table


if __name__ == "__main__":
    main()
