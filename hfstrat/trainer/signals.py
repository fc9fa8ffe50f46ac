"""Ctrl-C and a polite kill (SIGTERM): while steps are made the running one is finished and saved; else the run ends at once.

A second Ctrl-C ends it at once in any case. Under a launcher that is ours, the parent tells every process (`tell_all`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hfstrat import errors
from hfstrat.errors import quiet_libraries
from hfstrat.trainer import heartbeat
from hfstrat.trainer.heartbeat import FILE, note

TWICE = 1.0  # seconds in which a signal that comes again is the same one: a terminal sends it, and a launcher passes it on
SAID = "stopping: the running step is finished and saved first; a second Ctrl-C ends at once"


class _Heard:
    """Signals belong to the process, and so does this."""

    first: float | None = None  # when the first one came
    waits: bool = False  # somebody will look, so the step may be finished
    under: str | None = None  # the file through which a parent of ours hears how it ended


_heard = _Heard()


def listen(outcome: str | None) -> None:
    """Handle SIGINT and SIGTERM from now on.

    Args:
        outcome: the file in which a parent of ours looks for the outcome; beside it lie our process number and its word.
    """
    _heard.first, _heard.waits, _heard.under = None, False, outcome
    signal.signal(signal.SIGINT, _hear)
    signal.signal(signal.SIGTERM, _hear)
    if outcome:
        Path(f"{outcome}.pid{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
        if _is_meant():  # it was said before we listened
            raise KeyboardInterrupt


def _hear(number: int, frame: object) -> None:
    now = time.monotonic()
    if not _heard.waits:
        if number == signal.SIGTERM and _heard.under and not _is_meant():
            os._exit(128 + number)  # the launcher clears up after another process, which has said why
        raise KeyboardInterrupt
    if _heard.first is None:
        _heard.first = now
        if os.environ.get("RANK", "0") == "0" and not was_cleared():
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{SAID}\n".encode())
    elif number == signal.SIGINT and now - _heard.first > TWICE:
        raise KeyboardInterrupt


def _is_meant() -> bool:
    return bool(_heard.under) and Path(f"{_heard.under}.stop").exists()


def was_cleared() -> bool:
    """Whether a signal came that nobody but the launcher can have sent: another process is gone."""
    return bool(_heard.under) and _heard.first is not None and not _is_meant()


def leave_if_cleared(error: BaseException) -> None:
    """End without a word where a crash only follows from another process's end: that one is what has to be heard of."""
    if was_cleared() and errors.named(error).code == errors.CRASH:
        os._exit(errors.CRASH)


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _heard.first is not None


@contextmanager
def after_the_step() -> Iterator[None]:
    """Inside, a signal is only noted, and `asked` says so; one that nobody has looked at counts on leaving."""
    _heard.waits = True
    try:
        yield
    finally:
        _heard.waits = False
    if asked():
        raise KeyboardInterrupt


class Agreement:
    """Whether any process was asked to stop: on all of them the same answer, at the same call.

    One process answers at once. Several add up a flag in the background, over a gloo group of their own (on the CPU, so that
    nobody waits for a device), and read the sum of the call before: an answer is one call late, and a process waits for
    another only when it is a whole call ahead. (Between machines gloo may need GLOO_SOCKET_IFNAME to be set.)

    Args:
        processes: how many there are; all make this object, and call `asked` equally often.
    """

    def __init__(self, processes: int) -> None:
        self._group: Any = None
        self._before: Any = None
        if processes > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo")

    def asked(self) -> bool:
        if self._group is None:
            return asked()
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(asked())])
        before, self._before = self._before, (dist.all_reduce(flag, group=self._group, async_op=True), flag)
        return before is not None and _sum(before) > 0

    def close(self) -> bool:
        """The answer to the last call, so that nothing is under way any more."""
        before, self._before = self._before, None
        return before is not None and _sum(before) > 0


def _sum(pending: Any) -> int:
    work, flag = pending
    work.wait()
    return int(flag)


def tell_all(outcome: str, now: bool) -> bool:
    """From a parent: have the processes of this machine stop after their step, or end `now`. False if there are none yet."""
    Path(f"{outcome}.stop").touch()
    numbers = []
    for file in Path(outcome).parent.glob(f"{Path(outcome).name}.pid*"):
        with suppress(ValueError, OSError):
            numbers.append(int(file.read_text()))
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL if now else signal.SIGTERM)
    return bool(numbers)


@contextmanager
def report_exit() -> Iterator[None]:
    """Run the body; end the process with a named exit code and one sentence. Only a crash shows a traceback."""
    quiet_libraries()
    try:
        listen(os.environ.get(FILE))
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        leave_if_cleared(error)
        named = heartbeat.named(error)
        if named.code == errors.CRASH and not isinstance(named, heartbeat.Gone):
            traceback.print_exc()
        end(named.code, str(named))
    else:
        end(errors.OK, "")


def end(code: int, sentence: str) -> None:
    """Say how it ended, once, and exit. The first process that failed is the one that is heard."""
    rank = int(os.environ.get("RANK", "0"))
    file = os.environ.get(FILE)
    if file:
        note(code, sentence)
    elif code and not file and (rank == 0 or code != errors.USER):
        print(f"{'' if rank == 0 else f'rank {rank}: '}{sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # a process group with a missing member would wait for it on the way out
    sys.exit(code)
