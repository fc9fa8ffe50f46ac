"""Examples per second from file to token ids with a mask: hfstrat and TRL's SFTTrainer, on the same data and tokenizer.

    python -m benchmarks.tokenize

Writes benchmarks/results/tokenize.json and .md. Needs ../shared and models/SmolLM2-135M-Instruct (HFSTRAT_BENCH_MODEL names
another folder). Each case is a fresh process with an empty cache. It loads its libraries first and then times the preparation
alone: from the file to the prepared dataset. TRL is timed from `load_dataset` to the end of the trainer's constructor, less the
time that the same constructor takes for one example; its examples are made conversational by `map`, as its documentation shows.
Both sides have prepared one or two examples before, so that one-time costs are not timed. The cases are interleaved.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

FILE = ROOT.parent / "shared" / "data" / "llamafactory_demos" / "alpaca_en_demo.jsonl"
MODEL = os.environ.get("HFSTRAT_BENCH_MODEL", str(ROOT / "models" / "SmolLM2-135M-Instruct"))
CASES = ("hfstrat", "hfstrat, cached", "TRL")
REPEATS = 5
LENGTH = 1024


def ours(cached: bool) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from hfstrat.data.prepare import prepare
    from hfstrat.recipe.data import Data

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = Data.model_validate({"train": str(FILE), "max_length": LENGTH, "eval_size": 1})
    with tempfile.NamedTemporaryFile(
        "w", suffix=".jsonl"
    ) as few:  # the other side has also seen two examples before it is timed
        few.writelines(FILE.read_text(encoding="utf-8").splitlines(keepends=True)[:2])
        few.flush()
        prepare(data if cached else Data.model_validate({"train": few.name, "eval_size": 1}), tokenizer, seed=0)
    started = time.perf_counter()
    account = prepare(data, tokenizer, seed=0).statistics["train"]
    return {"seconds": time.perf_counter() - started, "rows": account.rows_read, "tokens": account.tokens}


def theirs() -> dict[str, Any]:
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))

    def prepared(rows: Any) -> Any:
        config = SFTConfig(output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False, max_length=LENGTH)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train_dataset

    def conversational(row: dict[str, str]) -> dict[str, Any]:
        prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    def loaded(split: str) -> Any:
        rows = load_dataset("json", data_files=str(FILE), split=split)
        return rows.map(conversational, remove_columns=rows.column_names)

    prepared(loaded("train[:1]"))
    started = time.perf_counter()
    prepared(loaded("train[1:2]"))
    constant = time.perf_counter() - started
    started = time.perf_counter()
    rows = prepared(loaded("train"))
    seconds = time.perf_counter() - started - constant
    return {"seconds": seconds, "rows": len(rows), "tokens": sum(map(len, rows["input_ids"])), "constant": constant}


def one(case: str) -> dict[str, Any]:
    """Run a case in a process with its own caches."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HFSTRAT_CACHE": f"{scratch}/ours", "HF_DATASETS_CACHE": f"{scratch}/theirs"}
        command = [sys.executable, "-m", "benchmarks.tokenize", case]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(theirs() if sys.argv[1] == "TRL" else ours("cached" in sys.argv[1])))
        return
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(REPEATS):
        for case in CASES:
            runs[case].append(one(case))
    result = {"machine": machine(), "file": FILE.name, "model": Path(MODEL).name, "runs": runs}
    write("tokenize", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    table = ["| | examples | tokens | median | fastest | examples/s | relative to TRL |", "|---|---|---|---|---|---|---|"]
    medians = {case: statistics.median(run["seconds"] for run in runs[case]) for case in CASES}
    for case in CASES:
        first, fastest = runs[case][0], min(run["seconds"] for run in runs[case])
        table.append(
            f"| {case} | {first['rows']:,} | {first['tokens']:,} | {medians[case]:.3f} s | {fastest:.3f} s | "
            f"{first['rows'] / medians[case]:,.0f} | {medians['TRL'] / medians[case]:.1f}x |"
        )
    return table


if __name__ == "__main__":
    main()
