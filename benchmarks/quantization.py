"""LoRA on a base in float32, bfloat16, int8 and nf4: memory, speed, and the loss after the same tokens.

    python -m benchmarks.quantization [REPEATS]

SmolLM2-135M-Instruct, r=16 on all linear layers, the same examples in the same order (documentation of the standard library,
data/docstrings), batches of 8, at most 256 tokens. Each run is a process of its own, so that its peak memory is its own; an
interrupted benchmark resumes. Throughput is real tokens over the training time. The loss is the run's own, on the same 40
held-out examples, before and after; the bytes of the weights are those of the loaded base.

Predicted before the first run: 16 bits is the fastest; nf4 and int8 dequantize each matrix in each pass and reach 60 to 80 % of
it; the weights shrink from 269 to 167 (nf4) and 220 MB (int8), and the peak of the process by no more than that, since
embeddings, activations and logits stay the same; losses after training are within 0.02 of each other.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, rounds, write

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
DATA = ROOT / "data" / "docstrings"
CONTENDERS = ("float32", "bfloat16", "int8", "nf4")
TRAIN, HELD_OUT, STEPS = 128, 40, 16


def one(name: str) -> dict[str, float]:
    """Run one contender in this process."""
    from hfstrat.models import quantization
    from hfstrat.models.load import load_tokenizer, set_precision
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run.train import run
    from hfstrat.tasks.loading import load_base

    words = {"int8": "quantization: int8", "nf4": "quantization: nf4"}.get(name, f"dtype: {name}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part, count in (("train", TRAIN), ("eval", HELD_OUT)):
            lines = (DATA / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"model: {{name_or_path: {MODEL}, {words}}}\nstrategy: {{name: lora, r: 16}}\n"
            f"data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 256, overflow: truncate}}\n"
            f"training: {{max_steps: {STEPS}, global_batch_size: 8, per_device_train_batch_size: 8, learning_rate: 5e-4,\n"
            "  eval_steps: 1.0, load_best_model_at_end: false}\n"
            f"evaluation: {{samples: 0}}\noutput_dir: {folder}/run\n"
        )
        loaded = load_recipe(str(recipe))
        report = run(loaded)
        assert report is not None
        result: dict[str, Any] = report.finished.model_dump()
        base = load_base(loaded.recipe.model, load_tokenizer(loaded.recipe.model))
        set_precision(base.model.requires_grad_(False), base.compute_dtype)
        weights = quantization.bytes_in_memory(base.model)
    return {
        "tokens": result["tokens"],
        "tokens_per_second": result["tokens_per_second"],
        "peak_bytes": result["peak_memory_bytes"],
        "weight_bytes": weights,
        "loss_before": result["metrics_before"]["loss"],
        "loss": result["metrics_after"]["loss"],
    }


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    runs = rounds("quantization", [[name] for name in CONTENDERS], repeats)
    result = {"machine": machine(), "steps": STEPS, "runs": runs}
    write("quantization", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = {name: found for name, found in result["runs"].items() if found}
    table = [
        "| base | weights | peak of the process | real tokens/s | held-out loss before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        weights, peak, speed, before, after = (
            statistics.median(run[key] for run in results)
            for key in ("weight_bytes", "peak_bytes", "tokens_per_second", "loss_before", "loss")
        )
        table.append(f"| {name} | {weights / 1e6:.0f} MB | {peak / 2**30:.2f} GiB | {speed:.0f} | {before:.4f} | {after:.4f} |")
    return [*table, "", sentence(runs)]


def sentence(runs: dict[str, list[dict[str, float]]]) -> str:
    """State what follows from the table."""
    middle = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]} for name, results in runs.items()
    }
    plain, bits = middle["bfloat16"], middle["nf4"]
    peak, speed = bits["peak_bytes"] / plain["peak_bytes"] - 1, bits["tokens_per_second"] / plain["tokens_per_second"]
    return (
        f"SmolLM2-135M-Instruct, LoRA r=16, {STEPS} steps of 8 examples on a CPU. The weights take "
        f"{bits['weight_bytes'] / 1e6:.0f} MB in nf4 and {plain['weight_bytes'] / 1e6:.0f} MB in bfloat16. The peak memory of "
        f"the process changes by {peak:+.0%}, the speed is {speed:.2f} of bfloat16's, and the loss after the same tokens is "
        f"{bits['loss']:.3f} against {plain['loss']:.3f}. At this size embeddings, activations and logits dominate memory, so "
        "QLoRA does not pay off. It does where the frozen weights themselves do not fit."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        main()
