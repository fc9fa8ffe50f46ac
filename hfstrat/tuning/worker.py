"""The process that runs the jobs of a search: libraries are imported once, and each job is a fork of it.

`python -m hfstrat.tuning.worker` reads names of job files from its input, and prints a line of JSON when a job starts and when
it has ended. A job that is killed for lack of memory does not end the others. With a file as its argument it runs that job
itself: that is used on GPUs, since CUDA must not be initialized before a fork, and on other systems than Linux.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hfstrat import errors

LIBRARIES = ("peft", "sklearn.linear_model", "hfstrat.strategies.frozen.precompute", "hfstrat.tuning.job")


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def run(file: str) -> None:
    """Run a job; ends the process with the code of its end."""
    from hfstrat.trainer import signals
    from hfstrat.tuning import job

    with signals.report_exit():
        job.run_job(Path(file))


def fork(file: str) -> tuple[int, int]:
    """Run a job in a fork; returns its process id and the descriptor that is readable once it has ended."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    os.close(reader)
    _end_with_parent()
    log = os.open(str(Path(file).with_suffix(".log")), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    code = errors.CRASH
    try:
        run(file)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a job saves a checkpoint when the search is killed


def main() -> None:
    """Serve jobs until the input ends."""
    started = time.monotonic()
    errors.quiet_libraries()
    for library in LIBRARIES:
        importlib.import_module(library)
    say(ready=time.monotonic() - started)
    for line in sys.stdin:
        process, reader = fork(file := line.strip())
        say(started=process, file=file)
        os.read(reader, 1)  # returns when the job has ended
        os.close(reader)
        _, status = os.waitpid(process, 0)
        say(ended=os.waitstatus_to_exitcode(status), file=file)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        main()
