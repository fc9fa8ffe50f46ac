"""Writing answers with an adapter: hfstrat, and transformers' `generate` on the same model.

    python -m benchmarks.generation [REPEATS]

SmolLM2-135M-Instruct with LoRA r=16 on all linear layers, whose other weights are frozen, as after training or loading an
adapter; bfloat16 where the CPU computes in it. Greedy answers of 32 tokens to 1, 8 and 64 prompts of 64 tokens, interleaved
in one process. Peak memory is that of a process of its own for each.

Predicted before the first run: 2.5 times as fast for one prompt, 2 times for 8, 2 times for 64 and a third of the memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.lora_sft import MODEL
from benchmarks.measure import ROOT, machine, write

CONTENDERS, BATCHES, PROMPT, TOKENS = ("hfstrat", "transformers"), (1, 8, 64), 64, 32


def loaded() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hfstrat.models.load import compute_dtype

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=compute_dtype("auto"))
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).eval()


def answer(model: Any, contender: str, batch: int) -> None:
    import torch

    from hfstrat.tasks import generation

    ids = torch.randint(1000, 40_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
        if contender == "hfstrat":
            generation.continued(model, ids.tolist(), None, TOKENS, min_new_tokens=TOKENS)
        else:
            wanted = {**generation.GREEDY, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wanted)


def peak(contender: str, batch: int) -> int:
    """Bytes that a process holds at most."""
    words = [sys.executable, "-m", "benchmarks.generation", contender, str(batch)]
    return int(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = ["| prompts | seconds of hfstrat | of transformers | ratio | peak memory of hfstrat | of transformers |"]
    lines.append("|---|---|---|---|---|---|")
    for batch, runs in result["batches"].items():
        ours, theirs = (statistics.median(runs[name]["seconds"]) for name in CONTENDERS)
        memory = [f"{runs[name]['peak'] / 2**30:.2f} GiB" for name in CONTENDERS]
        lines.append(f"| {batch} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {' | '.join(memory)} |")
    return lines


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in CONTENDERS:
        import resource

        answer(loaded(), sys.argv[1], int(sys.argv[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    repeats, model = int(sys.argv[1]) if sys.argv[1:] else 3, loaded()
    found: dict[str, Any] = {}
    for batch in BATCHES:
        runs: dict[str, Any] = {name: {"seconds": [], "peak": peak(name, batch)} for name in CONTENDERS}
        for name in CONTENDERS:
            answer(model, name, batch)  # kernels are compiled
        for _ in range(repeats):
            for name in CONTENDERS:
                started = time.perf_counter()
                answer(model, name, batch)
                runs[name]["seconds"].append(time.perf_counter() - started)
        found[str(batch)] = runs
        print(batch, json.dumps(runs), flush=True)
    result = {"machine": machine(), "repeats": repeats, "tokens": TOKENS, "prompt": PROMPT, "batches": found}
    write("generation", result, lines_of(result))


if __name__ == "__main__":
    main()
