"""LM head and loss alone, forward and backward: time, and peak memory beyond the inputs.

    python -m benchmarks.head_loss

Writes benchmarks/results/head_loss.json and .md. 1,024 tokens as 4 x 256, width 576, float32. Three ways to the same loss and
the same gradients: plain transformers (the logits of all positions, then `ForCausalLMLoss`), its `logits_to_keep` with a mask
(the logits of supervised positions), and hfstrat (`hfstrat.models.chunked_loss`). Time: medians of interleaved repeats in one
process; the ratio is the median of the ratios within each round. Memory: growth of the peak resident size of a fresh process
over one forward and backward pass, gradients included (`VmHWM`: a child's `ru_maxrss` starts at its parent's size).

Predicted before the first run, at 40 % supervised tokens: with a frozen head 0.38x the time of plain (0.4x the products; the
softmax stays in the cache) and 0.05x its memory; with a trainable head 0.42x the time (its gradient is traversed once per
chunk) and 0.4x the memory, most of it the gradient of the weight, of which two copies exist for a moment. At 100 %: 0.9x the
time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

BATCH, LENGTH, WIDTH, REPEATS = 4, 256, 576, 5
METHODS = ("plain", "logits_to_keep", "hfstrat")
CASES = [(v, share, trainable) for v in (32_000, 131_072) for share in (0.4, 1.0) for trainable in (False, True)]
GOAL = {"time": 0.45, "memory": 0.4}  # of plain, at 40 % supervised


def step(vocabulary: int, share: float, trainable: bool) -> Callable[[str], float]:
    """Return a function that runs one method, forward and backward, and returns the loss."""
    import torch
    from torch.nn import functional
    from transformers.loss.loss_utils import ForCausalLMLoss

    from hfstrat.data.collate import shift
    from hfstrat.models.chunked_loss import Head, head_loss

    torch.manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    weight = torch.empty(vocabulary, WIDTH).normal_(std=0.04).requires_grad_(trainable)
    labels = torch.randint(0, vocabulary, (BATCH, LENGTH))
    labels[:, : LENGTH - round(share * LENGTH)] = -100
    keep = shift(labels) != -100
    rows = keep.flatten().nonzero()[:, 0]
    targets = shift(labels).flatten()[rows]

    def loss_of(method: str) -> Any:
        if method == "plain":
            return ForCausalLMLoss(functional.linear(hidden, weight), labels, vocabulary)
        if method == "logits_to_keep":
            return functional.cross_entropy(functional.linear(hidden[keep], weight), targets)
        return head_loss(hidden.flatten(0, 1).index_select(0, rows), Head(weight), targets) / len(rows)

    def run(method: str) -> float:
        hidden.grad = weight.grad = None
        loss = loss_of(method)
        loss.backward()
        return float(loss.detach())

    return run


def timings(case: tuple[int, float, bool]) -> dict[str, dict[str, Any]]:
    """Time each method, in seconds, after a warm-up round."""
    run, seconds, losses = step(*case), {name: list[float]() for name in METHODS}, dict[str, float]()
    for turn in range(REPEATS + 1):
        for name in METHODS:
            started = time.perf_counter()
            losses[name] = run(name)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {"loss": losses[name], "median": statistics.median(s), "min": min(s), "max": max(s), "all": s}
        for name, s in seconds.items()
    }


def peak_growth(case: tuple[int, float, bool], method: str) -> int:
    """Return the bytes by which one forward and backward pass raise the peak of this process; call it in a fresh process."""
    run = step(*case)
    before = resident("VmRSS")
    run(method)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024


def in_fresh_process(case: tuple[int, float, bool], method: str) -> int:
    code = f"from benchmarks.head_loss import peak_growth; print(peak_growth({case!r}, {method!r}))"
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    results: list[dict[str, Any]] = []
    for case in CASES:
        measured = timings(case)
        for name in METHODS:
            measured[name]["peak_bytes"] = in_fresh_process(case, name)
        results.append({"vocabulary": case[0], "supervised": case[1], "head_learns": case[2], "methods": measured})
        print(json.dumps(results[-1]), flush=True)
    for one in results:
        methods: Any = one["methods"]
        pairs = zip(methods["hfstrat"]["all"], methods["plain"]["all"], strict=True)
        one["ratio_to_plain"] = {
            "time": statistics.median(ours / plain for ours, plain in pairs),
            "memory": methods["hfstrat"]["peak_bytes"] / methods["plain"]["peak_bytes"],
        }
    result = {"machine": machine(), "goals": GOAL, "results": results}
    write("head_loss", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        "| vocabulary | supervised | head | " + " | ".join(f"{name}" for name in METHODS) + " | hfstrat relative to plain |",
        "|---|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    for one in result["results"]:
        methods, ratio = one["methods"], one["ratio_to_plain"]
        cells = [f"{methods[name]['median']:.3f} s, {methods[name]['peak_bytes'] / 2**20:,.0f} MiB" for name in METHODS]
        head = "trainable" if one["head_learns"] else "frozen"
        table.append(
            f"| {one['vocabulary']:,} | {one['supervised']:.0%} | {head} | {' | '.join(cells)} | "
            f"{ratio['time']:.2f}x time, {ratio['memory']:.2f}x memory |"
        )
    return [*table, "", f"Goal at 40 % supervised: {GOAL['time']}x the time and {GOAL['memory']}x the memory of plain."]


if __name__ == "__main__":
    main()
