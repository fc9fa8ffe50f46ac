"""Multiple choice by likelihood, compared with lm-evaluation-harness, and memory as a function of the number of questions.

    python -m benchmarks.evaluation

Writes benchmarks/results/evaluation.json and .md. Throughput: the first 100 rows of ../shared/data/eval_dev/arc_easy.jsonl, the
demo model in bfloat16, on the same cores. The harness runs with its own model class and a YAML task on the same rows, at the
best of the batch sizes 1, 4 and 16. Measured are the seconds from the loaded model to the accuracies, the median of three
interleaved processes each. Memory: 10^3, 10^4 and 10^5 questions through ../shared/models/stories260K; measured is the peak of
resident memory above a first round of 1,000.

Predicted before the first run: arc_easy has about 30 tokens per question and 5 for each of four choices. The harness reads 140
tokens per row and passes all of them through the LM head; hfstrat reads 50 and passes 20: 3 times as fast. Memory: 3 bytes per
row, 32 while the intervals are computed: 4 MiB for 10^5.

First run: 1.5 times as fast as the harness at batch size 16, 3.3 times as at 1: both are limited by the matrix products, and
the harness makes few passes. A profile of hfstrat: 68 % matrix products, of which 40 % for padding (6,160 positions for 3,767
tokens); 8 % the softmax of the logits, most of it fresh memory; six passes of one short row to show that continuations do not
see each other.

Predicted before the second run (contexts packed into rows of 64 and distributed: 4,110 positions; the memory of the logits
reused; two passes for the proof): 0.7 of the seconds, 2.2 times as fast as the harness at its best. Measured: 3.13 seconds and
1.85 times. One second of it was hfstrat's own imports, which were inside the measured time while the harness's were outside.
With neither inside: 2.06 seconds and 2.96 times (the first version, timed this way in a comparison of its own: 3.0 seconds and
2.0 times).
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, rounds, write

DATA, STORIES = (
    ROOT.parent / "shared" / "data" / "eval_dev" / "arc_easy.jsonl",
    ROOT.parent / "shared" / "models" / "stories260K",
)
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ROWS, REPEATS = 100, 3
SIZES = (1_000, 10_000, 100_000)
HARNESS = ("1", "4", "16")  # batch sizes
TASK = """\
task: arc_easy_local
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def some(folder: Path) -> Path:
    """Write the first ROWS rows to a file of their own."""
    file = folder / "arc_easy.jsonl"
    with DATA.open() as lines:
        file.write_text("".join(itertools.islice(lines, ROWS)))
    return file


def subject_of(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfstrat.evaluation.forward import Subject
    from hfstrat.tasks.causal_lm import CausalLM

    importlib.import_module("hfstrat.evaluation.choices")  # imports are outside the measured time, as for the harness
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return Subject.from_model(model, AutoTokenizer.from_pretrained(folder), CausalLM())


def answer(subject: Any, file: Path) -> dict[str, float]:
    import torch
    from rich.console import Console

    from hfstrat.evaluation import choices
    from hfstrat.evaluation.forward import Runner
    from hfstrat.evaluation.intervals import with_intervals

    with subject.measured():
        found = choices.measure(subject, str(file), Runner(subject.device, torch.float32, Console(quiet=True)))
    return {name: entry["value"] for name, entry in with_intervals(None, found)["after"].items()}


def ours(folder: Path) -> dict[str, Any]:
    file, subject = some(folder), subject_of(MODEL, "bfloat16")
    started = time.perf_counter()
    found = answer(subject, file)
    return {"seconds": time.perf_counter() - started, **{name: found[name] for name in ("acc", "acc_norm")}}


def theirs(folder: Path, batch: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (folder / "task.yaml").write_text(TASK.replace("FILE", str(some(folder))))
    model = HFLM(pretrained=str(MODEL), dtype="bfloat16", device="cpu", batch_size=batch)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    started = time.perf_counter()
    whole = simple_evaluate(model, tasks=["arc_easy_local"], task_manager=manager, log_samples=False)["results"][
        "arc_easy_local"
    ]
    return {"seconds": time.perf_counter() - started, "acc": whole["acc,none"], "acc_norm": whole["acc_norm,none"]}


def questions(file: Path, count: int) -> Path:
    words = ["the cat", "a dog", "the sun", "a small bird", "the old tree", "rain", "her friend", "the red ball"]
    with file.open("w") as out:
        for n in range(count):
            row = {
                "query": f"Once there was {words[n % 8]} and {words[n // 8 % 8]}.",
                "choices": words[n % 5 : n % 5 + 3],
                "gold": n % 3,
            }
            out.write(json.dumps(row) + "\n")
    return file


def peak() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM"))


def memory(folder: Path, count: int) -> dict[str, Any]:
    subject = subject_of(STORIES, "float32")
    answer(subject, questions(folder / "first.jsonl", 1000))
    file, before, started = questions(folder / "questions.jsonl", count), peak(), time.perf_counter()
    answer(subject, file)
    return {"grown": peak() - before, "seconds": time.perf_counter() - started}


def one(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, (kind, *rest) = Path(scratch), words
        done = ours(folder) if kind == "hfstrat" else None
        done = theirs(folder, int(rest[0])) if kind == "lm-eval" else done
        print(json.dumps(done or memory(folder, int(rest[0]))))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    for needed in (DATA, STORIES, MODEL):
        if not needed.exists():
            sys.exit(f"{needed} not found")
    speed = rounds("evaluation", [["hfstrat"], *(["lm-eval", batch] for batch in HARNESS)], REPEATS)
    grown = rounds("evaluation", [["memory", str(size)] for size in SIZES], 1)
    middle = medians(speed)
    whole = {
        "machine": machine(),
        "rows": ROWS,
        "speed": speed,
        "times_as_fast": middle[best_of(middle)] / middle["hfstrat"],
        "memory": grown,
    }
    write("evaluation", whole, lines_of(whole))


def medians(speed: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the median seconds of each contender."""
    return {name: statistics.median(each["seconds"] for each in runs) for name, runs in speed.items()}


def best_of(middle: dict[str, float]) -> str:
    """Return the fastest batch size of the harness."""
    return min((name for name in middle if name != "hfstrat"), key=lambda name: middle[name])


def lines_of(result: dict[str, Any]) -> list[str]:
    speed, grown, middle = result["speed"], result["memory"], medians(result["speed"])
    table = ["| contender | seconds | rows/s | acc | acc_norm |", "|---|---|---|---|---|"]
    for name, runs in speed.items():
        scores = " | ".join(f"{runs[0][key]:.2f}" for key in ("acc", "acc_norm"))
        table.append(f"| {name} | {middle[name]:.2f} | {ROWS / middle[name]:.1f} | {scores} |")
    table += ["", f"hfstrat is {result['times_as_fast']:.2f} times as fast as {best_of(middle)}, the best of the harness.", ""]
    table += ["| questions | peak above the first 1,000 (MiB) | seconds |", "|---|---|---|"]
    for size in SIZES:
        (run,) = grown[f"memory {size}"]
        table.append(f"| {size:,} | {run['grown'] / 2**20:.1f} | {run['seconds']:.1f} |")
    return table


if __name__ == "__main__":
    main()
