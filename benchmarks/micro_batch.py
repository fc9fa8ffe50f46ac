"""Real tokens per second as a function of the micro-batch and of the rounding of lengths, on this machine.

    make quickstart && python -m benchmarks.micro_batch

One process, interleaved rounds, the same batches for every setting: steps of 16 examples of the quickstart's data, sorted by
length within a step, LoRA r=16 on the demo model. `plan.CPU_TOKENS` and the collator's multiple on a CPU follow from it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.measure import ROOT, machine, write

SETTINGS = [(32, 4), (16, 4), (8, 4), (16, 2), (16, 8)]  # multiple that lengths are rounded up to, micro-batch
ROUNDS, STEPS, ROWS = 3, 2, 16


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from hfstrat.data.collate import BatchOrder, Collator
    from hfstrat.data.prepare import prepare
    from hfstrat.data.splits import column
    from hfstrat.models import fused_loss, load
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Model
    from hfstrat.tasks import loading
    from hfstrat.tasks.causal_lm.losses import causal_lm_loss

    section = Model(name_or_path=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    tokenizer = load.load_tokenizer(section)
    rows = prepare(
        Data.model_validate({"train": str(ROOT / "data/docstrings/train.jsonl"), "max_length": 384}), tokenizer, 0
    ).train
    base = loading.load_base(section, tokenizer)
    fused_loss.bind_head_loss(base.model)
    trained = get_peft_model(base.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    load.set_precision(trained, torch.bfloat16)
    trained.train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4, fused=True)
    order = BatchOrder(column(rows, "length"), ROWS, 1000, seed=0)

    def speed(multiple: int, micro: int, steps: range) -> float:
        collate = Collator(0, multiple, masks_logits=True, selects_rows=True)
        started = time.perf_counter()
        for step in steps:
            chosen = order.batch(step).tolist()
            for start in range(0, ROWS, micro):
                batch: dict[str, Any] = collate([rows[i] for i in chosen[start : start + micro]])
                labels = batch.pop("labels")
                with torch.autocast("cpu", torch.bfloat16):
                    outputs = trained(**batch, use_cache=False)
                causal_lm_loss(outputs, labels, 100).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return sum(order.tokens(step) for step in steps) / (time.perf_counter() - started)

    speeds: dict[tuple[int, int], list[float]] = {setting: [] for setting in SETTINGS}
    for turn in range(ROUNDS + 1):
        for setting in SETTINGS:
            measured = speed(*setting, range(turn * STEPS, (turn + 1) * STEPS))
            if turn:  # the first round compiles kernels
                speeds[setting].append(measured)
    result = {"machine": machine(), "speeds": [[*key, value] for key, value in speeds.items()]}
    write("micro_batch", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = ["| lengths rounded up to a multiple of | micro-batch | real tokens/s (median) | rounds |", "|---|---|---|---|"]
    for multiple, micro, speeds in result["speeds"]:
        spread = ", ".join(f"{value:.0f}" for value in speeds)
        table.append(f"| {multiple} | {micro} | {statistics.median(speeds):.0f} | {spread} |")
    return table


if __name__ == "__main__":
    main()
