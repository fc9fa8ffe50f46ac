"""One run of a comparison: a process of its own, and how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfstrat import errors
from hfstrat.models.load import read_json
from hfstrat.run import launch
from hfstrat.tasks import report
from hfstrat.trainer import checkpoints, heartbeat

STATE, LOG, RESULT, CACHE = "state.json", "log.txt", "run", "cache"  # in a run's folder
TIMED_OUT = "timed-out"
TICK = 0.5  # seconds between two looks at a process
GRACE = 15.0  # seconds that it gets to end when it is asked to
CHECKPOINT = re.compile(r"; (?:the last good|there was no) checkpoint (?:is \S+?|yet)(?=\. |\.?$)")  # none of them is kept here


@dataclass(frozen=True)
class Run:
    """One recipe with one seed. `identity` is a hash of all that its result depends on."""

    label: str
    seed: int
    source: str
    words: tuple[str, ...]
    folder: Path
    identity: str

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def command(self) -> list[str]:
        """As a person would write it."""
        return ["hfstrat", "train", self.source, *self.words, "--overwrite"]


@dataclass(frozen=True)
class Ending:
    """How a run ended: `status` is one of `errors.NAMES` or timed-out, `sentence` its reason."""

    identity: str
    status: str
    sentence: str
    wall_seconds: float  # of the whole process

    @property
    def is_done(self) -> bool:
        return self.status == errors.NAMES[errors.OK]


def ending_of(run: Run) -> Ending | None:
    """How it ended, if it did, and is still the same run; a finished one has to have its report."""
    stored = read_json(run.folder / STATE)
    if stored.get("identity") != run.identity:
        return None
    try:
        ending = Ending(**stored)
    except TypeError:
        return None
    return ending if not ending.is_done or report.status(run.result) == "done" else None


def carry_out(run: Run, limit: float | None, look: Callable[[], None]) -> Ending:
    """Start it, wait for its end, write down how it ended.

    It always begins anew, and with a cache of its own: its seconds are then those of one whole run that finds nothing done,
    as are those of the runs that it is compared with.

    Args:
        limit: seconds after which it is ended.
        look: called a few times a second.

    Raises:
        KeyboardInterrupt: it was passed on to the run, which has ended; nothing is written down.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / STATE).unlink(missing_ok=True)
    told = run.folder / "outcome.json"
    told.unlink(missing_ok=True)
    started = launch.plan_launch([run.source, *run.words, "--overwrite"], None, None)
    environment = started.environment | {heartbeat.FILE: str(told), "HFSTRAT_CACHE": str(run.folder / CACHE)}
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    killed, since = kernel_kills(), time.monotonic()
    with run.log.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            started.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it through us alone
            # Linux: it is told when this process is killed (PR_SET_PDEATHSIG), so that no run goes on that nobody waits for
            preexec_fn=(lambda: library.prctl(1, signal.SIGTERM)) if library else None,
        )
        try:
            in_time = _wait(child, since, limit, look)
        except BaseException:
            _end(child)
            raise
        finally:  # nobody goes on from its checkpoints, and those of many runs would fill the disk
            for folder in (run.folder / CACHE, *checkpoints.all_checkpoints(run.result)):
                shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - since
    status, sentence = how(child.returncode, read_json(told), kernel_kills() - killed, None if in_time else limit)
    for file in run.folder.glob(f"{told.name}*"):  # the run's process number lies beside it
        file.unlink(missing_ok=True)
    ending = Ending(run.identity, status, CHECKPOINT.sub("", sentence), seconds)
    partial = run.folder / f"{STATE}.partial"
    partial.write_text(json.dumps(asdict(ending), indent=1), encoding="utf-8")
    partial.replace(run.folder / STATE)
    return ending


def _wait(child: subprocess.Popen[bytes], since: float, limit: float | None, look: Callable[[], None]) -> bool:
    """Whether it ended by itself."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TICK)
            return True
        look()
        if limit is not None and time.monotonic() - since > limit:
            _end(child)
            return False


def _end(child: subprocess.Popen[bytes]) -> None:
    """Politely, then not; with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
            return


def kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory so far."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def how(code: int, told: dict[str, Any], kills: int, limit: float | None) -> tuple[str, str]:
    """Status and sentence of an ended process.

    Args:
        code: as `Popen.returncode`.
        told: what it said of its end, if it could.
        kills: processes that the kernel killed for want of memory meanwhile.
        limit: the seconds that it was given, if it was ended for needing more.
    """
    if limit is not None:
        return TIMED_OUT, f"it took longer than {limit:,.0f} s and was ended (--timeout)"
    if told:
        code = int(told.get("code", errors.CRASH))
        return errors.NAMES.get(code, errors.NAMES[errors.CRASH]), str(told.get("sentence", ""))
    if code == -signal.SIGKILL:
        sure = "by the kernel, as memory ran out" if kills > 0 else "most likely by the kernel, as memory ran out"
        return errors.NAMES[errors.OUT_OF_MEMORY], f"killed (signal 9), {sure}"
    if code < 0:
        return errors.NAMES[errors.CRASH], f"killed by signal {-code} ({signal.Signals(-code).name})"
    return errors.NAMES[errors.CRASH], f"it ended with code {code} and did not say why; see its log"
