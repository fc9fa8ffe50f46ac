"""One run of a comparison: a process of its own, and its ending."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hfstrat import errors
from hfstrat.models.load import read_json
from hfstrat.recipe import format
from hfstrat.run import launch
from hfstrat.tasks import report
from hfstrat.trainer import checkpoints, heartbeat

STATE, LOG, RESULT, CACHE = "state.json", "log.txt", "run", "cache"  # in the folder of a run
TIMED_OUT = "timed-out"
TICK = 0.5  # seconds between two checks of a process
GRACE = 15.0  # seconds to terminate after SIGTERM


@dataclass(frozen=True)
class Run:
    """One recipe with one seed. `identity` is a hash of everything that its result depends on."""

    label: str
    seed: int
    source: str
    overrides: tuple[str, ...]
    folder: Path
    identity: str

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def command(self) -> list[str]:
        """The equivalent command line."""
        return ["hfstrat", "train", self.source, *self.overrides, "--overwrite"]


@dataclass(frozen=True)
class Ending:
    """How a run ended: `status` is one of `errors.NAMES` or timed-out, `sentence` the reason."""

    identity: str
    status: str
    sentence: str
    wall_seconds: float  # of the process

    @property
    def is_done(self) -> bool:
        return self.status == errors.NAMES[errors.OK]


def read_ending(run: Run) -> Ending | None:
    """The stored ending; None if the run has not ended, has changed since, or is finished but has no report."""
    stored = read_json(run.folder / STATE)
    if stored.get("identity") != run.identity:
        return None
    try:
        ending = Ending(**stored)
    except TypeError:
        return None
    return ending if not ending.is_done or report.status(run.result) == "done" else None


def execute(run: Run, limit: float | None, look: Callable[[], None]) -> Ending:
    """Start a run, wait for its end and store the ending.

    A run always starts over with its own empty cache, so that its time is comparable with that of the other runs.

    Args:
        run: what to start.
        limit: seconds after which it is terminated.
        look: called twice per second.

    Raises:
        KeyboardInterrupt: was passed on to the run, which has ended; no ending is stored.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    reported = run.folder / "outcome.json"
    for file in (run.folder / STATE, reported):
        file.unlink(missing_ok=True)
    kills, since = kernel_kills(), time.monotonic()
    with run.log.open("w", encoding="utf-8") as log:
        child = _start(run, reported, log)
        try:
            in_time = _wait(child, since, limit, look)
        except BaseException:
            _terminate(child)
            raise
        finally:  # the checkpoints of many runs would fill the disk, and none is resumed
            for folder in (run.folder / CACHE, *checkpoints.all_checkpoints(run.result)):
                shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - since
    status, sentence = outcome(child.returncode, read_json(reported), kernel_kills() - kills, None if in_time else limit)
    for file in run.folder.glob(f"{reported.name}*"):  # also the file with its process id
        file.unlink(missing_ok=True)
    ending = Ending(run.identity, status, sentence, seconds)
    partial = run.folder / f"{STATE}.partial"
    partial.write_text(json.dumps(asdict(ending), indent=1), encoding="utf-8")
    partial.replace(run.folder / STATE)
    return ending


def _start(run: Run, reported: Path, log: IO[str]) -> subprocess.Popen[bytes]:
    """The process of a run, which reports its outcome in a file."""
    planned = launch.plan_launch([run.source, *run.overrides, "--overwrite"], None, None)
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return subprocess.Popen(
        planned.command,
        env=planned.environment | {heartbeat.FILE: str(reported), "HFSTRAT_CACHE": str(run.folder / CACHE)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches it only through this process
        # Linux: it is terminated when this process is killed (PR_SET_PDEATHSIG)
        preexec_fn=(lambda: library.prctl(1, signal.SIGTERM)) if library else None,
    )


def _wait(child: subprocess.Popen[bytes], since: float, limit: float | None, look: Callable[[], None]) -> bool:
    """Wait for the end; whether the process ended by itself."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TICK)
            return True
        look()
        if limit is not None and time.monotonic() - since > limit:
            _terminate(child)
            return False


def _terminate(child: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, then SIGKILL, to the process and everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
            return


def kernel_kills() -> int:
    """The number of processes that the kernel has killed for lack of memory so far."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def outcome(code: int, reported: dict[str, Any], kills: int, limit: float | None) -> tuple[str, str]:
    """Status and sentence of an ended process.

    Args:
        code: as `Popen.returncode`.
        reported: what it reported about its end (`heartbeat.note`); empty if it could not.
        kills: processes that the kernel killed for lack of memory in the meantime.
        limit: the seconds after which it was terminated; None if it was not.
    """
    if limit is not None:
        return TIMED_OUT, f"it took longer than {format.duration(limit)} and was terminated (--timeout)"
    if reported:
        sentence = reported["sentence"].replace(reported.get("checkpoints", ""), "")  # they are deleted
        return errors.NAMES.get(reported["code"], errors.NAMES[errors.CRASH]), sentence
    if code == -signal.SIGKILL:
        sure = "by the kernel, because memory ran out" if kills > 0 else "most likely by the kernel, because memory ran out"
        return errors.NAMES[errors.OUT_OF_MEMORY], f"killed (signal 9), {sure}"
    if code < 0:
        return errors.NAMES[errors.CRASH], f"killed by signal {-code} ({signal.Signals(-code).name})"
    return errors.NAMES[errors.CRASH], f"it ended with exit code {code} without a message; see its log"
