"""Heartbeats between processes: one that stops sending is reported by rank and host.

When a machine dies, the others wait in a collective operation: gloo detects a closed connection at once, NCCL's watchdog acts
after ten minutes, and neither reports which process is missing. So each process writes a heartbeat to the rendezvous store.
torchelastic reports failures only on its own machine.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from hfstrat import errors

BEAT = 2.0  # seconds between heartbeats
SILENCE = 40.0  # seconds without one after which a process counts as lost
AFTER_ERROR = 8.0  # the same, after a connection broke
BROKEN = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timeout", "nccl", "gloo")
FILE = "HFSTRAT_OUTCOME"  # the file for the outcome, set by `hfstrat train` if it uses a launcher; see `distributed`
LAUNCHER = "the rendezvous store (on the machine of rank 0)"


class Heartbeat:
    """Sends this process's heartbeat and reads those of the others, in a thread.

    Args:
        store: anything with `set`, `get` and `check`: a separate connection to the rendezvous store.
    """

    def __init__(self, store: Any, rank: int, size: int, silence: float = SILENCE) -> None:
        self.store, self.rank, self.size, self.silence = store, rank, size, silence
        self.seen: dict[int, tuple[bytes, float]] = {}  # of the other ranks: the last heartbeat, and when it changed
        self.hosts: dict[int, str] = {}
        self.lost_store: str | None = None
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hfstrat-heartbeat", daemon=True)

    def start(self) -> None:
        self.store.set(self._key("host", self.rank), socket.gethostname())
        self.store.set(self._key("beat", self.rank), "0")  # also for a process that dies in its first seconds
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * BEAT)

    def silent(self, longer_than: float) -> list[int]:
        """The ranks whose heartbeat is older than so many seconds; those never seen do not count."""
        now = time.monotonic()
        return [rank for rank, (_, since) in sorted(self.seen.items()) if now - since > longer_than]

    def describe(self, ranks: list[int]) -> str:
        """A sentence about processes that are lost."""
        lost = [f"rank {rank}{f' on {self.hosts[rank]}' if rank in self.hosts else ''}" for rank in ranks]
        return (
            f"{' and '.join(lost) or self.lost_store} {'is' if len(lost) < 2 else 'are'} gone: no heartbeat any more. The "
            "same command, on all machines, resumes from the last complete checkpoint"
        )

    def find_lost(self, patience: float = 3 * AFTER_ERROR) -> str | None:
        """A sentence about the process that stopped sending heartbeats, after a broken connection; None if all send."""
        with suppress(Exception):  # in the first seconds the thread may not have read anything yet
            self._read()
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if (ranks := self.silent(AFTER_ERROR)) or self.lost_store:
                return self.describe(ranks)
            time.sleep(BEAT / 4)
        return None

    def _run(self) -> None:
        number, failing_since = 0, 0.0
        while not self._stop.wait(BEAT):
            number += 1
            try:
                self.store.set(self._key("beat", self.rank), str(number))
                self._read()
                failing_since = 0.0
            except Exception as error:  # the store raises many kinds of errors
                if self._stop.is_set():
                    return
                failing_since = failing_since or time.monotonic()
                self.lost_store = f"{LAUNCHER} ({str(error).splitlines()[0][:80]})"
                if time.monotonic() - failing_since < self.silence:
                    continue
            gone = self.silent(self.silence)
            if (gone or failing_since) and not self._stop.is_set():
                self._end(self.describe(gone))

    def _read(self) -> None:
        for other in (rank for rank in range(self.size) if rank != self.rank):
            key = self._key("beat", other)
            if not self.store.check([key]):
                continue
            beat = self.store.get(key)
            if other not in self.hosts:
                self.hosts[other] = self.store.get(self._key("host", other)).decode()
            if other not in self.seen or self.seen[other][0] != beat:
                self.seen[other] = (beat, time.monotonic())

    def _end(self, sentence: str) -> None:
        """Report and exit: the main thread waits in a collective operation that will never end."""
        print(f"rank {self.rank}: {sentence}", file=sys.stderr, flush=True)
        note(errors.CRASH, sentence)
        os._exit(errors.CRASH)

    def _key(self, what: str, rank: int) -> str:
        return f"hfstrat/{self.attempt}/{what}/{rank}"


_heartbeat: Heartbeat | None = None


def begin(rank: int, size: int) -> None:
    """Start heartbeats, unless this is the only process or there is no rendezvous store."""
    global _heartbeat
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if size == 1 or not address or not port:
        return
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=SILENCE / 2))
    except Exception:  # another kind of rendezvous: only the libraries' own watchdogs remain
        return
    _heartbeat = Heartbeat(store, rank, size)
    _heartbeat.start()


def end() -> None:
    """Stop heartbeats: the processes end in an orderly way."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None


class ProcessLost(errors.RunError):
    """Another process does not exist any more."""


def explain(error: BaseException) -> errors.RunError:
    """`errors.named`, or after a broken connection the process that is lost."""
    text = str(error).lower()
    is_broken = not isinstance(error, errors.RunError) and any(mark in text for mark in BROKEN)
    gone = _heartbeat.find_lost() if _heartbeat is not None and is_broken else None
    return ProcessLost(gone) if gone else errors.named(error)


def note(code: int, sentence: str, checkpoints: str = "") -> None:
    """Write the outcome for the launcher's parent, if it has one and no other process has written it."""
    rank, file = int(os.environ.get("RANK", "0")), os.environ.get(FILE)
    if file and (code or rank == 0) and not Path(file).exists():
        partial = Path(f"{file}.{rank}")
        partial.write_text(json.dumps({"code": code, "sentence": sentence, "rank": rank, "checkpoints": checkpoints}))
        partial.rename(file)
