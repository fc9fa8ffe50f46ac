"""LoRA on short examples: hfstrat by default (batches grouped by length), hfstrat packed, TRL unpacked.

    python -m benchmarks.short_rows [REPEATS]

Two sets of short examples from ../shared/data, read in place: gsm8k (grade-school problems with worked answers) and the
instructions of llms_from_scratch. Model, adapter and measurement are those of `benchmarks.lora_sft`; at least 20,000 real
tokens each, batches of 8, max_length 1,024. TRL runs with its defaults.

Predicted before the first run: grouped 420-480 tokens/s on both, TRL unpacked near 100 (float32, every position through the
head), so at least 4 times; packed is 15-30 % slower than grouped here, since the cost of attention over several examples side
by side is their product, which no CPU kernel skips.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import lora_sft
from benchmarks.measure import ROOT, machine, rounds, write

SHARED = ROOT.parent / "shared" / "data"
SETS = {
    "gsm8k": (SHARED / "gsm8k" / "train.jsonl.gz", "question", "answer"),
    "llms_from_scratch": (SHARED / "llms_from_scratch" / "instruction.jsonl", "instruction", "output"),
}
CONTENDERS = ("hfstrat", "hfstrat-packed", "trl")
TOKENS, HELD_OUT, BATCH = 20_500, 24, 8


def choose_rows(name: str) -> None:
    """Make `benchmarks.lora_sft` use this dataset, with as many examples as hold TOKENS tokens."""
    from hfstrat.data.prepare import prepare
    from hfstrat.data.splits import column
    from hfstrat.models.load import load_tokenizer
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Model

    file, question, answer = SETS[name]
    text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode()
    read = [json.loads(line) for line in text.strip().split("\n")[:1000]]  # not splitlines: texts hold U+2028
    pairs = [{"prompt": f"{r[question]}\n\n{r.get('input') or ''}".strip(), "completion": r[answer]} for r in read]

    def rows(folder: Path) -> tuple[Path, Path]:
        parts = {"eval": pairs[:HELD_OUT], "train": pairs[HELD_OUT : HELD_OUT + count]}
        for part, some in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        return folder / "train.jsonl", folder / "eval.jsonl"

    with tempfile.TemporaryDirectory() as scratch:
        count = len(pairs)
        train, held = rows(Path(scratch))
        tokenizer = load_tokenizer(Model(name_or_path=str(lora_sft.MODEL)))
        section = Data.model_validate({"train": str(train), "eval": str(held), "max_length": lora_sft.MAX_LENGTH})
        data = prepare(section, tokenizer, seed=0)
        reached = column(data.train, "length").cumsum().searchsorted(TOKENS) + 1
        count = int(-(-reached // BATCH) * BATCH)
    lora_sft.rows, lora_sft.BATCH = rows, BATCH


def one(name: str, contender: str) -> dict[str, float]:
    choose_rows(name)
    words = {"hfstrat": ["training.packing=false"], "hfstrat-packed": ["training.packing=true"]}
    runs: dict[str, Any] = {"trl": lora_sft.run_trl}
    runs |= {kind: lambda folder, kind=kind: lora_sft.run_hfstrat(folder, *words[kind]) for kind in words}
    return lora_sft.measured(runs[contender])


def main() -> None:
    if missing := [str(file) for file, *_ in SETS.values() if not file.is_file()]:
        sys.exit(f"{missing[0]} not found: this benchmark runs on real data that are not in the repository")
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    runs = rounds("short_rows", [[name, contender] for name in SETS for contender in CONTENDERS], repeats)
    result = {"machine": machine(), "runs": runs}
    write("short_rows", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    table = [
        "| data | contender | real tokens/s | all runs | relative to TRL unpacked | peak memory | held-out loss |",
        "|---" * 7 + "|",
    ]
    for key, results in runs.items():
        name, contender = key.split()
        median = {field: statistics.median(run[field] for run in results) for field in results[0]}
        slow = statistics.median(run["tokens_per_second"] for run in runs[f"{name} trl"])
        speed, spread = median["tokens_per_second"], ", ".join(f"{run['tokens_per_second']:.0f}" for run in results)
        memory = f"{median['peak_bytes'] / 2**30:.2f} GiB"
        table.append(
            f"| {name} | {contender} | {speed:.0f} | {spread} | {speed / slow:.2f}x | {memory} | {median['loss']:.4f} |"
        )
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], sys.argv[3])))
    else:
        main()
