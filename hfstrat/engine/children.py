"""The child processes of a comparison or a search: started in a session of their own, ended, and how they ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hfstrat import errors
from hfstrat.recipe import format

TIMED_OUT = "timed-out"
TICK = 0.5  # seconds between two checks of a process
GRACE = 15.0  # seconds to terminate after SIGTERM


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: IO[str],
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that writes to a log; `stdin` and `stdout` may be `subprocess.PIPE` (None: the log)."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=stdin,
        stdout=log if stdout is None else stdout,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches it only through this process
        # Linux: it is terminated when this process is killed (PR_SET_PDEATHSIG)
        preexec_fn=(lambda: library.prctl(1, signal.SIGTERM)) if library else None,
    )


def wait(child: subprocess.Popen[bytes], since: float, limit: float | None, look: Callable[[], None]) -> bool:
    """Wait for the end; whether the process ended by itself."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TICK)
            return True
        look()
        if limit is not None and time.monotonic() - since > limit:
            terminate(child)
            return False


def terminate(child: subprocess.Popen[bytes]) -> None:
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
