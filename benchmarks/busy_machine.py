"""Training speed beside another program: OpenMP threads that spin at barriers, for several lengths of the spin.

    python -m benchmarks.busy_machine

Each run is a fresh process that trains a random model of 6 million parameters (batches of 2 x 96 tokens, 2 threads). It
measures alternating blocks of steps, quiet and beside a process that keeps one core busy. Runs with different settings
alternate in rounds. `hfstrat` is what importing hfstrat sets; `unset` is the default of the OpenMP library. The prediction
written down before the first run: a short spin keeps at least 0.4 of the quiet speed beside one busy core, and costs at most
5 % without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.measure import machine, rounds, write

SETTINGS: dict[str, dict[str, str]] = {
    "unset": {},
    "hfstrat": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
ROUNDS, BLOCKS, SECONDS, ROWS, WIDTH = 3, 3, 1.5, 2, 96
BUSY = "while True: pass"


def one(setting: str, threads: int) -> dict[str, Any]:
    """Tokens per second with this setting, quiet and busy."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        os.environ.pop(name, None)
    os.environ |= SETTINGS[setting] | {"OMP_NUM_THREADS": str(threads)}
    if setting == "hfstrat":
        import hfstrat  # noqa: F401
    return {"setting": setting, "threads": threads, **speeds()}


def speeds() -> dict[str, list[float]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 2048}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 2048, (ROWS, WIDTH))

    def measure(seconds: float) -> float:
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        return steps * ids.numel() / (time.perf_counter() - started)

    measure(0.0)  # compiles kernels
    found: dict[str, list[float]] = {"quiet": [], "busy": []}
    for _ in range(BLOCKS):
        found["quiet"].append(measure(SECONDS))
        other = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            found["busy"].append(measure(SECONDS))
        finally:
            other.kill()
            other.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "THREADS"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--threads", type=int, nargs="*", default=[2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--note", default="", help="on the state of the machine, for the result")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]))))
        return
    load = os.getloadavg()[0]
    cases = [[setting, str(threads)] for threads in given.threads for setting in given.settings]
    found = rounds("busy_machine", cases, given.rounds)
    result = {"machine": machine(), "load_before": load, "note": given.note, "runs": found}
    write("busy_machine", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        "| OpenMP setting | threads | quiet, tokens/s | one core busy, tokens/s | busy / quiet | quiet / unset |",
        "|" + "---|" * 6,
    ]
    medians: dict[tuple[str, int], dict[str, float]] = {}
    for runs in result["runs"].values():
        key = (runs[0]["setting"], runs[0]["threads"])
        medians[key] = {state: statistics.median(v for run in runs for v in run[state]) for state in ("quiet", "busy")}
    for (setting, threads), speed in medians.items():
        plain = medians.get(("unset", threads), speed)["quiet"]
        table.append(
            f"| {setting} | {threads} | {speed['quiet']:.0f} | {speed['busy']:.0f} | {speed['busy'] / speed['quiet']:.2f} "
            f"| {speed['quiet'] / plain:.2f} |"
        )
    blocks = sum(len(run["quiet"]) for run in next(iter(result["runs"].values())))
    note = f" {result['note']}" if result["note"] else ""
    return [
        *table,
        "",
        f"Medians of {blocks} blocks; load average of the machine before the first run {result['load_before']:.1f}.{note}",
    ]


if __name__ == "__main__":
    main()
