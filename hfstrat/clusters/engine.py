"""What every engine does: plan a job, submit it, follow its log, fetch its result."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from hfstrat.clusters.job import Job, Options, check_no_secret
from hfstrat.errors import UserError, first_line

RECORD = "launch.json"


@dataclass(frozen=True)
class Plan:
    """Everything that a launch writes and runs; secrets appear by name only.

    files: texts of the files to write.
    command: what submits the job, as a line to read.
    follow, cancel, result: what shows the log, what ends the job, and where the result is; {id} is that of the job.
    notes: what the user should know before paying.
    uploads: local files and folders that are copied to the remote machine, by their path there.
    """

    files: dict[Path, str]
    command: str
    follow: str
    cancel: str
    result: str
    notes: list[str] = field(default_factory=list)
    uploads: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Submitted:
    """A submitted job, as it is recorded beside output_dir."""

    engine: str
    id: str
    name: str
    submitted: str
    url: str = ""


class Engine(ABC):
    """One engine, for one job."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def default_gpus(options: Options) -> int:
        """The GPUs of one machine, with --gpus or without. Raises UserError."""

    @staticmethod
    @abstractmethod
    def priced_as(options: Options) -> list[str]:
        """The names under which a price file may have the price of a machine."""

    @staticmethod
    @abstractmethod
    def gpu_of(options: Options) -> str | None:
        """The type of the GPUs; None if it is unknown."""

    @staticmethod
    @abstractmethod
    def waits_or_runs(submitted: Submitted) -> bool | None:
        """Whether a job of this engine is active, for a launch on another one; None if this machine cannot tell."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def restarts(self) -> int:
        """How often the engine starts the job again, at most."""
        return self.job.options.max_restarts

    @abstractmethod
    def plan(self) -> Plan:
        """What is written and run. Writes nothing, and asks no other machine.

        Raises:
            UserError: something that cannot work.
        """

    @abstractmethod
    def check(self) -> None:
        """Refuse before anything is written what this machine lacks: programs, a login. Raises UserError."""

    @abstractmethod
    def submit(self, plan: Plan) -> Submitted:
        """Submit the job; its files are written. Raises UserError with the reason of the engine."""

    @abstractmethod
    def is_active(self, submitted: Submitted) -> bool:
        """Whether the job waits or runs."""

    @abstractmethod
    def follow(self, submitted: Submitted) -> int:
        """Print the log until the job ends; returns its exit code, or 1 if the engine knows only that it failed."""

    @abstractmethod
    def fetch(self, submitted: Submitted) -> Path:
        """Copy the result to output_dir; returns the folder. Raises UserError if there is none."""


def write(plan: Plan, job: Job) -> None:
    """Write the files of a plan. Raises UserError if one would hold a secret."""
    for text in [*plan.files.values(), plan.command]:
        check_no_secret(job, text)
    for file, text in plan.files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir: {file}: cannot be written ({error.strerror}); name another folder") from None


def record(job: Job, submitted: Submitted) -> None:
    """Remember the job of this output_dir."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / RECORD).write_text(json.dumps(asdict(submitted), indent=1) + "\n", encoding="utf-8")


def recorded(job: Job) -> Submitted | None:
    """The last job that was submitted for this output_dir; None if there is none. Raises UserError if it cannot be read."""
    file = job.folder / RECORD
    if not file.is_file():
        return None
    try:
        return Submitted(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file}: not a record of hfstrat launch; remove it") from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def need(program: str, where: str) -> None:
    """Refuse a missing program. Raises UserError."""
    if shutil.which(program) is None:
        raise UserError(f"--on: {program}: not found; {where}, or give --dry-run, which needs none of its programs")


def ask(command: list[str], env: dict[str, str] | None = None) -> str:
    """The output of a program. Raises UserError with its last words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    except OSError as error:
        raise UserError(f"{command[0]}: {first_line(error)}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"ended with code {done.returncode}").splitlines()
        raise UserError(f"{shlex.join(command)}: {' '.join(line.strip() for line in said[-3:])}")
    return done.stdout
