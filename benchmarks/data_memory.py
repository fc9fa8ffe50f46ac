"""Memory as a function of dataset size: growth of a process that prepares 10^4, 10^5 and 10^6 short examples.

    python -m benchmarks.data_memory

Writes benchmarks/results/data_memory.json and .md. Each size is a process of its own with an empty cache. It imports everything
and prepares and plans 1,000 examples, so that one-time costs are not counted. Then it does the same with the examples of its
size, read from a file, and measures peak resident memory (VmHWM) above that first round, after the preparation and after a
run's bookkeeping (lengths, plan, order of the batches, fingerprint, a first batch). Resident memory has two parts: the
process's own memory, and pages of the memory-mapped Arrow file, which the system reclaims when it needs them.

Predicted before the first run: about 3 MiB at any size (a batch of a thousand examples as Python lists, a megabyte of tokens on
its way to the disk); per example at most 35 bytes of own memory at a time (16 for its number, its length and the hash of its
text, 8 for its position in the order, 8 for the sorted hash, 3 for flags), plus about 8 bytes of mapped pages (the beginning of
each megabyte of the file): 4 MiB for 10^4 examples, 7 MiB for 10^5, 44 MiB for 10^6, where the tokens take 127 MiB. As a JSON
list the examples should take 2 MiB more at any size. (With lists instead of arrays, as before: 411 bytes per example at 10^5.)

Measured: as predicted at 10^4 and 10^6 (40 MiB). At 10^5 it was 11 MiB instead of 7. The cause is not the preparation (4.7 MiB)
but the first batch: its examples are far apart in the mapped file, and reading each one loads the 64 KiB around it. JSON lists
take no more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write

SIZES = (10_000, 100_000, 1_000_000)
KINDS = {10_000: ("jsonl", "json"), 100_000: ("jsonl", "json"), 1_000_000: ("jsonl",)}
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "hat",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "and",
    "not",
]


def make_rows(file: Path, count: int) -> Path:
    """Write distinct short texts of about 12 tokens each."""
    texts = [" ".join(WORDS[(n * step + n) % len(WORDS)] for step in range(1, 4 + n % 9)) for n in range(1000)]
    start, between, end = ("[\n", ",\n", "\n]\n") if file.suffix == ".json" else ("", "\n", "\n")
    with file.open("w") as out:
        out.write(start)
        for number in range(count):
            out.write(f'{{"text": "{number} {texts[number % 1000]}"}}' + (end if number + 1 == count else between))
    return file


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<end>", *WORDS, *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>")


def status(name: str) -> int:
    """Return a field of /proc/self/status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def prepare_all(file: Path, tokenizer: Any, seen: dict[str, int]) -> int:
    """Prepare and plan as `hfstrat.run.setup` does; note memory in `seen`; return the number of examples."""
    from hfstrat.data.collate import BatchOrder, Collator
    from hfstrat.data.prepare import prepare
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Training
    from hfstrat.trainer.plan import make_plan

    data = prepare(Data.model_validate({"train": str(file)}), tokenizer, seed=0, samples=3)
    seen["prepared"] = status("VmHWM")
    data.fingerprint()
    lengths, eval_lengths = data.lengths, data.eval_lengths
    plan = make_plan(Training(max_steps=100), lengths, eval_lengths, 1)
    order = BatchOrder(lengths, plan.global_batch_size, plan.steps, 0)
    Collator(0, 8, masks_logits=False)([data.train[row] for row in order.batch(0).tolist()])
    seen |= {"peak": status("VmHWM"), "own": status("RssAnon"), "mapped": status("RssFile")}
    return len(data.train) + len(data.eval)


def one(count: int, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        files = [make_rows(Path(scratch) / f"{size}.{kind}", size) for size in (1000, count)]
        os.environ["HFSTRAT_CACHE"] = f"{scratch}/cache"
        tokenizer = make_tokenizer()
        before: dict[str, int] = {}
        prepare_all(files[0], tokenizer, before)
        after: dict[str, int] = {}
        started = time.perf_counter()
        rows = prepare_all(files[1], tokenizer, after)
        seconds = time.perf_counter() - started
        stored = sum(file.stat().st_size for file in Path(scratch, "cache").glob("*.arrow"))
        grown = {name: after[name] - before["peak" if name == "prepared" else name] for name in after}
        return {"rows": rows, "kind": kind, "file": files[1].stat().st_size, "stored": stored, "seconds": seconds} | grown


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(one(int(sys.argv[1]), sys.argv[2])))
        return
    runs = []
    for size in SIZES:
        for kind in KINDS[size]:
            command = [sys.executable, "-m", "benchmarks.data_memory", str(size), kind]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    result = {"machine": machine(), "runs": runs}
    write("data_memory", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        "| examples | file | tokens on disk | growth over 1,000 examples | with bookkeeping | per example | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        mib = {name: run[name] / 2**20 for name in ("file", "stored", "prepared", "peak")}
        table.append(
            f"| {run['rows']:,} | {mib['file']:.1f} MiB {run['kind']} | {mib['stored']:.1f} MiB | {mib['prepared']:.1f} MiB | "
            f"{mib['peak']:.1f} MiB | {run['peak'] / run['rows']:.0f} B | {run['seconds']:.1f} |"
        )
    return table


if __name__ == "__main__":
    main()
