"""Cost of being able to resume: checkpoints as a share of training, and the time to return to the position in the data.

    python -m benchmarks.resume

Writes benchmarks/results/resume.json and .md.

Position: an interrupted run of 200,000 steps of 16 examples is resumed after 0 ... 100,000 of them (a model of 60 thousand
parameters on generated examples; the checkpoint's step is set, nothing else differs). Measured is the time between the loaded
checkpoint and the first new batch. Each position is a process of its own, three rounds, interleaved. For comparison, the
library's own way: it draws everything that was seen from the sampler again. Goal: constant, within half a second.

Overhead: 40 steps of SmolLM2-135M-Instruct, lora and full, with a checkpoint every 20 steps; seconds of saving (hashes, fsync
and rotation included) over seconds of training, and the part of marker and fsync. Goal: lora under 2 %.

Predicted before the first run: 0.3 s at 100,000 steps, where the library takes about 4 s; lora 0.5 %, full 10 % (short steps).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, rounds, write

POSITIONS = (0, 1_000, 10_000, 100_000)
STEPS, SIZE, ROWS, REPEATS = 200_000, 16, 20_000, 3
MODEL, DATA = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "data" / "docstrings"
SAVED_EVERY, SAVING_STEPS = 20, 40


def position(at: int, ours: bool) -> dict[str, float]:
    """Measure the seconds from the start of the epoch's loader to its first batch, after `at` completed steps."""
    import numpy as np
    import torch
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader

    from hfstrat.data.collate import BatchOrder

    lengths = np.random.default_rng(0).integers(8, 512, ROWS)
    order = BatchOrder(lengths, SIZE, STEPS, 42, group_by_length=True)
    read: list[int] = []

    class Rows(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    loader = Accelerator(cpu=True).prepare(DataLoader(Rows(), batch_size=SIZE, sampler=order))
    started = time.perf_counter()
    if ours:
        order.begin(at)
    iterator = iter(skip_first_batches(loader, at) if at else loader)
    first = next(iterator)
    seconds = time.perf_counter() - started
    assert first.tolist() == order.batch(at).tolist()
    assert len(read) <= 2 * SIZE, "examples were read to find the position"
    return {"seconds": seconds}


def overhead(strategy: str) -> dict[str, float]:
    """Train once with timed checkpoints; return the seconds of saving, of marking and of training."""
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run import train
    from hfstrat.tasks import verify
    from hfstrat.trainer import checkpoints
    from hfstrat.trainer.resumable import Resumable

    spent = {"saving": 0.0, "marking": 0.0}

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - started

        return run

    Resumable._save_checkpoint = timed("saving", Resumable._save_checkpoint)  # type: ignore[method-assign]
    checkpoints.mark_complete = timed("marking", checkpoints.mark_complete)
    verify.verify = lambda *args: {"bit_equal": True, "max_difference": 0.0, "loaded_with": "nobody"}  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"strategy={strategy}", f"output_dir={scratch}/run", f"training.max_steps={SAVING_STEPS}"]
        words += [f"training.eval_steps={SAVING_STEPS}", f"training.save_steps={SAVED_EVERY}", "evaluation.eval_on_start=false"]
        words += ["evaluation.samples=0", "training.load_best_model_at_end=false", "training.global_batch_size=8"]
        words += ["data.max_length=512", f"data.eval={DATA / 'eval.jsonl'}", "evaluation.max_rows=8"]
        file = Path(scratch) / "recipe.yaml"
        file.write_text(f"model: {MODEL}\nstrategy: lora\ndata: {DATA / 'train.jsonl'}\noutput_dir: x\n")
        report = train.run(load_recipe(str(file), words))
    assert report is not None
    return {**spent, "training": report.finished.train_seconds}


def main() -> None:
    cases = [["position", str(at), who] for at in POSITIONS for who in ("ours", "library")]
    found = rounds("resume", [*cases, ["overhead", "lora"], ["overhead", "full"]], REPEATS)
    result = {"machine": machine(), "found": found}
    write("resume", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    found = result["found"]
    seconds = {name: statistics.median(r["seconds"] for r in results) for name, results in found.items() if "position" in name}
    table = ["| completed steps | seconds to the first batch | the library's own way |", "|---|---|---|"]
    for at in POSITIONS:
        table.append(f"| {at:,} | {seconds[f'position {at} ours']:.3f} | {seconds[f'position {at} library']:.3f} |")
    table += ["", "| strategy | per checkpoint | of which marker and fsync | share of training |", "|---|---|---|---|"]
    for strategy in ("lora", "full"):
        saving, marking, whole = (
            statistics.median(r[key] for r in found[f"overhead {strategy}"]) for key in ("saving", "marking", "training")
        )
        count = SAVING_STEPS // SAVED_EVERY
        table.append(f"| {strategy} | {saving / count:.2f} s | {marking / count:.2f} s | {saving / whole:.1%} |")
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        kind, what, *who = sys.argv[2:]
        print(json.dumps(position(int(what), who == ["ours"]) if kind == "position" else overhead(what)))
    else:
        main()
