"""Runs the jobs of a search in a process that has its libraries loaded, and waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from hfstrat.engine import children
from hfstrat.models.load import read_json
from hfstrat.run import launch

WORKER = [sys.executable, "-m", "hfstrat.tuning.worker"]
STARTING = 300.0  # seconds for the libraries to load
LOG = "worker.log"


class WorkerEnded(Exception):
    """The process that runs the jobs has ended, with this exit code: a job may have taken all memory."""


class Runner:
    """Runs one job after the other.

    Args:
        folder: for the log of the process.
        device: value of CUDA_VISIBLE_DEVICES for the jobs; None: as it is.
    """

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self.folder = folder
        self.environment = launch.plan_launch([], None, None).environment
        if device is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = device
        self.forks = sys.platform == "linux" and not launch.count_gpus()
        self.ready = 0.0  # seconds that the libraries took to load
        self._worker: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._job: int | None = None
        self._sent: str | None = None  # the file of the job that the worker was given

    def start(self) -> None:
        """Start loading the libraries; does not wait."""
        if not self.forks or (self._worker is not None and self._worker.poll() is None):
            return
        log = (self.folder / LOG).open("a", encoding="utf-8")
        self._lines = queue.Queue()
        self._worker = children.start(WORKER, self.environment, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._worker.stdout is not None
        threading.Thread(target=_read, args=(self._worker.stdout, self._lines), daemon=True).start()

    def run(self, file: Path, result: Path, look: Callable[[], None]) -> dict[str, Any]:
        """Run the job of a file; returns its answer.

        Args:
            result: the file of the answer; an answer that exists already is returned at once.
            look: called twice per second.

        Raises:
            KeyboardInterrupt: after the job has been stopped.
        """
        if not (answer := read_json(result)):
            kills, since = children.kernel_kills(), time.monotonic()
            try:
                code = self._fork(file, look) if self.forks else self._spawn(file, look)
            except WorkerEnded as ended:  # another one is started for the next job
                code = int(ended.args[0])
            except BaseException:
                self.stop()
                raise
            answer = read_json(result)
            if not answer:
                status, sentence = children.outcome(code, {}, children.kernel_kills() - kills, None)
                answer = {"status": status, "sentence": sentence, "seconds": time.monotonic() - since}
        return answer

    def _fork(self, file: Path, look: Callable[[], None]) -> int:
        self.start()
        assert self._worker is not None
        assert self._worker.stdin is not None
        if not self.ready:
            self.ready = float(self._next(look, "ready")["ready"])
        self._sent = str(file)
        self._worker.stdin.write(f"{file}\n".encode())
        self._worker.stdin.flush()
        self._job = int(self._next(look, "started", self._sent)["started"])
        code = int(self._next(look, "ended", self._sent)["ended"])
        self._job = self._sent = None
        return code

    def _next(self, look: Callable[[], None], key: str, file: str | None = None) -> dict[str, Any]:
        """The next message of the worker about a job, not one about a job that was stopped. Raises WorkerEnded."""
        assert self._worker is not None
        while True:
            with contextlib.suppress(queue.Empty):
                message = self._lines.get(timeout=children.TICK)
                if key in message and message.get("file") == file:
                    return message
            look()
            if self._worker.poll() is not None and self._lines.empty():
                self.ready = 0.0
                self._job = self._sent = None
                raise WorkerEnded(self._worker.returncode)

    def _spawn(self, file: Path, look: Callable[[], None]) -> int:
        with file.with_suffix(".log").open("a", encoding="utf-8") as log:
            child = children.start([*WORKER, str(file)], self.environment, log)
            self._job = child.pid
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(children.TICK)
                look()
        self._job = None
        return child.returncode

    def stop(self) -> None:
        """Stop the current job, which saves a checkpoint, and wait for its end."""
        if self._job is None and self._sent is not None:  # interrupted before the worker said that it has started it
            with contextlib.suppress(WorkerEnded, TimeoutError):
                self._job = int(self._next(_limit(children.GRACE), "started", self._sent)["started"])
        process, self._job, self._sent = self._job, None, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        until = time.monotonic() + children.GRACE
        while time.monotonic() < until and _exists(process):
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            if _exists(process):
                os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """End the process with the libraries."""
        self.stop()
        if self._worker is not None:
            assert self._worker.stdin is not None
            with contextlib.suppress(OSError):
                self._worker.stdin.close()
            children.terminate(self._worker)


def _limit(seconds: float) -> Callable[[], None]:
    """Raises TimeoutError when it is called after that time."""
    until = time.monotonic() + seconds

    def look() -> None:
        if time.monotonic() > until:
            raise TimeoutError

    return look


def _read(stream: IO[bytes], lines: queue.Queue[dict[str, Any]]) -> None:
    for line in stream:
        with contextlib.suppress(ValueError):
            lines.put(json.loads(line))


def _exists(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"
