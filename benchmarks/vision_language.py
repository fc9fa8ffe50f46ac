"""LoRA on a vision-language model with a frozen vision tower: features computed once, in each step, and TRL's SFTTrainer.

    python -m benchmarks.vision_language [REPEATS] [--minutes N]

Writes benchmarks/results/vision_language.json and .md. The model of `scripts/demo_vlm.py` (a vision transformer of 22 M
parameters, a new projector, SmolLM2-135M), 96 questions about photographs of ../shared/data/cifar10_10k, LoRA r=16 on the
linear layers of the language model, batches of 8, two epochs, bfloat16. Each run is a process of its own, interleaved. Seconds
of the first and of the second epoch are those of their steps; computing the features is in the first one. Loss: of the answers
to 48 other questions, measured by the same code for all.

Predicted before the first run: TRL 1.0 in both epochs; hfstrat 0.6 of it without the cache (no padding to the longest, chunked
head), with it 0.7 in the first and 0.5 in the second epoch, as the tower is a seventh of the weights but sees 49 of 80 tokens;
the same loss.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.measure import ROOT, machine, rounds, write

MODEL, DATA = ROOT / "models" / "vision-language-demo", ROOT / "data" / "picture-questions"
CONTENDERS = ("hfstrat", "hfstrat-no-cache", "trl")
TRAIN, HELD_OUT, BATCH, EPOCHS, RATE, RANK = 96, 48, 8, 2, 2e-4, 16
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()[:count]]
    return [row | {"images": [str(DATA / file) for file in row["images"]]} for row in rows]


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Seconds from the beginning of training to the end of each epoch."""

    def __init__(self, began: float) -> None:
        self.began, self.seconds = began, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % (TRAIN // BATCH) == 0:  # a run of hfstrat is one stream of rows
            self.seconds.append(time.perf_counter() - self.began)


def run_hfstrat(folder: Path, caches: bool) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from hfstrat.recipe.load import load_recipe
    from hfstrat.run import train

    for name, count in (("train", TRAIN), ("eval", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(name, count)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"task: image-text-to-text\nmodel: {MODEL}\n"
        f"strategy: {{name: lora, r: {RANK}, freeze: [vision, projector]}}\n"
        f"data: {{train: {folder / 'train.jsonl'}, eval: {folder / 'eval.jsonl'}}}\n"
        f"image: {{precompute: {str(caches).lower()}}}\n"
        f"training: {{num_train_epochs: {EPOCHS}, global_batch_size: {BATCH}, learning_rate: {RATE}, eval_steps: 1.0,\n"
        "  warmup_steps: 0, load_best_model_at_end: false, lr_scheduler_type: linear}\n"
        "evaluation: {eval_on_start: false, samples: 0, control: 'off', metrics: []}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    epochs = Epochs(0.0)

    def watch(job: Any) -> None:
        epochs.began = time.perf_counter()
        job.trainer.add_callback(epochs)

    started = time.perf_counter()
    report = train.run(load_recipe(str(recipe)), before_training=watch)
    assert report is not None
    once = report.finished.vision_features.seconds if report.finished.vision_features else 0.0
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="bfloat16")
    found = loss_of(PeftModel.from_pretrained(model, str(folder / "run" / "final")))
    first, second = epochs.seconds[0] + once, epochs.seconds[1] - epochs.seconds[0]
    peak = float(report.finished.peak_memory_bytes)
    return {"first": first, "second": second, "peak_bytes": peak, "loss": found, "all": time.perf_counter() - started}


def run_trl() -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from hfstrat.trainer.autobatch import peak_bytes

    started = time.perf_counter()
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text_of(row)}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}],
            "images": images_of(row),
        }
        for row in rows_of("train", TRAIN)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            learning_rate=RATE,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=None,
            completion_only_loss=True,
        )
        trainer = SFTTrainer(
            str(MODEL),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(MODEL),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"),
        )
        epochs = Epochs(time.perf_counter())
        trainer.add_callback(epochs)
        trainer.train()
    first, second = epochs.seconds[0], epochs.seconds[1] - epochs.seconds[0]
    peak = float(peak_bytes())
    return {
        "first": first,
        "second": second,
        "peak_bytes": peak,
        "loss": loss_of(trainer.model),
        "all": time.perf_counter() - started,
    }


def text_of(row: dict[str, Any]) -> str:
    return str(row["prompt"]).removeprefix("<image>")


def images_of(row: dict[str, Any]) -> list[Any]:
    from PIL import Image

    return [Image.open(file).convert("RGB") for file in row["images"]]


def loss_of(model: Any) -> float:
    """Nats per token of the held-out answers, under bfloat16 autocast."""
    import torch
    from transformers import AutoProcessor

    processor, total, count = AutoProcessor.from_pretrained(MODEL), 0.0, 0
    model.eval()
    for row in rows_of("eval", HELD_OUT):
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text_of(row)}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}
        both = []
        for talk, asks in (([user], True), ([user, answer], False)):
            text = processor.apply_chat_template(talk, add_generation_prompt=asks)
            both.append(processor(text=text, images=images_of(row), return_tensors="pt"))
        start = both[0]["input_ids"].shape[1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(**both[1]).logits[0, start - 1 : -1].float()
        ids = both[1]["input_ids"][0, start:]
        total -= float(logits.log_softmax(-1).gather(1, ids[:, None]).sum())
        count += len(ids)
    return total / count


def one(name: str) -> dict[str, float]:
    """Run one contender in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == "trl":
        return run_trl()
    with tempfile.TemporaryDirectory() as scratch:
        return run_hfstrat(Path(scratch), name == "hfstrat")


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    lines = [
        "Medians, all runs in brackets; the ratio is to TRL in the same epoch.",
        "",
        "| contender | first epoch | ratio | second epoch | ratio | peak memory | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    middle = {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    for name, found in runs.items():
        cells = [name]
        for key in ("first", "second"):
            every = ", ".join(f"{run[key]:.1f}" for run in found)
            cells += [f"{middle[name][key]:.1f} s ({every})", f"{middle[name][key] / middle['trl'][key]:.2f}"]
        cells += [f"{middle[name]['peak_bytes'] / 2**30:.2f} GiB", f"{middle[name]['loss']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    if not (MODEL / "config.json").is_file() or not DATA.is_dir():
        sys.exit(f"{MODEL} or {DATA} is missing: scripts/demo_vlm.py makes them")
    words = sys.argv[1:]
    minutes = float(words.pop(words.index("--minutes") + 1)) if "--minutes" in words else math.inf
    repeats = int(words[0]) if words and words[0].isdigit() else 3
    runs = rounds("vision_language", [[name] for name in CONTENDERS], repeats, minutes)
    result = {"machine": machine(), "rows": TRAIN, "runs": runs}
    write("vision_language", result, lines_of(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        main()
