"""Several processes compute together what one computes. The processes are threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import pytest

from hfstrat.trainer.collective import ProcessGroup, exhaust


class Thread(ProcessGroup):
    """A process of a group that communicates through a list."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: Barrier, writers: tuple[int, ...]) -> None:
        super().__init__(rank, size)
        self.table, self.barrier, self.writers = table, barrier, writers  # type: ignore[assignment]

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(20)
        found = list(self.table)
        self.barrier.wait(20)
        return found

    def wait(self) -> None:
        self.barrier.wait(20)

    def _to_writers(self, value: Any) -> list[Any]:
        found = self.gather(value)
        return found if self.rank in self.writers else []


def in_group(size: int, work: Callable[[ProcessGroup], Any], writers: tuple[int, ...] = (0,)) -> list[Any]:
    """The result of each process."""
    table, barrier = [None] * size, Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(work, Thread(r, size, table, barrier, writers)) for r in range(size)]]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_each_does_its_share_and_the_writers_get_all_in_order(size: int, count: int) -> None:
    done: list[tuple[int, int]] = []

    def work(group: ProcessGroup) -> tuple[list[int], list[int]]:
        def square(item: int) -> int:
            done.append((group.rank, item))
            return item * item

        items = list(range(count))
        return list(group.each(items, square)), list(group.each(items, square, for_all=True))

    for rank, (ours, everybodys) in enumerate(in_group(size, work)):
        assert ours == ([item * item for item in range(count)] if rank == 0 else [])
        assert everybodys == [item * item for item in range(count)]
    assert sorted(done) == sorted((item % size, item) for item in range(count) for _ in range(2))


def test_what_is_fetched_is_built_by_all_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path))
    shares, written, lock = [0, 0, 0], [], Lock()

    def work(group: ProcessGroup) -> Any:
        def compute(item: int) -> bytes:
            shares[group.rank] += 1
            return bytes([item])

        def build(target: Path | None) -> Any:
            results = group.each(list(range(8)), compute)
            if target is None:
                return exhaust(results)
            with lock:
                written.append(group.rank)
            target.write_bytes(b"".join(results))
            return {"printed": 8}

        entry = group.fetch("things", "a" * 32, "things", build)
        return entry.path.read_bytes(), entry.value

    assert in_group(3, work) == [(bytes(range(8)), {"printed": 8})] * 3
    assert shares == [3, 3, 2]
    assert written == [0]
    in_group(3, work)
    assert shares == [3, 3, 2], "it was there already"


def test_one_process_needs_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path))
    group = ProcessGroup.current()
    assert (group.rank, group.size, group.writers) == (0, 1, (0,))
    assert group.gather("x") == ["x"]
    entry = group.fetch("things", "b" * 32, "things", lambda target: target.write_bytes(b"1") and None)
    assert entry.path.read_bytes() == b"1"
