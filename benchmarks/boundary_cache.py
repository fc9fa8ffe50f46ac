"""Frozen hidden states computed once and cached, compared with computing them in every epoch: a text classifier.

    python -m benchmarks.boundary_cache [float32] [bfloat16] [checkpointing]

Writes benchmarks/results/boundary_cache.json and .md; parts that are not named keep their stored result. The model is a random
BERT with 12 layers (width 384, as in MiniLM-L12) and 3 classes. The last 2 layers, the pooler and the classifier are trained;
the frozen part has no dropout. 480 examples of 40 to 64 random tokens, 3 epochs, batches of 8, AdamW. Both ways run the same
loop. The time of the cached way includes everything: finding the boundary, its checks, hashing the weights, computing (also 8
evaluation examples, which are not evaluated here), writing and reading. Each repeat starts with an empty cache. Three
interleaved repeats in one process follow a short warm-up.

Predicted before the first run: the formula gives 1.71x for E = 3, Ff = 10, Ft = 2. Expected were 1.6x in float32, since checks
and hashes cost about 3 % of such a short run and the optimizer step is in both, and 1.5x in bfloat16, where the frozen part
gains more than the trainable part, whose weights are rounded in every step. The goal is 1.5x.

The second table compares activation checkpointing on the same model and trainable part, without cached states, 20 steps per
repeat in float32: none; hfstrat's, which skips the frozen blocks before the first trainable weight; and the switch of
transformers, which makes the output of the embeddings require gradients. Predicted: hfstrat's costs one more forward pass of 2
of 12 layers, 10 % over none; that of transformers runs the frozen part forward twice and backward once, and is 2x as slow. The
goal: hfstrat's is not slower.

The first run, with 160 examples and partly in parallel with other work, gave 1.47x (1.46 to 1.50) in float32 and 1.38x (1.36 to
1.57) in bfloat16, both below the goal. Checkpointing cost 20 % over none, twice the prediction; that of transformers was 2.1x
as slow as hfstrat's.

Breakdown of that run with 160 examples (float32, 7.9 s in total): 0.45 s do not grow with the number of examples (finding the
boundary 0.08, detecting randomness 0.08, the check 0.09, hashing weights and file 0.06, the evaluation examples 0.12, fsync
0.01), 2.3 s compute the states, and 5.1 s train, of which 0.15 s is neither trainable layers nor optimizer (embeddings, reading
examples, collating): little is left to save. The formula ignores that the forward pass of a trainable layer costs more than
that of a frozen one: 17 against 12 ms in float32 and 10 against 4.4 ms in bfloat16 (its dropout, and its float32 weights
rounded in every step). With this the ceiling is 1.63x and 1.52x. Predicted from these parts for 480 examples: 1.58x and 1.41x.
Measured: 1.57x (1.52 to 1.58), above the goal, and 1.43x (1.41 to 1.45), below it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

from benchmarks.measure import RESULTS, machine, write

ROWS, EPOCHS, BATCH, LAYERS, LAST, REPEATS, GOAL = 480, 3, 8, 12, 2, 3, 1.5
WARM, STEPS = 40, 20
PARTS = ("float32", "bfloat16", "checkpointing")


def model_of(dtype: Any) -> Any:
    """Build a random classifier whose last layers are trainable."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from hfstrat.models.load import set_precision

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4000, hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=1536, num_labels=3
    )
    model = BertForSequenceClassification(config).requires_grad_(False)
    for module in (*model.bert.encoder.layer[LAYERS - LAST :], model.bert.pooler, model.classifier):
        module.requires_grad_(True)
    set_precision(model, dtype)
    return model


def rows_of() -> Any:
    """Return a dataset of random token ids."""
    import numpy as np
    from datasets import Dataset

    rng = np.random.default_rng(0)
    lengths = rng.integers(40, 65, ROWS)
    return Dataset.from_list([{"input_ids": rng.integers(5, 4000, n).tolist(), "length": int(n), "row": 0} for n in lengths])


def collate(rows: list[dict[str, Any]]) -> Any:
    import torch

    ids = torch.zeros(len(rows), 64, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def run(dtype: Any, wish: bool, rows: Any) -> dict[str, float]:
    """Train three epochs; return the seconds in total, those before the first step, and the last loss."""
    import numpy as np
    import torch
    from rich.console import Console
    from torch.nn import functional

    from hfstrat.strategies.frozen.precompute import precompute
    from hfstrat.trainer.plan import Plan
    from hfstrat.trainer.train_data import TrainData

    model, count = model_of(dtype), len(rows)
    steps = EPOCHS * count // BATCH
    plan = Plan(steps, BATCH, 1, BATCH, BATCH, steps, steps, count)
    feed = TrainData(rows, rows.select(range(BATCH)), collate, plan, dtype, torch.device("cpu"), Console(quiet=True))
    started = time.perf_counter()
    feed = precompute(feed, model, wish, still=True)
    ready = time.perf_counter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    model.train()
    for epoch in range(EPOCHS):
        for places in np.random.default_rng(epoch).permutation(count).reshape(-1, BATCH):
            torch.manual_seed(epoch)
            batch = feed.collate([feed.train[int(place)] for place in places])
            with feed.autocast():
                logits = model(**batch).logits
            loss = functional.cross_entropy(logits.float(), torch.as_tensor(places % 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {"seconds": time.perf_counter() - started, "before": ready - started, "loss": float(loss.detach())}


def checkpointed(way: str, rows: Any) -> dict[str, float]:
    """Train twenty steps with one way of activation checkpointing; return the seconds and the last gradient norm."""
    import torch

    from hfstrat.models.blocks import checkpoint_activations

    model = model_of(torch.float32)
    if way == "transformers":
        model.activation_checkpointing_enable()
    checkpoint_activations(model, way == "hfstrat")
    model.train()
    started = time.perf_counter()
    for step in range(STEPS):
        torch.manual_seed(step)
        model.zero_grad()
        labels = torch.arange(BATCH) % 3
        model(**collate([rows[BATCH * step + place] for place in range(BATCH)]), labels=labels).loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"seconds": time.perf_counter() - started, "gradient": float(norm)}


def checkpointing(rows: Any) -> dict[str, Any]:
    """Run all ways of activation checkpointing in interleaved repeats."""
    ways = ("none", "hfstrat", "transformers")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(REPEATS + 1):
        for way, taken in found.items():
            one = checkpointed(way, rows)
            taken += [one] if turn else []
    return found


def table_of_checkpointing(found: dict[str, Any]) -> list[str]:
    table = ["| activation checkpointing | time of 20 steps | relative to hfstrat |", "|---|---|---|"]
    for way, runs in found.items():
        seconds = statistics.median(one["seconds"] for one in runs)
        ratio = statistics.median(one["seconds"] / ours["seconds"] for one, ours in zip(runs, found["hfstrat"], strict=True))
        table.append(f"| {way} | {seconds:.2f} s | {ratio:.2f}x |")
    return table


def boundary(dtype: Any, rows: Any) -> dict[str, Any]:
    """Run both ways in interleaved repeats; return their times and the speed-up of the cached way."""
    found: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    for turn in range(REPEATS + 1):
        for wish, taken in found.items():
            with tempfile.TemporaryDirectory() as folder:
                os.environ["HFSTRAT_CACHE"] = folder
                one = run(dtype, wish == "on", rows if turn else rows.select(range(WARM)))
            taken += [one] if turn else []
    ratios = [each["seconds"] / once["seconds"] for each, once in zip(found["off"], found["on"], strict=True)]
    return {"rows": len(rows), "runs": found, "ratio": statistics.median(ratios), "ratios": ratios}


def main(parts: list[str]) -> None:
    import torch

    rows, file = rows_of(), RESULTS / "boundary_cache.json"
    result = json.loads(file.read_text()) if file.exists() else {"results": {}}
    result |= {"machine": machine(), "goal": GOAL}
    for name in parts or PARTS:
        if name == "checkpointing":
            result[name] = checkpointing(rows)
        else:
            result["results"][name] = boundary(getattr(torch, name), rows)
        print(json.dumps({name: result.get(name, result["results"].get(name))}), flush=True)
        write("boundary_cache", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        "| precision | examples | computed in each epoch | computed once | of which before the first step | speed-up | range |"
    ]
    table.append("|" + "---|" * 7)
    for name, one in result["results"].items():
        each, once, before = (
            statistics.median(r[field] for r in one["runs"][wish])
            for wish, field in (("off", "seconds"), ("on", "seconds"), ("on", "before"))
        )
        spread = f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}"
        cells = (name, one["rows"], f"{each:.2f} s", f"{once:.2f} s", f"{before:.2f} s", f"{one['ratio']:.2f}x", spread)
        table.append(f"| {' | '.join(map(str, cells))} |")
    words = (
        f"The last {LAST} of {LAYERS} layers are trained for {EPOCHS} epochs. The formula's ceiling is 1.71x, the goal {GOAL}x."
    )
    second = table_of_checkpointing(result["checkpointing"]) if "checkpointing" in result else []
    return [*table, "", words, "", *second]


if __name__ == "__main__":
    main(sys.argv[1:])
