"""LoRA fine-tuning compared: hfstrat, TRL's defaults, TRL tuned by hand, plain HF Trainer, a bare PyTorch loop.

    python -m benchmarks.lora_sft [REPEATS]

The same data (real instructions, ../shared/data/llamafactory_demos/alpaca_en_demo.jsonl), the same model
(models/SmolLM2-135M-Instruct), LoRA r=8 on all linear layers, batches of 4, at most 1,024 tokens, one epoch. Each run is a
process of its own, so that its peak memory is its own; the runs are interleaved. Throughput is real (unpadded) tokens over the
training time, without imports, loading, tokenizing and evaluation. The loss afterwards is measured on the same held-out
examples by the same code.

Predicted before the first run: TRL's defaults near 120 tokens/s (loaded in float32, checkpointing on), tuned near 250, plain HF
Trainer near 120 (float32, random order, a different width in every batch), the bare loop and hfstrat near 430, so hfstrat at
3.5 times TRL's defaults.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, rounds, speeds, write

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ROWS = ROOT.parent / "shared" / "data" / "llamafactory_demos" / "alpaca_en_demo.jsonl"
CONTENDERS = ("hfstrat", "trl-defaults", "trl-tuned", "hf-trainer", "bare-loop")
TRAIN, HELD_OUT, BATCH, MAX_LENGTH, RATE = 108, 24, 4, 1024, 2e-4


def rows(folder: Path) -> tuple[Path, Path]:
    """Write the training and the held-out examples as prompt and completion; return both files."""
    read = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()][: TRAIN + HELD_OUT]
    made = [
        {"prompt": r["instruction"] + (f"\n\n{r['input']}" if r.get("input") else ""), "completion": r["output"]} for r in read
    ]
    for name, part in (("train", made[:TRAIN]), ("eval", made[TRAIN:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder / "train.jsonl", folder / "eval.jsonl"


def prepared(folder: Path) -> tuple[Any, Any]:
    from hfstrat.data.prepare import prepare
    from hfstrat.models.load import load_tokenizer
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Model

    tokenizer = load_tokenizer(Model(name_or_path=str(MODEL)))
    train, held = rows(folder)
    return prepare(
        Data.model_validate({"train": str(train), "eval": str(held), "max_length": MAX_LENGTH}), tokenizer, seed=0
    ), tokenizer


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def held_out_loss(model: Any, data: Any) -> float:
    """Return nats per supervised token on the held-out examples, under bfloat16 autocast for every contender."""
    import torch

    from hfstrat.data.collate import Collator
    from hfstrat.tasks.causal_lm.losses import causal_lm_sums

    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for row in data.eval:
        batch = Collator(0, 32, masks_logits=False)([row])
        labels = batch.pop("labels")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            total += causal_lm_sums(model(**batch).logits, labels)[0]
    return float(total[0] / total[1])


def run_hfstrat(folder: Path, *words: str) -> tuple[float, float]:
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run.train import run

    train, held = rows(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {MODEL}\nstrategy: {{name: lora, r: 8}}\ndata: {{train: {train}, eval: {held}, max_length: {MAX_LENGTH}}}\n"
        f"training: {{num_train_epochs: 1, global_batch_size: {BATCH}, learning_rate: {RATE}, load_best_model_at_end: false,\n"
        "  eval_steps: 1.0, lr_scheduler_type: linear, warmup_steps: 0}\n"
        f"evaluation: {{eval_on_start: false, samples: 0}}\noutput_dir: {folder / 'run'}\n"
    )
    report = run(load_recipe(str(recipe), words))
    assert report is not None
    return report.finished.step_seconds or 0.0, report.finished.metrics_after["loss"]


def run_trl(folder: Path, **settings: Any) -> tuple[float, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    data, tokenizer = prepared(folder)
    talks = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "completion": [{"role": "assistant", "content": r["completion"]}],
        }
        for r in map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    ]
    model: Any = str(MODEL)
    if "bf16" in settings:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        learning_rate=RATE,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(talks), processing_class=tokenizer, peft_config=lora())
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started, held_out_loss(trainer.model, data)


def run_hf_trainer(folder: Path) -> tuple[float, float]:
    """Train as the documentation of transformers shows: the model as it loads, the library's padding collator."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data, tokenizer = prepared(folder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"), lora())
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = data.train.select_columns(["input_ids", "labels"])
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started, held_out_loss(model, data)


def run_bare_loop(folder: Path) -> tuple[float, float]:
    """Train in plain PyTorch, as an expert would write it for this machine."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from hfstrat.data.collate import Collator
    from hfstrat.tasks.causal_lm.losses import causal_lm_loss

    data, _ = prepared(folder)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16), lora()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    order = sorted(range(len(data.train)), key=lambda i: data.train[i]["length"])
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    collate = Collator(0, 32, masks_logits=True)
    started = time.perf_counter()
    for step in torch.randperm(len(batches)).tolist():
        batch = collate([data.train[i] for i in batches[step]])
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**batch, use_cache=False)
        causal_lm_loss(outputs, labels, None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started, held_out_loss(model, data)


def one(name: str) -> dict[str, float]:
    """Run one contender in this process."""
    by_hand = {"bf16": True, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    runs: dict[str, Callable[[Path], tuple[float, float]]] = {
        "hfstrat": run_hfstrat,
        "trl-defaults": run_trl,
        "trl-tuned": lambda folder: run_trl(folder, **by_hand),
        "hf-trainer": run_hf_trainer,
        "bare-loop": run_bare_loop,
    }
    return measured(runs[name])


def measured(run: Callable[[Path], tuple[float, float]]) -> dict[str, float]:
    """Run a contender in this process; return real tokens, seconds, loss and peak memory."""
    from transformers.utils import logging

    from hfstrat.trainer.autobatch import peak_bytes

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        data, _ = prepared(Path(scratch))
        tokens = sum(data.train["length"])
        seconds, loss = run(Path(scratch))
    peak = peak_bytes()
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "loss": loss, "peak_bytes": peak}


def main() -> None:
    if not ROWS.is_file():
        sys.exit(f"{ROWS} not found: this benchmark runs on real instructions that are not in the repository")
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    runs = rounds("lora_sft", [[name] for name in CONTENDERS], repeats)
    result = {"machine": machine(), "rows": TRAIN, "runs": runs}
    write("lora_sft", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    table = [
        "| contender | real tokens/s | all runs | hfstrat's speed-up | peak memory | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        peak, loss = (statistics.median(run[key] for run in results) for key in ("peak_bytes", "loss"))
        cells = [name, *speeds(results, runs["hfstrat"]), f"{peak / 2**30:.2f} GiB", f"{loss:.4f}"]
        table.append(f"| {' | '.join(cells)} |")
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        main()
