"""All GPU checks in one call: the tests, throughput against TRL, and the cost of each way to distribute.

    python -m benchmarks.gpu [--minutes 10] [--gpus 8]     # writes benchmarks/results/gpu.json, gpu.md and gpu.svg
    python -m benchmarks.gpu --dry-run                     # on CPUs, with a tiny model; writes nothing

1. tests/gpu; a failure is reported and does not stop the rest.
2. Tokens per second, MFU, peak memory and the loss afterwards of hfstrat, TRL with its fastest settings, and TRL with Liger
   where that is installed: `benchmarks.gpu_cells`, for LoRA (r=16, all linear layers) and full fine-tuning of 1, 3 and 8
   billion parameters, with rows of 4,096 tokens and with short rows. The contenders of a cell run one after the other, cells by
   what they tell; what does not fit into the minutes is left out, from the end. With time left everything runs again. The peak
   of MFU is that of a matrix product in the same call. The float32 reference runs last.
3. With several GPUs: the quickstart's recipe for every Accelerate config that this machine supports.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.distributed import tiny
from benchmarks.measure import RESULTS, ROOT, machine, write

CELLS = (  # by what they tell
    ("8B", "lora", "short"),
    ("8B", "lora", "full"),
    ("1B", "full", "full"),
    ("1B", "lora", "short"),
    ("3B", "full", "short"),
    ("3B", "lora", "full"),
    ("1B", "full", "short"),
    ("8B", "full", "full"),
    ("3B", "lora", "short"),
    ("1B", "lora", "full"),
    ("3B", "full", "full"),
    ("8B", "full", "short"),
)
CONTENDERS = ("hfstrat", "trl", "trl-liger", "hfstrat-compiled", "hfstrat-float8")
REFERENCE = ("1B", "lora", "short", "float32")
STEPS = {"1B": 16, "3B": 10, "8B": 8, "tiny": 6}
ROUNDS = 3
GUESS = {"1B": 40.0, "3B": 60.0, "8B": 90.0, "tiny": 20.0}  # seconds of a process, before one is measured
CONFIGS = ("ddp", "fsdp2", "fsdp2_offload", "deepspeed_zero2", "deepspeed_zero3")
STRATEGIES = ("lora", "full")
FIELDS = ("tokens_per_second", "train_seconds", "peak_memory_bytes")

Case = tuple[str, str, str, str]


class Results:
    """What has been measured; written after each process, so that nothing is lost at a time limit."""

    def __init__(self, dry: bool, about: dict[str, Any]) -> None:
        self.dry, self.found = dry, about | {"cells": [], "distribution": []}

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.found[kind].append(row)
        print(row, flush=True)
        if not self.dry:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")


def runs(strategy: str, contender: str) -> bool:
    """Whether a contender has the packages that it needs, and trains with the strategy."""
    needed = {"trl-liger": "liger_kernel", "hfstrat-float8": "torchao"}.get(contender)
    has_it = needed is None or importlib.util.find_spec(needed) is not None
    return has_it and (contender not in ("hfstrat-compiled", "hfstrat-float8") or strategy == "full")


def cases(dry: bool) -> list[Case]:
    """Everything to run once, the most telling first."""
    cells = [("tiny", "lora", "short"), ("tiny", "full", "full")] if dry else CELLS
    found = [(*cell, contender) for cell in cells for contender in CONTENDERS if runs(cell[1], contender)]
    return [*found, ("tiny", "lora", "short", "float32") if dry else REFERENCE]


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Run one process; returns its result, or the last line of its error."""
    words = [sys.executable, "-m", "benchmarks.gpu_cells", "--one", *case, str(folder), str(STEPS[case[0]])]
    started = time.monotonic()
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    row: dict[str, Any] = dict(zip(("shape", "strategy", "rows", "contender"), case, strict=True))
    row["seconds"] = time.monotonic() - started
    if ended.returncode:
        return row | {"error": last_line(ended.stderr)}
    return row | json.loads(ended.stdout.strip().splitlines()[-1])


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["?"])[-1][:200]


def measure_cells(results: Results, until: float, dry: bool) -> None:
    """Run all cases, then again, as long as the next one is expected to end in time."""
    took: dict[Case, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(1 if dry else ROUNDS):
            for case in cases(dry):
                expected = took.get(case, GUESS[case[0]])
                if time.monotonic() + expected > until:
                    continue
                row = run_case(case, Path(scratch))
                took[case] = row["seconds"]
                results.add("cells", row)


def peak() -> float:
    """Operations per second of a bfloat16 matrix product on this device."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_cells", "--matmul"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(json.loads(ended.stdout.strip().splitlines()[-1])["peak"])


def run_tests(dry: bool) -> dict[str, Any]:
    words = ["--collect-only"] if dry else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines()
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    skipped = [line for line in lines if line.startswith("SKIP")]
    return {"code": ended.returncode, "last": lines[-1] if lines else "", "failed": failed, "skipped": skipped}


# several GPUs


def distribute(results: Results, gpus: int, given: argparse.Namespace) -> None:
    """The quickstart's recipe on one process and on all, for every Accelerate config."""
    found = [("cpu_ddp", 2)] if given.dry_run else []
    for name in CONFIGS if gpus > 1 else ():
        if not name.startswith("deepspeed") or importlib.util.find_spec("deepspeed"):
            found.append((name, gpus))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.dry_run:
            recipe, settings = tiny(folder)
        else:
            subprocess.run([sys.executable, "scripts/demo_data.py", str(folder)], cwd=ROOT, check=True)
            recipe, settings = (
                "recipes/quickstart.yaml",
                [f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}"],
            )
            settings += [f"model={given.model}", f"training.max_steps={given.steps}", "training.global_batch_size=64"]
            settings += ["training.per_device_train_batch_size=4", "training.learning_rate=2e-5", "evaluation.samples=0"]
        for strategy in STRATEGIES if found else ():
            for config, processes in [("single", 1), *found]:
                place = folder / f"{strategy}-{config}"
                results.add("distribution", run_config(recipe, settings, strategy, config, processes, place))


def run_config(recipe: str, settings: list[str], strategy: str, config: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train once; returns the result, or the exit code and the last line of the error."""
    words = [f"strategy={strategy}", *settings, f"output_dir={folder}", "--accelerate-config", config]
    command = [sys.executable, "-m", "hfstrat", "train", recipe, *words, "--num-processes", str(processes)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"strategy": strategy, "config": config, "processes": processes, "code": ended.returncode}
    if ended.returncode:
        return row | {"error": last_line(ended.stderr)}
    result = json.loads((folder / "report.json").read_text())["result"]
    return row | {key: result[key] for key in FIELDS} | {"loss": result["metrics_after"]["loss"]}


# the table and the chart


def medians(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each cell and contender: medians over the rounds, or the error."""
    groups: dict[Case, list[dict[str, Any]]] = {}
    for row in found["cells"]:
        groups.setdefault((row["shape"], row["strategy"], row["rows"], row["contender"]), []).append(row)
    rows = []
    for group in groups.values():
        done = [row for row in group if "error" not in row]
        if not done:
            rows.append(group[-1])
            continue
        middle = {
            key: statistics.median(row[key] for row in done)
            for key in ("tokens_per_second", "operations_per_second", "peak_bytes", "loss")
        }
        rows.append(done[-1] | middle | {"runs": len(done), "mfu": middle["operations_per_second"] / found["peak"]})
    return rows


def lines_of(found: dict[str, Any]) -> list[str]:
    failed = [f"- {line}" for line in found["tests"]["failed"]]
    table = [
        f"tests/gpu: {found['tests']['last']}",
        *failed,
        "",
        f"Peak of a bfloat16 matrix product: {found['peak'] / 1e12:.1f} TFLOP/s.",
        "",
        "| model | strategy | rows | contender | tokens/s | speed-up | MFU | peak memory | micro-batch | loss | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = medians(found)
    ours = {cell_of(row): row["tokens_per_second"] for row in rows if row["contender"] == "hfstrat" and "error" not in row}
    for row in rows:
        start = f"| {row['shape']} | {row['strategy']} | {row['rows']} | {row['contender']} |"
        if "error" in row:
            table.append(f"{start} {row['error'][:80]} | | | | | | |")
            continue
        own = ours.get(cell_of(row))
        ratio = f"{own / row['tokens_per_second']:.2f}x" if own else ""
        how = f"{row['micro_batch']}{', packed' * row['packed']}{', checkpointing' * row['checkpointing']}"
        table.append(
            f"{start} {row['tokens_per_second']:,.0f} | {ratio} | {row['mfu']:.1%} | {row['peak_bytes'] / 2**30:.1f} GiB "
            f"| {how} | {row['loss']:.4f} | {row['runs']} |"
        )
    return [*table, *distribution_lines(found["distribution"])]


def cell_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["shape"], row["strategy"], row["rows"]


def distribution_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    table = [
        "",
        "| strategy | config | processes | tokens/s | peak memory of rank 0 | eval loss |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['strategy']} | {row['config']} | {row['processes']} |"
        if row["code"]:
            table.append(f"{start} ended with {row['code']}: {row['error'][:80]} | | |")
        else:
            memory = row["peak_memory_bytes"] / 2**30
            table.append(f"{start} {row['tokens_per_second']:.0f} | {memory:.2f} GiB | {row['loss']:.4f} |")
    return table


def chart(found: dict[str, Any]) -> str:
    """Bars of tokens per second by cell and contender, each cell relative to its fastest, as SVG."""
    rows = [row for row in medians(found) if "error" not in row and row["contender"] in CONTENDERS]
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        best[cell_of(row)] = max(best.get(cell_of(row), 0.0), row["tokens_per_second"])
    colors, parts = dict(zip(CONTENDERS, ("#2463a8", "#b5651d", "#6b6b6b", "#5a9bd4", "#7fb069"), strict=True)), []
    for place, row in enumerate(rows):
        top, wide = 30 + 18 * place, 300 * row["tokens_per_second"] / best[cell_of(row)]
        name = " ".join((*cell_of(row), row["contender"]))
        parts.append(f'<text x="8" y="{top + 11}">{name}</text><rect x="190" y="{top}" width="{wide:.0f}" height="14" ')
        parts.append(f'fill="{colors[row["contender"]]}"/>')
        parts.append(f'<text x="{196 + wide:.0f}" y="{top + 11}">{row["tokens_per_second"]:,.0f}</text>')
    style = "<style>text{font:12px sans-serif}</style>"
    title = '<text x="8" y="18">tokens per second; the bars of a cell are relative to its fastest</text>'
    size = f'width="580" height="{40 + 18 * len(rows)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{title}{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0, help="for the tests and the cells")
    parser.add_argument(
        "--model", default="models/SmolLM2-135M-Instruct", help="of the runs on several GPUs: a folder or a Hub id"
    )
    parser.add_argument("--gpus", type=int, help="number of GPUs; default: all")
    parser.add_argument("--steps", type=int, default=40, help="of the runs on several GPUs")
    parser.add_argument("--dry-run", action="store_true", help="on CPUs, with a tiny model; write nothing")
    given = parser.parse_args()
    from hfstrat.run.launch import count_gpus

    until = time.monotonic() + 60 * given.minutes
    gpus = given.gpus or count_gpus()
    if not gpus and not given.dry_run:
        sys.exit("this machine has no GPU; use --dry-run to see what would run")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tested = run_tests(given.dry_run)
    print(f"tests/gpu: {tested['last']}", flush=True)
    results = Results(given.dry_run, {"machine": machine(), "gpus": gpus, "tests": tested, "peak": peak()})
    measure_cells(results, until, given.dry_run)
    distribute(results, gpus, given)
    if given.dry_run:
        print("\n".join(lines_of(results.found)))
        return
    write("gpu", results.found, lines_of(results.found))
    (RESULTS / "gpu.svg").write_text(chart(results.found), encoding="utf-8")


if __name__ == "__main__":
    main()
