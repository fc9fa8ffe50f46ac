"""Parts of the bash scripts that jobs run."""

from __future__ import annotations

import shlex

from hfstrat.clusters.job import Job

NEWEST = """\
# the newest checkpoint: a session that saved none is not repeated
newest() { find "$run" -maxdepth 1 -name 'checkpoint-*' 2>/dev/null | sort -V | tail -n 1; }
"""

WAIT = """\
# a signal interrupts `wait`, so it is repeated until training has ended
while :; do
  interrupted=
  wait "$training"
  code=$?
  [ -n "$interrupted" ] || break
done
"""


def here(text: str, stem: str = "HFSTRAT") -> tuple[str, str]:
    """A here-document for a text that no shell expands: what follows `<<`, and the lines after it."""
    end, lines = stem, text.splitlines()
    while end in lines:
        end += "_"
    return f"'{end}'", "".join(f"{line}\n" for line in lines) + end


def exports(env: dict[str, str]) -> str:
    """Lines that set environment variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def train(job: Job, program: list[str], recipe: str, overrides: list[str], config: str | None) -> str:
    """The command of one machine, over several lines.

    With several machines it reads NODE, HOST0 and PORT from the environment.

    Args:
        program: what starts hfstrat.
        recipe, config: their paths on that machine.
    """
    lines = [shlex.join([*program, "train", recipe]), *(shlex.quote(each) for each in overrides)]
    if job.processes > 1 or config is not None:
        lines.append(shlex.join(["--accelerate-config", config or "single", "--num-processes", str(job.processes)]))
    if job.nodes > 1:
        lines.append(f'--num-machines {job.nodes} --machine-rank "$NODE"')
        lines.append('--main-process-ip "$HOST0" --main-process-port "$PORT"')
    return " \\\n  ".join(lines)
