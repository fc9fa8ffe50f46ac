"""Work that is shared by the processes of a run, with the results that a single process would have.

Not accelerate's `split_between_processes` and `gather_object`, which hold all results in memory: `each` yields them in order.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from hfstrat.data.cache import Entry

Item = TypeVar("Item")
Result = TypeVar("Result")
Build = Callable[[Path | None], Any]
"""Called by all processes: computes with `ProcessGroup.each`, writes if given a path, returns what `cache.fetch` stores."""


class ProcessGroup:
    """The processes of a run. Every method is a collective operation: all processes must call it, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def current(cls) -> ProcessGroup:
        """The initialized process group; a single process if there is none."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @cached_property
    def gloo(self) -> Any:
        """A gloo group of all processes, for objects in CPU memory; created on first use."""
        import torch.distributed as dist

        return dist.new_group(backend="gloo")

    @cached_property
    def writers(self) -> tuple[int, ...]:
        """The ranks that write to the cache, one for each cache folder: machines may have separate ones.

        Each process creates a file; one that sees no file of a lower rank is the writer.
        """
        if self.size == 1:
            return (0,)
        from hfstrat.data.cache import folder

        token = self.gather(uuid.uuid4().hex)[0]
        mine = folder() / f".here-{token}-{self.rank}"
        mine.touch()
        self.wait()
        first = not any((folder() / f".here-{token}-{other}").exists() for other in range(self.rank))
        self.wait()
        mine.unlink(missing_ok=True)
        return tuple(rank for rank, is_first in enumerate(self.gather(first)) if is_first)

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, on all processes."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.gloo)
        return found

    def wait(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(group=self.gloo)

    def each(self, items: Sequence[Item], compute: Callable[[Item], Result], for_all: bool = False) -> Iterator[Result]:
        """The results of `compute` for all items, in order; each process computes every `size`-th.

        Only writers get results (all processes with `for_all`); all must exhaust the iterator.
        """
        for start in range(0, len(items), self.size):
            place = start + self.rank
            result = compute(items[place]) if place < len(items) else None
            count = min(self.size, len(items) - start)
            yield from self.gather(result)[:count] if for_all else self._to_writers(result)[:count]  # type: ignore[misc]

    def _to_writers(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = []
        for writer in self.writers:
            here: list[Any] | None = [None] * self.size if writer == self.rank else None
            dist.gather_object(value, here, dst=writer, group=self.gloo)
            found = here or found
        return found

    def fetch(self, kind: str, name: str, description: str, build: Build, needed: int = 0) -> Entry:
        """`cache.fetch` (with its errors) of an entry that all processes build together, unless all of them find it."""
        from hfstrat.data import cache

        if self.size == 1:
            return cache.fetch(kind, name, description, build, needed)
        entry = cache.find(kind, name)
        if all(self.gather(entry is not None)) and entry is not None:
            return entry
        took_part: list[bool] = []

        def writing(target: Path) -> Any:
            took_part.append(True)
            return build(target)

        if self.rank in self.writers:
            cache.fetch(kind, name, description, writing, needed)
        if not took_part:
            build(None)
        self.wait()  # for the writers
        return cache.fetch(kind, name, description, _missing, needed)


def exhaust(results: Iterable[Any]) -> None:
    """Exhaust `ProcessGroup.each` and ignore the results."""
    for _ in results:
        pass


def _missing(target: Path) -> Any:
    raise RuntimeError(f"{target}: the entry that all processes built is missing (rank {os.environ.get('RANK', '?')})")


SINGLE = ProcessGroup()
