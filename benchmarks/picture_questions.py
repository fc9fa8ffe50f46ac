"""Questions about photographs for a vision-language model with a new projector: before, after the projector, after LoRA.

    python -m benchmarks.picture_questions [RESULT]

Writes benchmarks/results/picture_questions.json and .md. Runs `scripts/demo_vlm.py run` (models/vision-language-demo and
data/picture-questions, which `make` builds), or reads what that has written before. 640 questions to train on, 200 to evaluate:
"Which is in the picture: cat or ship?", so that chance is 50 %. Accuracy is that of the complete answer, with 95 % intervals.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, write


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Accuracy on 200 questions of two answers (chance {result['chance']:.0%}); one seed.",
        "",
        "| run | trained | steps | minutes | peak memory | before | after | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("projector", "lora"):
        run = result[name]
        cells = [name, f"{run['trainable_parameters'] / 1e6:.1f} M", str(run["steps"]), f"{run['train_seconds'] / 60:.1f}"]
        cells.append(f"{run['peak_memory_bytes'] / 2**30:.2f} GiB")
        for when in ("before", "after", "difference"):
            one = run["accuracy"][when]
            cells.append(f"{one['value']:.1%} ({one['low']:.1%} to {one['high']:.1%})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "result.json"
        if len(sys.argv) == 1:
            subprocess.run([sys.executable, "scripts/demo_vlm.py", "run", str(file)], cwd=ROOT, check=True)
        found = json.loads(file.read_text())
    result = {"machine": machine(), **{key: found[key] for key in ("chance", "projector", "lora")}}
    write("picture_questions", result, lines_of(result))


if __name__ == "__main__":
    main()
