"""DPO compared: hfstrat, hfstrat's SFT on the same tokens, TRL's defaults, TRL with precomputed references.

    python -m benchmarks.preference [REPEATS] [--minutes N]

96 pairs of ../shared/data/llms_from_scratch/preference.jsonl, SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, batches of
4 pairs, one epoch; 48 other pairs measure accuracy and margin of the rewards, by the same code for all. Each run is a process
of its own, interleaved. Throughput is real tokens of both answers and their prompts over the training time, without imports,
loading and tokenizing; the reference of hfstrat and of TRL's second setting is computed before, and its seconds are their own
column. SFT trains both sequences of each pair as examples, in batches of 8.

Predicted before the first run: SFT 300 tokens/s; hfstrat's DPO 0.85 of it (one more pass through the head), with the same peak
memory; TRL's defaults 70 (float32, checkpointing, the reference in each step); TRL with precomputed references 100.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lora_sft import MODEL, lora
from benchmarks.measure import ROOT, machine, rounds, speeds, write

ROWS = ROOT.parent / "shared" / "data" / "llms_from_scratch" / "preference.jsonl"
CONTENDERS = ("hfstrat-dpo", "hfstrat-sft", "trl-defaults", "trl-precomputed")
TRAIN, HELD_OUT, BATCH, MAX_LENGTH, RATE = 96, 48, 4, 512, 1e-4


def pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out pairs as messages."""
    found = []
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["chosen"].strip() == row["rejected"].strip():
            continue
        prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        made = {"prompt": [{"role": "user", "content": prompt}]}
        found.append(made | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")})
    return found[:TRAIN], found[TRAIN : TRAIN + HELD_OUT]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tokens_of(rows: list[dict[str, Any]], tokenizer: Any) -> int:
    """Tokens of both sequences of all pairs."""
    talks = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
    return sum(len(tokenizer.apply_chat_template(talk, return_dict=False)) for talk in talks)


def run_hfstrat(folder: Path, objective: str) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hfstrat.recipe.load import load_recipe
    from hfstrat.run.train import run

    train, held = pairs()
    batch = BATCH
    if objective == "sft":
        batch, both = 2 * BATCH, ("chosen", "rejected")
        train = [{"prompt": row["prompt"], "completion": row[name]} for row in train for name in both]
        held = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in held]
    files = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in (("train", train), ("eval", held))]
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {MODEL}\nstrategy: {{name: lora, r: 8}}\nobjective: {objective}\n"
        f"data: {{train: {files[0]}, eval: {files[1]}, max_length: {MAX_LENGTH}}}\n"
        f"training: {{num_train_epochs: 1, global_batch_size: {batch}, learning_rate: {RATE}, eval_steps: 1.0,\n"
        "  warmup_steps: 0, load_best_model_at_end: false, lr_scheduler_type: linear}\n"
        "evaluation: {eval_on_start: false, samples: 0, control: 'off', metrics: []}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    report = run(load_recipe(str(recipe)))
    assert report is not None
    result = report.finished
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype="bfloat16"), folder / "run" / "final")
    reference = result.reference.seconds if result.reference else math.nan
    found = {
        "seconds": result.step_seconds or 0.0,
        "peak_bytes": float(result.peak_memory_bytes),
        "reference_seconds": reference,
    }
    return found | (rewards(model) if objective == "dpo" else {"accuracy": math.nan, "margin": math.nan})


def run_trl(folder: Path, precomputed: bool) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from hfstrat.trainer.autobatch import peak_bytes

    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        learning_rate=RATE,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        precompute_ref_log_probs=precomputed,
    )
    started = time.perf_counter()
    trainer = DPOTrainer(
        str(MODEL),
        args=config,
        train_dataset=Dataset.from_list(pairs()[0]),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=lora(),
    )
    prepared = time.perf_counter() - started
    started = time.perf_counter()
    trainer.train()
    found = {"seconds": time.perf_counter() - started, "peak_bytes": float(peak_bytes())}
    return found | {"reference_seconds": prepared if precomputed else math.nan} | rewards(trainer.model)


def rewards(model: Any) -> dict[str, float]:
    """Accuracy and mean margin of DPO's rewards (beta 0.1) on the held-out pairs, under bfloat16 autocast."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model.eval()

    def logps(talk: list[dict[str, str]], prompt: list[dict[str, str]]) -> torch.Tensor:
        ids = tokenizer.apply_chat_template(prompt + talk, return_dict=False)
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        given = torch.tensor([ids])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=given).logits[0, start - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, given[0, start:, None]).sum()

    margins = []
    for row in pairs()[1]:
        both = [logps(row[name], row["prompt"]) for name in ("chosen", "rejected")]
        with model.disable_adapter():
            before = [logps(row[name], row["prompt"]) for name in ("chosen", "rejected")]
        margins.append(0.1 * float(both[0] - before[0] - both[1] + before[1]))
    return {"accuracy": sum(margin > 0 for margin in margins) / len(margins), "margin": statistics.mean(margins)}


def one(name: str) -> dict[str, float]:
    """Run one contender in this process."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokens = tokens_of(pairs()[0], AutoTokenizer.from_pretrained(MODEL))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["HFSTRAT_CACHE"] = str(folder / "cache")  # each run computes its reference
        if name.startswith("hfstrat"):
            found = run_hfstrat(folder, name.removeprefix("hfstrat-"))
        else:
            found = run_trl(folder, name == "trl-precomputed")
    return {"tokens": tokens, "tokens_per_second": tokens / found["seconds"], **found}


def main() -> None:
    if not ROWS.is_file():
        sys.exit(f"{ROWS} not found: this benchmark runs on real preferences that are not in the repository")
    words = sys.argv[1:]
    minutes = float(words.pop(words.index("--minutes") + 1)) if "--minutes" in words else math.inf
    repeats = int(words[0]) if words and words[0].isdigit() else 3
    runs = rounds("preference", [[name] for name in CONTENDERS], repeats, minutes)
    result = {"machine": machine(), "pairs": TRAIN, "runs": runs}
    write("preference", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    table = [
        "| contender | real tokens/s | all runs | hfstrat's speed-up | peak memory | reference | reward accuracy | margin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        middle = {key: statistics.median(run[key] for run in results) for key in results[0]}
        before = "-" if math.isnan(middle["reference_seconds"]) else f"{middle['reference_seconds']:.1f} s"
        scores = ["-", "-"] if math.isnan(middle["margin"]) else [f"{middle['accuracy']:.1%}", f"{middle['margin']:.3f}"]
        cells = [name, *speeds(results, runs["hfstrat-dpo"]), f"{middle['peak_bytes'] / 2**30:.2f} GiB", before, *scores]
        table.append(f"| {' | '.join(cells)} |")
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        main()
