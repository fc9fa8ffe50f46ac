"""Slurm: an sbatch file on a shared file system. A job that reaches its time limit saves, is requeued, and resumes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

from hfstrat.clusters import paths, script
from hfstrat.clusters.engine import Engine, Plan, Submitted, ask, need, now
from hfstrat.clusters.job import SLURM, Options
from hfstrat.errors import CRASH, INTERRUPTED, OK, UserError

SAVING = 300.0  # seconds before the time limit at which training is told to save, at most
POLL = 5.0  # seconds between two looks at a job that is followed
UNKNOWN = 6  # looks at a job that neither squeue nor sacct knows, until it is given up
OURS = {  # options of sbatch that are written from options of hfstrat
    "nodes": "--nodes",
    "gpus-per-node": "--gpus",
    "gres": "--gpus",
    "gpus": "--gpus",
    "time": "--time",
    "job-name": "--name",
    "partition": "--partition",
    "account": "--account",
    "cpus-per-task": "--cpus",
}
FIXED = (
    "ntasks",
    "ntasks-per-node",
    "signal",
    "requeue",
    "no-requeue",
    "chdir",
    "output",
    "error",
    "open-mode",
    "export",
    "array",
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED")

SESSION = """\
run={run}
{newest}
before=$(newest)
training=
time_is_up=
# Slurm sends USR1 before the time limit: srun passes TERM on, and training saves after its current step
trap 'time_is_up=1; interrupted=1; kill -TERM "$training" 2>/dev/null' USR1
echo "hfstrat: session $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
srun --kill-on-bad-exit=0{cpus} bash -c "$on_each_node" &
training=$!
{wait}
if [ -n "$time_is_up" ] && [ "$code" -ge 128 ]; then  # ended by the signal: {interrupted} once it has saved
  if [ "$(newest)" = "$before" ]; then
    echo "hfstrat: no checkpoint was saved in this session, so it is not repeated; give more --time" >&2
  elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ]; then
    echo "hfstrat: {restarts} restarts (--max-restarts) are used up; submit again to resume" >&2
  else
    echo "hfstrat: saved; the job is requeued and resumes"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""


class Slurm(Engine):
    name: ClassVar[str] = SLURM

    @staticmethod
    def default_gpus(options: Options) -> int:
        return 1 if options.gpus is None else options.gpus

    @staticmethod
    def priced_as(options: Options) -> list[str]:
        return [options.partition] if options.partition else []

    @staticmethod
    def gpu_of(options: Options) -> str | None:
        return options.gpu_type

    def plan(self) -> Plan:
        job = self.job
        notes = self._check_paths()
        file = job.folder / "job.sbatch"
        return Plan(
            files={file: self._text()},
            command=shlex.join(["sbatch", "--parsable", str(file)]),
            follow=f"tail -F {shlex.quote(str(job.folder))}/{{id}}.log",
            cancel="scancel {id}",
            result=f"{job.output_dir} (shared folder)",
            notes=notes,
        )

    def _check_paths(self) -> list[str]:
        """Notes about paths that other machines may not see. Raises UserError for unusable ones."""
        job = self.job
        for key, text in (("output_dir", str(job.output_dir.absolute())), ("the working folder", str(Path().absolute()))):
            if "%" in text or "\n" in text:
                raise UserError(f"{key}: {text}: Slurm replaces % in paths of logs; use a folder without it")
        found = [each for each in paths.places(paths.raw(job.loaded.source, job.overrides)) if each.is_here]
        found += [
            paths.Place("RECIPE", job.loaded.source, Path(job.loaded.source)),
            paths.Place("output_dir", str(job.output_dir), job.output_dir),
        ]
        private = ", ".join(dict.fromkeys(f"{each.key} = {each.value}" for each in found if each.is_private))
        notes = [f"in folders that machines hardly ever share, but every node must see them: {private}"] if private else []
        if job.options.cpus is None:
            notes.append("cores: as the cluster gives by default, often one for a task; --cpus N requests them")
        if job.limit is None:
            notes.append("time: the limit of the partition; --time sets one, and shorter jobs often start earlier")
        return notes

    def _text(self) -> str:
        job, options = self.job, self.job.options
        shell = "#!/bin/bash -l" if options.module else "#!/bin/bash"
        parts = [
            shell,
            *self._directives(),
            f"# written by hfstrat launch; submit it with: sbatch --parsable {shlex.quote(str(job.folder / 'job.sbatch'))}",
            *(f"module load {shlex.quote(module)}" for module in options.module),
            script.exports(self._environment()).rstrip(),
            *options.before,
            "set -u",  # not before: scripts of others, such as those of conda, read variables that are not set
            self._rendezvous().rstrip(),
        ]
        word, lines = script.here(self._on_each_node())
        parts.append(f"read -r -d '' on_each_node <<{word} || true\n{lines}")
        parts.append(
            SESSION.format(
                run=shlex.quote(str(job.output_dir)),
                newest=script.NEWEST.rstrip(),
                wait=script.WAIT.rstrip(),
                cpus=f" --cpus-per-task={options.cpus}" if options.cpus else "",  # srun does not inherit it
                interrupted=INTERRUPTED,
                restarts=options.max_restarts,
            )
        )
        return "\n".join(part for part in parts if part)

    def _directives(self) -> list[str]:
        job, options = self.job, self.job.options
        gpus = f"{options.gpu_type}:{job.gpus}" if options.gpu_type else str(job.gpus)
        values: dict[str, str | None] = {
            "job-name": job.name,
            "chdir": _quoted(str(Path().absolute())),
            "output": _quoted(str(job.folder.absolute() / "%j.log")),
            "open-mode": "append",
            "nodes": str(job.nodes),
            "ntasks-per-node": "1",
            "gpus-per-node": gpus if job.gpus else None,
            "cpus-per-task": str(options.cpus) if options.cpus else None,
            "time": slurm_time(job.limit) if job.limit else None,
            "partition": options.partition and _quoted(options.partition),
            "account": options.account and _quoted(options.account),
            "signal": f"B:USR1@{saving(job.limit):.0f}",
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in values.items() if value is not None]
        return [*lines, "#SBATCH --requeue", *(f"#SBATCH --{each}" for each in self._extra())]

    def _extra(self) -> list[str]:
        """The options of --sbatch. Raises UserError for those that hfstrat writes itself."""
        found = []
        for each in self.job.options.sbatch:
            name, sign, value = each.strip().removeprefix("--").partition("=")
            if not re.fullmatch(r"[a-z][a-z-]*", name) or (sign and not value):
                raise UserError(f"--sbatch: {each}: expected KEY=VALUE or KEY as of sbatch, such as mem=64G or exclusive")
            if name in OURS:
                raise UserError(f"--sbatch: {name}: written by hfstrat; use {OURS[name]}")
            if name in FIXED:
                raise UserError(f"--sbatch: {name}: hfstrat needs its own value, to stop and resume the run; remove it")
            found.append(f"{name}={_quoted(value)}" if sign else name)
        return found

    def _environment(self) -> dict[str, str]:
        job = self.job
        threads = {"OMP_NUM_THREADS": str(max(1, job.options.cpus // max(1, job.gpus)))} if job.options.cpus else {}
        return {"PYTHONUNBUFFERED": "1", **threads, **job.env}

    def _rendezvous(self) -> str:
        """Where the machines meet: the first host, and a port that follows from the number of the job."""
        if self.job.nodes == 1:
            return ""
        return (
            'HOST0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
            "PORT=$((20000 + SLURM_JOB_ID % 20000))\n"
            "export HOST0 PORT\n"
        )

    def _on_each_node(self) -> str:
        job = self.job
        command = script.train(
            job, self._program(), job.loaded.source, list(job.overrides), job.options.accelerate_config or job.config
        )
        return f"{'NODE=$SLURM_NODEID' if job.nodes > 1 else ''}\nexec {command}".lstrip()

    def _program(self) -> list[str]:
        """What starts hfstrat on a node. Raises UserError for an environment without it."""
        options = self.job.options
        if options.venv and options.container:
            raise UserError("--venv: the container has its own Python; give only one of --venv and --container")
        if options.container:
            binds = [word for volume in self.job.mounts for word in ("--bind", volume)]
            gpus = ["--nv"] if self.job.gpus else []
            return ["apptainer", "exec", *gpus, *binds, options.container, "hfstrat"]
        if options.volume:
            raise UserError("--volume: with --on slurm only folders for --container are mounted; remove it")
        if not options.venv:
            return [sys.executable, "-m", "hfstrat"]
        python = Path(options.venv).expanduser().absolute() / "bin" / "python"
        if not python.exists():
            raise UserError(f"--venv: {options.venv}: no bin/python in this folder; give a virtual environment with hfstrat")
        return [str(python), "-m", "hfstrat"]

    def check(self) -> None:
        for program in ("sbatch", "squeue", "scontrol"):
            need(program, "run this on a login node of the cluster")

    def submit(self, plan: Plan) -> Submitted:
        file = next(iter(plan.files))
        answer = ask(["sbatch", "--parsable", str(file)], env={**os.environ, **self.job.secrets})
        found = re.match(r"(\d+)", answer.strip().splitlines()[-1] if answer.strip() else "")
        if found is None:
            raise UserError(f"sbatch: expected the number of a job, and it printed {answer.strip()!r}; nothing is recorded")
        return Submitted(self.name, found[1], self.job.name, now())

    def is_active(self, submitted: Submitted) -> bool:
        return bool(_queued(submitted.id))

    @staticmethod
    def waits_or_runs(submitted: Submitted) -> bool | None:
        state = _queued(submitted.id) if shutil.which("squeue") else None
        return None if state is None else bool(state)

    def follow(self, submitted: Submitted) -> int:
        log, shown, unknown = self.job.folder / f"{submitted.id}.log", 0, 0
        while True:
            queued = _queued(submitted.id)  # before the log, so that its last lines are shown
            shown = _show(log, shown)
            if queued:
                time.sleep(POLL)
                continue
            ended = _ended(submitted.id)
            if ended is None and unknown < UNKNOWN:  # accounting is late
                unknown += 1
                time.sleep(POLL)
                continue
            _show(log, shown)
            state, code = ended or ("unknown", CRASH)
            print(f"job       {submitted.id} ended: {state}, exit code {code}", flush=True)
            return code if state == "COMPLETED" or code else CRASH

    def fetch(self, submitted: Submitted) -> Path:
        if not (self.job.output_dir / "report.json").is_file():
            raise UserError(f"{self.job.output_dir}: no result yet; see {self.job.folder / submitted.id}.log")
        return self.job.output_dir


def saving(limit: float | None) -> float:
    """Seconds before the time limit at which training is told to save."""
    return SAVING if limit is None else min(SAVING, max(limit / 10, 60.0), limit / 2)


def slurm_time(limit: float) -> str:
    """Seconds as D-HH:MM:SS, rounded up to a minute."""
    minutes = -(-int(limit) // 60)
    days, rest = divmod(minutes, 1440)
    return f"{f'{days}-' if days else ''}{rest // 60:02}:{rest % 60:02}:00"


def _quoted(text: str) -> str:
    """A value of an #SBATCH line. Raises UserError for one that cannot be written."""
    if '"' in text or "\n" in text:
        raise UserError(f'--on slurm: {text}: a line of #SBATCH cannot hold " or a line break; use another name')
    return f'"{text}"' if re.search(r"[\s#']", text) else text


def _queued(job: str) -> str | None:
    """The state of a job that waits or runs; empty for others, and None where the controller does not answer."""
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False)
    if done.returncode != OK and "Invalid job id" not in done.stderr:
        return None
    state = done.stdout.strip().splitlines()[0].strip() if done.returncode == OK and done.stdout.strip() else ""
    return "" if state in ENDED else state


def _ended(job: str) -> tuple[str, int] | None:
    """State and exit code of a job that ended, from accounting or from the controller; None if neither knows it."""
    commands = (
        (["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode"], r"^(\w+)[^|]*\|(\d+):(\d+)"),
        (["scontrol", "show", "job", job], r"(?s)JobState=(\w+).*?ExitCode=(\d+):(\d+)"),
    )
    for command, pattern in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # a cluster without accounting may have no sacct
            continue
        found = re.search(
            pattern, done.stdout.strip().splitlines()[-1] if "sacct" in command and done.stdout.strip() else done.stdout
        )
        if found and found[1] in ENDED:
            return found[1], int(found[2]) or (128 + int(found[3]) if int(found[3]) else 0)
    return None


def _show(log: Path, start: int) -> int:
    """Print a log from a position on; returns the new position."""
    if not log.is_file():
        return start
    with log.open("rb") as file:
        file.seek(start)
        text = file.read()
    sys.stdout.write(text.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return start + len(text)
