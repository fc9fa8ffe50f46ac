"""Memory and speed of data that are read while training (`data.streaming`), against the same data prepared on the disk.

    python -m benchmarks.streaming

Writes benchmarks/results/streaming.json and .md. Each case is a process of its own with an empty cache. It imports everything
and streams 1,000 rows of another file first, so that one-time costs are not counted.

- Streamed: all rows of a file of 10^4, 10^5 and 10^6 short examples, with the default shuffle buffer of 10,000 rows, in steps
  of 64, whose positions are taken as for a checkpoint. Measured: seconds until the first step, examples per second, growth of
  the peak resident memory (VmHWM) while streaming, bytes of a position, bytes on the disk.
- Restored: a stream of 10^7 rows is restored at its last 10,000 rows, which skips the rows before without parsing them, and
  its last rows are streamed. Measured: seconds until the first step, rows skipped per second, growth of memory.
- Prepared: `data.streaming: false` for the same files, as benchmarks/data_memory.py measures it.

Predicted before the first run: 10,000 rows of the buffer take about 4 MiB (a line of 50 bytes as a Python string, and a tuple),
the steps less than 1 MiB, so that memory is flat from 10^4 rows on; a position takes 2 KiB, most of it the statistics; and 10^7
rows are skipped in 16 s (1.6 us per line, measured beforehand).

Measured, beside other programs on the machine: 2.5 to 2.8 MiB at any size, less than predicted, since a part of the buffer is
already there after the first 1,000 rows; about 1 KiB per position; 21 s for 10^7 rows. Streaming is as fast as preparing.
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

from benchmarks.data_memory import make_rows, make_tokenizer, prepare_all, status
from benchmarks.measure import ROOT, machine, write

SIZES = (10_000, 100_000, 1_000_000)
PREPARED = (10_000, 100_000)
LARGEST, LAST = 10_000_000, 10_000
STEP, HELD_OUT = 64, 100


def open_stream(file: Path, tokenizer: Any, steps: int) -> Any:
    from hfstrat.data.streaming import prepare_streamed
    from hfstrat.recipe.data import Data
    from hfstrat.trainer.streamed import StreamedSteps

    section = Data.model_validate({"train": str(file), "streaming": True, "eval_size": HELD_OUT})
    return StreamedSteps(prepare_streamed(section, tokenizer, seed=0, samples=3).stream, STEP, steps)


def stream(file: Path, tokenizer: Any, rows: int) -> dict[str, Any]:
    """Stream the rows of a file once."""
    started, steps = time.perf_counter(), (rows - HELD_OUT) // STEP
    opened = open_stream(file, tokenizer, steps)
    tokens = opened.tokens(0)
    first = time.perf_counter() - started
    for step in range(1, steps):
        tokens += opened.tokens(step)
    seconds = time.perf_counter() - started
    position = len(json.dumps(opened.position(steps)))
    return {"first": first, "seconds": seconds, "rows": steps * STEP, "tokens": tokens, "position": position}


def restore(file: Path, tokenizer: Any, rows: int) -> dict[str, Any]:
    """Continue a stream from a position close to the end of a file."""
    from hfstrat.data.streams import Mixture

    steps = (rows - HELD_OUT) // STEP
    opened = open_stream(file, tokenizer, steps)
    number = rows - LAST
    position = opened.position(0)
    state = {"examples_iterable": {"shard_idx": 0, "shard_example_idx": number, "type": "ExamplesIterable"}, "epoch": 0}
    block = {"epoch": 0, "place": 0, "number": number, "state": state}
    place = {"draws": number - HELD_OUT, "sources": [{"block": block, "used": 0}]}
    assert isinstance(opened.stream.mixture, Mixture)
    started = time.perf_counter()
    opened.restore({**position, "place": place, "counted": number - HELD_OUT, "step": 0})
    found = sorted(row["row"] for row in opened.step(0))
    seconds = time.perf_counter() - started
    assert found[0] == number - HELD_OUT
    for step in range(1, LAST // STEP):
        opened.step(step)
    return {"seconds": seconds, "rows": number}


def one(kind: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        files = [make_rows(Path(scratch) / f"{size}.jsonl", size) for size in (1000, count)]
        os.environ["HFSTRAT_CACHE"] = f"{scratch}/cache"
        tokenizer, seen = make_tokenizer(), dict[str, int]()
        work = {"prepared": prepared, "streamed": stream, "restored": restore}[kind]
        (prepared if kind == "prepared" else stream)(files[0], tokenizer, 1000)
        before = status("VmHWM")
        found = work(files[1], tokenizer, count)
        seen["grown"] = status("VmHWM") - before
        stored = sum(file.stat().st_size for file in Path(scratch, "cache").rglob("*") if file.is_file())
        return {"kind": kind, "count": count, "file": files[1].stat().st_size, "stored": stored, **found, **seen}


def prepared(file: Path, tokenizer: Any, rows: int) -> dict[str, Any]:
    started = time.perf_counter()
    prepare_all(file, tokenizer, {})
    return {"seconds": time.perf_counter() - started, "rows": rows}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1], int(sys.argv[2]))))
        return
    cases = [("prepared", size) for size in PREPARED] + [("streamed", size) for size in SIZES] + [("restored", LARGEST)]
    runs = []
    for kind, size in cases:
        command = [sys.executable, "-m", "benchmarks.streaming", kind, str(size)]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(runs[-1], flush=True)
    result = {"machine": machine(), "runs": runs}
    write("streaming", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    table = [
        "| case | rows of the file | file | on the disk | growth of memory | first step after | rows per second | position |",
        "|---|---|---|---|---|---|---|---|",
    ]
    words = {"prepared": "prepared", "streamed": "streamed once", "restored": "restored at its end"}
    for run in result["runs"]:
        mib = {name: f"{run[name] / 2**20:.1f} MiB" for name in ("file", "stored", "grown")}
        first = run["first"] if run["kind"] == "streamed" else run["seconds"]
        position = f"{run['position']:,} B" if "position" in run else ""
        speed = f"{run['rows'] / run['seconds']:,.0f}" + " skipped" * (run["kind"] == "restored")
        table.append(
            f"| {words[run['kind']]} | {run['count']:,} | {mib['file']} | {mib['stored']} | {mib['grown']} | {first:.1f} s | "
            f"{speed} | {position} |"
        )
    return table


if __name__ == "__main__":
    main()
