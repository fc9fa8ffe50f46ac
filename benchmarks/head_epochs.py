"""Cost of an epoch when only the head is trained: a Trainer over a frozen body, and hfstrat, where the body runs once.

    python -m benchmarks.head_epochs

Writes benchmarks/results/head_epochs.json and .md. SmolLM2-135M-Instruct as a classifier (last token of the last layer, as in
transformers' class) on 800 examples of SST-2, batches of 16, 3 epochs, bfloat16 autocast, AdamW, no evaluation during the run;
each run in a process of its own, two rounds, interleaved. `Trainer` is stock, pads each batch to its longest text, and has the
gradients of the body switched off. hfstrat is `strategy: {name: head, layer: 30, pooling: last, solver: trainer}`: the same
head, trained for the same number of steps. Seconds are those from the loaded model and tokenized examples to the end of
training; an epoch of hfstrat is one sixth of what 9 epochs take beyond 3. The last line is the exact solver, which has no
epochs.

Predicted before the first run: an epoch of the Trainer takes 15 s; hfstrat's takes 50 steps of 3 ms = 0.15 s, a hundredth. The
complete job takes 3 x 15 s, against one pass of about 10 s (texts grouped by length) and half a second: 4x.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
DATA = ROOT.parent / "shared" / "data" / "sst2" / "train.csv"
ROWS, BATCH, EPOCHS, ROUNDS = 800, 16, 3, 2
GOAL = {"epoch": 50, "job": 2.5}


def by_trainer(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    rows = list(csv.DictReader((folder / "train.csv").open()))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = tokenizer([row["text"] for row in rows])["input_ids"]
    data = [{"input_ids": i, "labels": int(row["label"] == "positive")} for i, row in zip(ids, rows, strict=True)]
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.base_model.requires_grad_(False)
    model.base_model.to(torch.bfloat16)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    args = TrainingArguments(
        output_dir=str(folder / "hf"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, DataCollatorWithPadding(tokenizer), data, callbacks=[Clock()])
    started = time.perf_counter()
    trainer.train()
    return {"job": time.perf_counter() - started, "epoch": (ends[-1] - ends[0]) / (EPOCHS - 1)}


def by_hfstrat(folder: Path, solver: str, epochs: int) -> dict[str, Any]:
    from types import SimpleNamespace

    from hfstrat.recipe.load import load_recipe
    from hfstrat.run import setup
    from hfstrat.strategies.head import heads

    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"task: text-classification\nmodel: {MODEL}\ndata: {{train: {folder / 'train.csv'}, eval_size: 2, max_length: 128}}\n"
        f"strategy: {{name: head, layer: 30, pooling: last, solver: {solver}}}\noutput_dir: {folder / 'run'}\n"
        f"training: {{num_train_epochs: {epochs}, global_batch_size: {BATCH}, per_device_train_batch_size: {BATCH}, "
        "eval_steps: 1.0, load_best_model_at_end: false, logging_steps: 1000}\nevaluation: {eval_on_start: false, samples: 0}\n"
    )
    spent: list[float] = []
    original = heads.pool_rows

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        found = original(*args)
        spent.append(time.perf_counter() - started)
        return found

    heads.pool_rows = timed
    world = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    job = setup.set_up(load_recipe(str(recipe)), world, overwrite=True)
    started = time.perf_counter()
    job.trainer.train()
    return {"features": spent[0], "training": time.perf_counter() - started}


def ours(folder: Path) -> dict[str, Any]:
    """Train three epochs with computed features, nine with cached ones, and with the exact solver."""
    first = by_hfstrat(folder, "trainer", EPOCHS)
    more = by_hfstrat(folder, "trainer", 3 * EPOCHS)
    exact = by_hfstrat(folder, "exact", EPOCHS)
    return {
        "job": first["features"] + first["training"],
        "features": first["features"],
        "epoch": (more["training"] - first["training"]) / (2 * EPOCHS),
        "features_again": more["features"],
        "exact": exact["training"],
    }


def main() -> None:
    found: dict[str, list[dict[str, Any]]] = {"trainer": [], "hfstrat": []}
    for _ in range(ROUNDS):
        for name in found:
            with tempfile.TemporaryDirectory() as scratch:
                lines = DATA.read_text(encoding="utf-8").splitlines()[: ROWS + 1]
                (Path(scratch) / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
                words = [sys.executable, "-m", "benchmarks.head_epochs", name, scratch]
                done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    ratios = {}
    for key in GOAL:
        each = [a[key] / b[key] for a, b in zip(found["trainer"], found["hfstrat"], strict=True)]
        ratios[key] = {"median": statistics.median(each), "min": min(each), "max": max(each), "goal": GOAL[key]}
    result = {"rows": ROWS, "batch": BATCH, "ratios": ratios, "runs": found, "machine": machine()}
    write("head_epochs", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    table = ["| seconds | Trainer, frozen body | hfstrat | ratio |", "|---|---|---|---|"]
    for key, name in (("epoch", "each epoch after the first"), ("job", "complete job of 3 epochs")):
        theirs, ours = (statistics.median(run[key] for run in runs[who]) for who in ("trainer", "hfstrat"))
        ratio = "{median:.1f}x ({min:.1f} to {max:.1f})".format(**result["ratios"][key])
        table.append(f"| {name} | {theirs:.2f} | {ours:.3f} | {ratio} |")
    for key, name in (
        ("features", "of which features, once"),
        ("features_again", "features from the cache"),
        ("exact", "exact solver instead of epochs"),
    ):
        table.append(f"| {name} | - | {statistics.median(run[key] for run in runs['hfstrat']):.3f} | |")
    return table


if __name__ == "__main__":
    if len(sys.argv) > 1:
        import os

        os.environ["HFSTRAT_CACHE"] = str(Path(sys.argv[2]) / "cache")
        print(json.dumps((by_trainer if sys.argv[1] == "trainer" else ours)(Path(sys.argv[2]))))
    else:
        main()
