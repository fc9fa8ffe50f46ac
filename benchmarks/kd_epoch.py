"""Cost of a teacher: an epoch with cached teacher outputs, compared with plain fine-tuning of the same student, and queries on
the fly compared with TRL's GKD.

    python -m benchmarks.kd_epoch [REPEATS [MINUTES]]

After MINUTES no new run starts; run the same command again to continue.

The teacher is models/SmolLM2-135M-Instruct, the student half of it (every second layer, built once), the data 256 short
instructions (../shared/data/llms_from_scratch), batches of 8, one epoch, all weights trainable. Each run is a process of its
own, so that its peak memory is its own, and the runs are interleaved. Seconds are those of the training steps, without imports,
loading, tokenizing and evaluation; for `cached` also without the one pass in which the teacher is queried, which is reported
separately and is shared by all epochs. TRL: GKDTrainer on the answers of the data (lmbda 0, beta 0: the same forward
divergence, temperature 1), in bfloat16, with its defaults, and with examples grouped by length as in hfstrat; its
DistillationTrainer is on-policy only and so another task. In hfstrat the teacher has weight 1, because GKD has no cross-entropy
term.

Predicted before the first run: cached takes 1.12x the time of plain (the teacher's head is one of 7 more matrix products on
supervised tokens, and the divergence takes several passes over the logits) and 1.03x its memory; online 1.6x; GKD 1.5x of
online.

The lower limit: one product of width 576 by 49,152 tokens is 57 MFLOP per supervised token. The student's head takes three, its
body 6 x 53 M for each of the 4.2 tokens per supervised token, 1.5 GFLOP in total: the teacher's product is 4 % of that. The
rest was memory: fresh pages for float32 intermediates as large as a chunk of logits took longer than the product. Predicted for
processing a chunk in blocks that stay in the CPU cache: 1.08x the time, 1.06x the memory. Two cores are not that stable: pairs
of cached and plain runs gave 0.92x to 1.09x, and the code before had 1.08x (one pair) and 1.12x the memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, rounds, write

TEACHER = ROOT / "models" / "SmolLM2-135M-Instruct"
STUDENT = ROOT / "runs" / "benchmarks" / "half-depth"
ROWS = ROOT.parent / "shared" / "data" / "llms_from_scratch" / "instruction.jsonl"
CONTENDERS = ("plain", "cached", "online", "trl-gkd", "trl-gkd-grouped")
GOAL = {"time": 1.15, "memory": 1.1}  # of plain
TRAIN, HELD_OUT, BATCH, MAX_LENGTH, RATE = 256, 32, 8, 256, 1e-4
DISTILL = "{name: distill, teacher: %s, student: full, teacher_weight: 1.0, baseline: false, teacher_cache: {form: %s}}"


def make_student() -> None:
    """Build the student: half of the teacher's layers, and its tokenizer."""
    if (STUDENT / "config.json").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfstrat.strategies.distill.shrink import drop_layers, layers_to_keep

    whole = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="auto")
    count = whole.config.num_hidden_layers
    drop_layers(whole, layers_to_keep(count // 2, count)).save_pretrained(STUDENT)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(STUDENT)


def rows(folder: Path) -> list[dict[str, str]]:
    """Write train.jsonl and eval.jsonl; return the training examples as prompt and completion."""
    read = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()][: TRAIN + HELD_OUT]
    made = [
        {"prompt": r["instruction"] + (f"\n\n{r['input']}" if r.get("input") else ""), "completion": r["output"]} for r in read
    ]
    for name, part in (("train", made[:TRAIN]), ("eval", made[TRAIN:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return made[:TRAIN]


def run_hfstrat(folder: Path, strategy: str) -> dict[str, Any]:
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run.train import run

    rows(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {STUDENT}\nstrategy: {strategy}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: {MAX_LENGTH}}}\n"
        f"training: {{num_train_epochs: 1, global_batch_size: {BATCH}, per_device_train_batch_size: {BATCH},\n"
        f"  learning_rate: {RATE}, eval_steps: 1.0, save_steps: 1.0, load_best_model_at_end: false}}\n"
        f"evaluation: {{eval_on_start: false, samples: 0}}\noutput_dir: {folder / 'run'}\n"
    )
    report = run(load_recipe(str(recipe)))
    assert report is not None
    result = report.finished
    cache = result.distillation.cache if result.distillation else None
    return {"seconds": result.step_seconds, "loss": result.metrics_after["loss"], "asking": cache.seconds if cache else 0.0}


def run_gkd(folder: Path, **settings: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    talks: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows(folder)
    ]
    config = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        learning_rate=RATE,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for talk in talks:  # examples are tokenized in the collator, so the trainer does not know their lengths
        talk["length"] = len(tokenizer.apply_chat_template(talk["messages"], return_dict=True)["input_ids"])
    trainer = GKDTrainer(student, teacher, config, train_dataset=Dataset.from_list(talks), processing_class=tokenizer)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(str(folder / "trl"))
    return {"seconds": seconds, "loss": held_out_loss(folder, folder / "trl"), "asking": 0.0}


def held_out_loss(folder: Path, model: Path) -> float:
    """Return the cross-entropy per supervised token, measured as for hfstrat, in a process of its own."""
    words = ["evaluate", str(model), "--data", str(folder / "eval.jsonl"), "--json", str(folder / "loss.json")]
    subprocess.run([sys.executable, "-m", "hfstrat", *words, "evaluation.samples=0"], cwd=ROOT, check=True, capture_output=True)
    found = json.loads((folder / "loss.json").read_text())["measured"]["evaluation rows"]["after"]
    return float(found["loss"]["value"])


def one(name: str) -> dict[str, Any]:
    """Run one contender in this process."""
    from hfstrat.trainer.autobatch import peak_bytes

    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "plain": lambda folder: run_hfstrat(folder, "full"),
        "cached": lambda folder: run_hfstrat(folder, DISTILL % (TEACHER, "hidden")),
        "online": lambda folder: run_hfstrat(folder, DISTILL % (TEACHER, "'off'")),
        "trl-gkd": run_gkd,
        "trl-gkd-grouped": lambda folder: run_gkd(
            folder, gradient_checkpointing=False, train_sampling_strategy="group_by_length"
        ),
    }
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HFSTRAT_CACHE"] = f"{scratch}/cache"  # empty: the teacher is queried in every run
        found = runs[name](Path(scratch))
    return {**found, "peak_bytes": peak_bytes()}


def main() -> None:
    if not ROWS.is_file():
        sys.exit(f"{ROWS} not found: this benchmark runs on real instructions that are not in the repository")
    make_student()
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else inf
    runs = rounds("kd_epoch", [[name] for name in CONTENDERS], repeats, minutes)
    result = {"machine": machine(), "rows": TRAIN, "goals": GOAL, "runs": runs}
    write("kd_epoch", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    middle = {
        name: {key: statistics.median(run[key] for run in results) for key in ("seconds", "peak_bytes", "asking")}
        for name, results in runs.items()
    }
    table = [
        "| run | seconds per epoch | all runs | time relative to plain | peak memory | memory relative to plain | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        ratios = [mine["seconds"] / plain["seconds"] for mine, plain in zip(results, runs["plain"], strict=True)]
        spread = ", ".join(f"{run['seconds']:.1f}" for run in results)
        loss = "-" if results[0]["loss"] is None else f"{results[0]['loss']:.4f}"
        seconds, peak = (middle[name][key] for key in ("seconds", "peak_bytes"))
        table.append(
            f"| {name} | {seconds:.1f} | {spread} | {statistics.median(ratios):.2f}x | {peak / 2**30:.2f} GiB | "
            f"{peak / middle['plain']['peak_bytes']:.2f}x | {loss} |"
        )
    goal = (
        f"Goal: cached takes at most {GOAL['time']}x the time and {GOAL['memory']}x the memory of plain. "
        f"Querying the teacher once took {middle['cached']['asking']:.1f} s."
    )
    return [*table, "", goal]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        main()
