"""Does a teacher help? A fine-tuned stories260K and its own three-layer student, with and without it, over three seeds.

    python -m benchmarks.distill

Writes benchmarks/results/distill.json and .md. Data: paragraphs of ../shared/data/tinystories_sample, the last 150 for
evaluation. The teacher: ../shared/models/stories260K (5 layers) after 250 steps of full fine-tuning on the rest. The student:
its layers 0, 2 and 4, which learn for 150 steps of 16 rows with `alpha` 0 (no teacher), 0.5 and 0.9; start, rows, order and
learning rate are the same. Losses in nats a token on the evaluation rows.

Predicted before the first run: the teacher helps at this length by 0.05 nats with alpha 0.9, and by half of that with 0.5.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

SHARED = ROOT.parent / "shared"
SEEDS, ALPHAS = (42, 43, 44), (0.0, 0.5, 0.9)
RECIPE = """\
model: {model}
strategy: {strategy}
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 256, overflow: split}}
training: {{max_steps: {steps}, global_batch_size: 16, learning_rate: {rate}, eval_steps: {steps}}}
evaluation: {{samples: 0}}
seed: {seed}
output_dir: {folder}/{name}
"""


def write_rows(folder: Path) -> None:
    text = (SHARED / "data" / "tinystories_sample" / "tiny_stories.txt").read_text(encoding="utf-8")
    rows = [{"text": line} for line in text.split("\n") if len(line) > 80]
    for name, part in (("train", rows[:-150]), ("eval", rows[-150:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")


def run(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    """One run in this process; its report's `result`."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from hfstrat import train
    from hfstrat.loading import load_recipe

    file = folder / f"{name}.yaml"
    file.write_text(RECIPE.format(folder=folder, name=name, **settings), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        report = train.run(load_recipe(str(file)), overwrite=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    assert report is not None
    result: dict[str, Any] = report["result"]
    return result


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder)
        start = SHARED / "models" / "stories260K"
        teacher = run(folder, "teacher", model=start, strategy="full", steps=250, rate="1e-3", seed=42)
        for seed in SEEDS:
            for alpha in ALPHAS:
                strategy = f"{{name: distill, shrink: {{layers: 3}}, student: full, alpha: {alpha}, baseline: false}}"
                settings = {
                    "model": folder / "teacher" / "final",
                    "strategy": strategy,
                    "steps": 150,
                    "rate": "3e-3",
                    "seed": seed,
                }
                result = run(folder, "student", **settings)
                kept = ("metrics_before", "metrics_after", "train_seconds", "tokens_per_second", "total_parameters")
                found.append({"seed": seed, "alpha": alpha, **{key: result[key] for key in kept}})
                print(json.dumps(found[-1]), flush=True)
    table = [
        "| alpha | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean | gain over no teacher |",
        "|---|---|---|---|---|---|",
    ]
    plain = [one["metrics_after"]["loss"] for one in found if one["alpha"] == 0]
    for alpha in ALPHAS:
        losses = [one["metrics_after"]["loss"] for one in found if one["alpha"] == alpha]
        gains = [without - loss for without, loss in zip(plain, losses, strict=True)]
        cells = " | ".join(f"{loss:.4f}" for loss in losses)
        gain = f"{statistics.mean(gains):.4f} ({min(gains):.4f} to {max(gains):.4f})" if alpha else "-"
        table.append(f"| {alpha:g} | {cells} | {statistics.mean(losses):.4f} | {gain} |")
    before, after = teacher["metrics_before"]["loss"], teacher["metrics_after"]["loss"]
    said = f"Teacher: {teacher['total_parameters']:,} parameters, loss {before:.4f} before and {after:.4f} after fine-tuning; "
    said += f"student: {found[0]['total_parameters']:,} parameters, {found[0]['metrics_before']['loss']:.4f} before."
    write("distill", {"machine": machine(), "teacher": teacher["metrics_after"], "results": found}, [*table, "", said])


if __name__ == "__main__":
    main()
