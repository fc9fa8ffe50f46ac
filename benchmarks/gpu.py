"""Everything that wants GPUs, in one call: the tests, then a table of what each way of sharing costs.

    python -m benchmarks.gpu [--model Qwen/Qwen2.5-0.5B] [--gpus 8]      # writes benchmarks/results/gpu.json and .md
    python -m benchmarks.gpu --dry-run                                   # on CPUs, with a tiny model; nothing is written

The tests (tests/gpu) run first; a failure is reported in the table and does not stop the rest. Then the same recipe is carried
out on one GPU and on all of them, for every Accelerate config that this machine can have, by LoRA and by full fine-tuning.
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
KEPT = ("tokens_per_second", "train_seconds", "peak_memory_bytes")


def configs(gpus: int, dry: bool) -> list[tuple[str, int]]:
    """Names and numbers of processes."""
    if dry:
        return [("single", 1), ("cpu_ddp", 2)]
    several = [name for name in CONFIGS[1:] if not name.startswith("deepspeed") or importlib.util.find_spec("deepspeed")]
    return [("single", 1), *((name, gpus) for name in several if gpus > 1)]


def one(recipe: str, settings: list[str], strategy: str, config: str, processes: int, folder: Path) -> dict[str, Any]:
    """One run; what failed says so."""
    words = [f"strategy={strategy}", *settings, f"output_dir={folder}", "--accelerate-config", config]
    command = [sys.executable, "-m", "hfstrat", "train", recipe, *words, "--num-processes", str(processes)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"strategy": strategy, "config": config, "processes": processes, "code": ended.returncode}
    if ended.returncode:
        return row | {"said": (ended.stderr.strip().splitlines() or ["?"])[-1]}
    result = json.loads((folder / "report.json").read_text())["result"]
    return row | {key: result[key] for key in KEPT} | {"loss": result["metrics_after"]["loss"]}


def tests(dry: bool) -> dict[str, Any]:
    words = ["--collect-only"] if dry else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines()
    return {"code": ended.returncode, "last": lines[-1] if lines else "", "skipped": [s for s in lines if s.startswith("SKIP")]}


def data(folder: Path) -> tuple[str, list[str]]:
    """The quickstart's rows: 384 tokens at most, made from the standard library."""
    subprocess.run([sys.executable, "scripts/demo_data.py", str(folder)], cwd=ROOT, check=True)
    return "recipes/quickstart.yaml", [f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder or Hub id")
    parser.add_argument("--gpus", type=int, help="how many; by default all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dry-run", action="store_true", help="on CPUs, with a tiny model; nothing is written")
    asked = parser.parse_args()
    from hfstrat.run.launch import count_gpus

    gpus = asked.gpus or count_gpus()
    if not gpus and not asked.dry_run:
        sys.exit("this machine has no GPU; --dry-run shows what would be done")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tested = tests(asked.dry_run)
    print(f"tests/gpu: {tested['last']}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if asked.dry_run:
            recipe, settings = tiny(folder)
        else:
            recipe, settings = data(folder)
            settings += [f"model={asked.model}", f"training.max_steps={asked.steps}", "training.global_batch_size=64"]
            settings += ["training.per_device_train_batch_size=4", "training.learning_rate=2e-5", "evaluation.samples=0"]
        rows = []
        for strategy in STRATEGIES:
            for config, processes in configs(gpus, asked.dry_run):
                rows.append(one(recipe, settings, strategy, config, processes, folder / f"{strategy}-{config}"))
                print(rows[-1], flush=True)
    table = [f"tests/gpu: {tested['last']}", "", "| strategy | config | processes | tokens/s | peak of rank 0 | eval loss |"]
    table.append("|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['strategy']} | {row['config']} | {row['processes']} |"
        if row["code"]:
            table.append(f"{start} ended with {row['code']}: {row['said'][:80]} | | |")
        else:
            peak = row["peak_memory_bytes"] / 2**30
            table.append(f"{start} {row['tokens_per_second']:.0f} | {peak:.2f} GiB | {row['loss']:.4f} |")
    if asked.dry_run:
        print("\n".join(table))
    else:
        write("gpu", {"machine": machine(), "gpus": gpus, "model": asked.model, "tests": tested, "runs": rows}, table)


if __name__ == "__main__":
    main()
