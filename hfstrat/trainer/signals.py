"""How a process is stopped and how it ends: signals, exit code, message.

During training, Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; at other times, or after a second
Ctrl-C, it ends immediately. Under `hfstrat train` with several processes, the parent stops all of them (`stop_all`).

Not transformers' own handling (`enable_jit_checkpoint`) or torchelastic's: neither makes all processes stop at the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hfstrat import errors
from hfstrat.trainer import heartbeat

REPEAT = 1.0  # seconds in which a second signal is the same one: sent by the terminal, and forwarded by a launcher
MESSAGE = "stopping: the current step is finished and a checkpoint saved; press Ctrl-C again to end immediately"


class _Received:
    """The signals that this process has received."""

    first: float | None = None  # time of the first one
    deferred: bool = False  # whether it takes effect after the current step
    outcome: str | None = None  # the file through which a parent process gets the outcome of this one


_received = _Received()


def listen(outcome: str | None) -> None:
    """Handle SIGINT and SIGTERM from now on; for `outcome` see `heartbeat.FILE`."""
    _received.first, _received.deferred, _received.outcome = None, False, outcome
    signal.signal(signal.SIGINT, _receive)
    signal.signal(signal.SIGTERM, _receive)
    if outcome:
        Path(f"{outcome}.pid{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
        if _parent_stopped():  # before we listened
            raise KeyboardInterrupt


@contextmanager
def restored() -> Iterator[None]:
    """Afterwards the handlers of SIGINT and SIGTERM are those from before; nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[None]:
    """Handle SIGINT and SIGTERM as a command does: in a step, it is finished and saved first."""
    with restored():
        if threading.current_thread() is threading.main_thread():
            listen(os.environ.get(heartbeat.FILE))
        yield


def _receive(number: int, frame: object) -> None:
    now = time.monotonic()
    if not _received.deferred:
        if number == signal.SIGTERM and _received.outcome and not _parent_stopped():
            os._exit(128 + number)  # the launcher ends all processes after one failed, which has reported the cause
        raise KeyboardInterrupt
    if _received.first is None:
        _received.first = now
        if os.environ.get("RANK", "0") == "0" and not ended_by_launcher():
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{MESSAGE}\n".encode())
    elif number == signal.SIGINT and now - _received.first > REPEAT:
        raise KeyboardInterrupt


def _parent_stopped() -> bool:
    return bool(_received.outcome) and Path(f"{_received.outcome}.stop").exists()


def ended_by_launcher() -> bool:
    """Whether only the launcher can have sent the signal, because another process failed."""
    return bool(_received.outcome) and _received.first is not None and not _parent_stopped()


def exit_if_ended_by_launcher(error: BaseException) -> None:
    """Exit silently if a crash is only the consequence of another process's failure, which is the one to report."""
    if ended_by_launcher() and errors.named(error).code == errors.CRASH:
        os._exit(errors.CRASH)


def stop_requested() -> bool:
    """Whether this process received a stop signal."""
    return _received.first is not None


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, signals only set `stop_requested`; one that was not handled takes effect at the end."""
    _received.deferred = True
    try:
        yield
    finally:
        _received.deferred = False
    if stop_requested():
        raise KeyboardInterrupt


class Agreement:
    """Whether any process received a stop signal: the same answer on all of them, at the same call.

    Several processes sum a flag in the background, over a gloo group of their own (on the CPU, so that no device is waited
    for), and read the sum of the previous call: an answer is one call late, and a process waits for another only if it is a
    complete call ahead. (Between machines gloo may need GLOO_SOCKET_IFNAME.)

    Args:
        processes: their number; all create this object, and call `stop_requested` equally often.
    """

    def __init__(self, processes: int) -> None:
        self._group: Any = None
        self._before: Any = None
        if processes > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo")

    def stop_requested(self) -> bool:
        if self._group is None:
            return stop_requested()
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(stop_requested())])
        before, self._before = self._before, (dist.all_reduce(flag, group=self._group, async_op=True), flag)
        return self._is_any(before)

    def close(self) -> bool:
        """The answer to the last call; afterwards no operation is pending."""
        before, self._before = self._before, None
        return self._is_any(before)

    @staticmethod
    def _is_any(pending: Any) -> bool:
        if pending is None:
            return False
        work, flag = pending
        work.wait()
        return int(flag) > 0


def stop_all(outcome: str, now: bool) -> bool:
    """Stop the processes of this machine after their current step, or end them `now`; False if none has started yet."""
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
    """Run the body, then end the process with an exit code and one sentence; only a crash shows a traceback."""
    errors.quiet_libraries()
    try:
        listen(os.environ.get(heartbeat.FILE))
        yield
    except SystemExit:
        raise
    except BaseException as error:
        exit_if_ended_by_launcher(error)
        named = heartbeat.explain(error)
        if named.code == errors.CRASH and not isinstance(named, heartbeat.ProcessLost):
            traceback.print_exc()
        end(named.code, str(named), named.checkpoints)
    else:
        end(errors.OK, "")


def end(code: int, sentence: str, checkpoints: str = "") -> None:
    """Report the end, once, and exit. With several processes, only the first that fails is reported."""
    rank = int(os.environ.get("RANK", "0"))
    if os.environ.get(heartbeat.FILE):
        heartbeat.note(code, sentence, checkpoints)
    elif code and (rank == 0 or code != errors.USER or sentence.startswith("objective.rewards")):  # of its own answers
        print(f"{'' if rank == 0 else f'rank {rank}: '}{sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # on a normal exit, the process group would wait for its missing members
    sys.exit(code)
