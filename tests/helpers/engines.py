"""Engines that run jobs on this machine: programs of Slurm, SkyPilot and a cloud, and a stand-in for `hfstrat train`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from helpers.hub_runs import finished_run

SOURCE = Path(__file__)
SLURM = ("sbatch", "squeue", "sacct", "scontrol", "srun", "scancel")
CLOUD = ("sky", "rsync", "aws", "uv")
STUB = """#!/bin/bash
# `hfstrat train` by a plan: line N of the file says how session N ends; a leading `save-` leaves a checkpoint
n=$(($(cat "$STUB/count" 2>/dev/null || echo 0) + 1))
echo "$n" > "$STUB/count"
echo "stub session $n:" "$@"
echo "stub environment: SECRET=${MY_SECRET:-none} THREADS=${OMP_NUM_THREADS:-unset} EXTRA=${EXTRA:-unset}"
word=$(sed -n "${n}p" "$STUB/plan")
mkdir -p "$STUB_RUN" && touch "$STUB_RUN/.hfstrat.lock"
save() { mkdir -p "$STUB_RUN/checkpoint-$n" && echo "$n" > "$STUB_RUN/checkpoint-$n/weights"; }
case "$word" in
  wait-save) trap 'save; exit 130' TERM; touch "$STUB/ready-$n"; while :; do sleep 0.02; done ;;
  wait-idle) trap 'exit 130' TERM; touch "$STUB/ready-$n"; while :; do sleep 0.02; done ;;
  save-*) save; exit "${word#save-}" ;;
  done) ls "$STUB_RUN" 2>/dev/null; mkdir -p "$STUB_RUN/final"; cp "$STUB/report.json" "$STUB_RUN/"; exit 0 ;;
  *) exit "$word" ;;
esac
"""


def programs(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder with these programs, to be the first of PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(
            f'#!/bin/bash\nexec {sys.executable} -S {SOURCE.with_name("engine_programs.py")} {name} "$@"\n'
        )
        (folder / name).chmod(0o755)
    return folder


def stub(folder: Path, plan: list[str], run: Path | str) -> dict[str, str]:
    """A virtual environment and a program `hfstrat` that end as planned; returns their environment variables."""
    (folder / "venv" / "bin").mkdir(parents=True)
    for file in (folder / "venv" / "bin" / "python", folder / "hfstrat"):
        file.write_text(STUB)
        file.chmod(0o755)
    (folder / "plan").write_text("\n".join(plan) + "\n")
    done = finished_run(folder / "example")
    (folder / "report.json").write_text((done / "report.json").read_text())
    return {"STUB": str(folder), "STUB_RUN": str(run)}


def state(folder: Path, job: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"{job}.json").read_text())
    return found


def wait_for(condition: object, seconds: float = 60.0) -> None:
    """Wait until a call returns something true."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true within {seconds} s"
        time.sleep(0.02)


def path_with(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])
