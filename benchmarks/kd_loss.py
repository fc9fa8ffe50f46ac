"""Two LM heads and the divergence between them, forward and backward: time, and peak memory beyond the inputs.

    python -m benchmarks.kd_loss

Writes benchmarks/results/kd_loss.json and .md. 1,024 tokens as 4 x 256, 40 % of them supervised, V = 32,000, width 576,
float32, forward KL at temperature 1. Four ways to the same loss and the same gradients: both models' logits of all positions,
then the divergence of the supervised ones (plain); TRL's GKD loss on the same logits; TRL's chunked kernel, which its
DistillationTrainer calls (on a CPU with all positions, masked afterwards); and hfstrat (`hfstrat.strategies.distill.loss`).
Time: medians of interleaved repeats in one process; ratios are medians of the ratios within each round. Memory: growth of the
peak resident size of a fresh process over one forward and backward pass, gradients included.

Predicted before the first run: with a frozen head 0.3x the time of plain (0.4x of three matrix products, and the softmaxes stay
in the CPU cache) and 0.15x its memory; with a trainable head 0.35x and 0.35x, because of the weight's gradient (74 MB, two
copies for a moment). TRL's kernel: 1.3x the time of plain, since it computes both products twice, and 0.5x its memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.head_loss import resident
from benchmarks.measure import ROOT, machine, write

BATCH, LENGTH, WIDTH, VOCABULARY, SHARE, REPEATS = 4, 256, 576, 32_000, 0.4, 3
METHODS = ("plain", "trl_gkd", "trl_distillation", "hfstrat")
GOAL = {"time": 0.4, "memory": 0.25}  # of plain


def step(trainable: bool, methods: tuple[str, ...] = METHODS) -> Callable[[str], float]:
    """Return a function that runs one method, forward and backward, and returns the loss."""
    import torch
    from torch.nn import functional

    from hfstrat.data.collate import shift
    from hfstrat.models.chunked_loss import Head
    from hfstrat.strategies.distill.loss import Mix, Teacher, distill_loss

    if any(name.startswith("trl") for name in methods):
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    torch.manual_seed(0)
    hidden, theirs = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True), torch.randn(BATCH, LENGTH, WIDTH)
    weight = torch.empty(VOCABULARY, WIDTH).normal_(std=0.04).requires_grad_(trainable)
    their_weight = torch.empty(VOCABULARY, WIDTH).normal_(std=0.04)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    labels[:, : LENGTH - round(SHARE * LENGTH)] = -100
    targets = shift(labels)
    rows = (targets != -100).flatten().nonzero()[:, 0]

    def loss_of(method: str) -> Any:
        if method == "hfstrat":
            teacher = Teacher(VOCABULARY, theirs.flatten(0, 1).index_select(0, rows), Head(their_weight))
            picked = hidden.flatten(0, 1).index_select(0, rows)
            return distill_loss(picked, Head(weight), targets.flatten()[rows], teacher, Mix(alpha=1.0)) / len(rows)
        if method == "trl_distillation":
            flat = hidden.flatten(0, 1), theirs.flatten(0, 1)
            apart, _ = ChunkedDivergenceFunction.apply(flat[0], weight, None, flat[1], their_weight, None, 0.0, 1.0)
            return (apart * (targets != -100).flatten()).sum() / len(rows)
        ours, other = functional.linear(hidden, weight), functional.linear(theirs, their_weight)
        if method == "trl_gkd":
            return GKDTrainer.generalized_jsd_loss(ours, other, targets, beta=0, reduction="batchmean")
        apart = functional.kl_div(ours.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True)
        return apart.sum(-1)[targets != -100].mean()

    def run(method: str) -> float:
        hidden.grad = weight.grad = None
        loss = loss_of(method)
        loss.backward()
        return float(loss.detach())

    return run


def timings(trainable: bool) -> dict[str, dict[str, Any]]:
    """Time each method, in seconds, after a warm-up round."""
    run, seconds, losses = step(trainable), {name: list[float]() for name in METHODS}, dict[str, float]()
    for turn in range(REPEATS + 1):
        for name in METHODS:
            started = time.perf_counter()
            losses[name] = run(name)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: {"loss": losses[name], "median": statistics.median(s), "all": s} for name, s in seconds.items()}


def peak_growth(trainable: bool, method: str) -> int:
    """Return the bytes by which one forward and backward pass raise the peak of this process; call it in a fresh process."""
    run = step(trainable, (method,))
    before = resident("VmRSS")
    run(method)
    return resident("VmHWM") - before


def in_fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    results: list[dict[str, Any]] = []
    for trainable in (False, True):
        methods = timings(trainable)
        for name in METHODS:
            code = f"from benchmarks.kd_loss import peak_growth; print(peak_growth({trainable!r}, {name!r}))"
            methods[name]["peak_bytes"] = int(in_fresh(code))
        pairs = zip(methods["hfstrat"]["all"], methods["plain"]["all"], strict=True)
        ratio = {
            "time": statistics.median(ours / plain for ours, plain in pairs),
            "memory": methods["hfstrat"]["peak_bytes"] / methods["plain"]["peak_bytes"],
        }
        results.append({"head_learns": trainable, "methods": methods, "ratio_to_plain": ratio})
        print(json.dumps(results[-1]), flush=True)
    threads = int(in_fresh("import torch; print(torch.get_num_threads())"))
    result = {"machine": machine(), "threads": threads, "goals": GOAL, "results": results}
    write("kd_loss", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = ["| head | " + " | ".join(METHODS) + " | hfstrat relative to plain |", "|---|" + "---|" * (len(METHODS) + 1)]
    for one in result["results"]:
        head, ratio = "trainable" if one["head_learns"] else "frozen", one["ratio_to_plain"]
        cells = [f"{each['median']:.3f} s, {each['peak_bytes'] / 2**20:,.0f} MiB" for each in one["methods"].values()]
        table.append(f"| {head} | {' | '.join(cells)} | {ratio['time']:.2f}x time, {ratio['memory']:.2f}x memory |")
    goal = f"Goal: {GOAL['time']}x the time and {GOAL['memory']}x the memory of plain. Threads: {result['threads']}."
    return [*table, "", goal]


if __name__ == "__main__":
    main()
