"""What is computed once is computed by all processes of a run together, each its share, as one process would have done it."""

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
    """The processes of a run; every method is a collective operation, called by all of them in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def current(cls) -> ProcessGroup:
        """Of the process group that is there."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @cached_property
    def gloo(self) -> Any:
        """A gloo group of all, for what is in the machine's memory; made when it is needed first."""
        import torch.distributed as dist

        return dist.new_group(backend="gloo")

    @cached_property
    def writers(self) -> tuple[int, ...]:
        """One process for each cache folder that they see: machines may have one of their own.

        Each leaves a file there; who sees none of a lower process is the first.
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
        """Each process's value, for all of them."""
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
        """`compute` of all items, in order, each process doing every `size`-th.

        The writers get the results, the others none (`for_all`: everybody does); all have to come to the end.
        """
        for start in range(0, len(items), self.size):
            place = start + self.rank
            made = compute(items[place]) if place < len(items) else None
            count = min(self.size, len(items) - start)
            yield from self.gather(made)[:count] if for_all else self._to_writers(made)[:count]  # type: ignore[misc]

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
        """As `cache.fetch`, of something that all build together where one of them has not got it.

        Raises:
            UserError, RunError: as `cache.fetch`.
        """
        from hfstrat.data import cache

        if self.size == 1:
            return cache.fetch(kind, name, description, build, needed)
        there = cache.find(kind, name)
        if all(self.gather(there is not None)) and there is not None:
            return there
        took_part: list[bool] = []

        def writing(target: Path) -> Any:
            took_part.append(True)
            return build(target)

        if self.rank in self.writers:
            cache.fetch(kind, name, description, writing, needed)
        if not took_part:
            build(None)
        self.wait()  # the writers have written
        return cache.fetch(kind, name, description, _missing, needed)


def exhaust(results: Iterable[Any]) -> None:
    """Come to the end of `ProcessGroup.each` without a use for the results."""
    for _ in results:
        pass


def _missing(target: Path) -> Any:
    raise RuntimeError(f"{target}: what all processes built together is not here (process {os.environ.get('RANK', '?')})")


SINGLE = ProcessGroup()
