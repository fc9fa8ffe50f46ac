"""Who of the world is still there: each process says so every few seconds, and one that falls silent is named.

When a machine dies, its peers wait in a collective operation: gloo hears of a closed connection at once, NCCL's own watchdog
comes after ten minutes, and neither says who. So each process keeps a beat in the store where the processes met.
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

BEAT = 2.0  # seconds from one sign of life to the next


SILENCE = 40.0  # after which a process counts as gone


AFTER_ERROR = 8.0  # the same, where a connection has broken already


BROKEN = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timeout", "nccl", "gloo")


LAUNCHER = "the launcher's meeting place (on the machine of rank 0)"


class Heartbeat:
    """The beats of a world, read and kept by a thread of this process's own.

    Args:
        store: anything with `set`, `get` and `check`: a connection of its own to where the processes met.
    """

    def __init__(self, store: Any, rank: int, size: int, silence: float = SILENCE) -> None:
        self.store, self.rank, self.size, self.silence = store, rank, size, silence
        self.seen: dict[int, tuple[bytes, float]] = {}  # of each other: its last beat, and when it changed
        self.hosts: dict[int, str] = {}
        self.lost_store: str | None = None
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hfstrat-watch", daemon=True)

    def start(self) -> None:
        self.store.set(self._key("host", self.rank), socket.gethostname())
        self.store.set(self._key("beat", self.rank), "0")  # who dies in the first seconds has been heard of
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * BEAT)

    def silent(self, longer_than: float) -> list[int]:
        """The processes whose beat has not changed for so many seconds; those never heard of yet do not count."""
        now = time.monotonic()
        return [rank for rank, (_, since) in sorted(self.seen.items()) if now - since > longer_than]

    def named(self, ranks: list[int]) -> str:
        """A sentence about processes that are gone."""
        words = [f"rank {rank}{f' on {self.hosts[rank]}' if rank in self.hosts else ''}" for rank in ranks]
        return (
            f"{' and '.join(words) or self.lost_store} {'is' if len(words) < 2 else 'are'} gone: no sign of life any more. The "
            "same command, on all machines, goes on from the last complete checkpoint"
        )

    def who_is_gone(self, patience: float = 3 * AFTER_ERROR) -> str | None:
        """After a broken connection: wait until somebody has been silent for a while; None if nobody is."""
        with suppress(Exception):  # in the first seconds the thread may not have listened yet
            self._listen()
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if (ranks := self.silent(AFTER_ERROR)) or self.lost_store:
                return self.named(ranks)
            time.sleep(BEAT / 4)
        return None

    def _run(self) -> None:
        number, failing_since = 0, 0.0
        while not self._stop.wait(BEAT):
            number += 1
            try:
                self.store.set(self._key("beat", self.rank), str(number))
                self._listen()
                failing_since = 0.0
            except Exception as error:  # the store's errors are of many kinds
                if self._stop.is_set():
                    return
                failing_since = failing_since or time.monotonic()
                self.lost_store = f"{LAUNCHER} ({str(error).splitlines()[0][:80]})"
                if time.monotonic() - failing_since < self.silence:
                    continue
            gone = self.silent(self.silence)
            if (gone or failing_since) and not self._stop.is_set():
                self._end(self.named(gone))

    def _listen(self) -> None:
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
        """The main thread waits in a collective operation that will never end: nothing but leaving helps."""

        print(f"rank {self.rank}: {sentence}", file=sys.stderr, flush=True)
        note(errors.CRASH, sentence)
        os._exit(errors.CRASH)

    def _key(self, what: str, rank: int) -> str:
        return f"hfstrat/{self.attempt}/{what}/{rank}"


_watch: Heartbeat | None = None


def begin(rank: int, size: int) -> None:
    """Watch the world that this process has joined; nothing where it is alone, or met the others elsewhere than at a store."""
    global _watch
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if size == 1 or not address or not port:
        return
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=SILENCE / 2))
    except Exception:  # another kind of meeting place: nobody is watched, and the libraries' own watchdogs remain
        return
    _watch = Heartbeat(store, rank, size)
    _watch.start()


def end() -> None:
    """The processes part in peace."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


class Gone(errors.RunError):
    """Another process is not there any more."""


def named(error: BaseException) -> errors.RunError:
    """As `errors.named`; where a connection broke, with who is gone."""
    text = str(error).lower()
    is_broken = not isinstance(error, errors.RunError) and any(words in text for words in BROKEN)
    gone = _watch.who_is_gone() if _watch is not None and is_broken else None
    return Gone(gone) if gone else errors.named(error)


FILE = "HFSTRAT_OUTCOME"  # set by `hfstrat train` when it goes through a launcher


def note(code: int, sentence: str) -> None:
    """Leave it for the launcher's parent, where there is one that has not heard of an end yet."""
    rank, file = int(os.environ.get("RANK", "0")), os.environ.get(FILE)
    if file and (code or rank == 0) and not Path(file).exists():
        partial = Path(f"{file}.{rank}")
        partial.write_text(json.dumps({"code": code, "sentence": sentence, "rank": rank}))
        partial.rename(file)
