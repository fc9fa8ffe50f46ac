"""Rows of a mapped Arrow file, some of them, in some order: numbers for each row in memory (16 bytes), and no tokens."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


def read_numbers(file: Path, kinds: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """Columns of numbers of an Arrow stream, `[count]` each, as the NumPy types in `kinds`.

    The file is mapped for this alone, and pages that were looked at are given back on the way: else the columns of short
    rows, which lie between their tokens, would bring all tokens into memory with them.
    """
    import pyarrow as pa

    found = {name: np.empty(count, kind) for name, kind in kinds.items()}
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    start = 0
    for batch in pa.ipc.open_stream(pa.py_buffer(mapped)):
        for name, values in found.items():
            values[start : start + len(batch)] = batch.column(name).to_numpy()
        start += len(batch)
        mapped.madvise(mmap.MADV_DONTNEED)
    return found


@dataclass(frozen=True)
class Selection:
    """Some of the rows of a table.

    Args:
        table: the mapped rows of all sources, `[n]`.
        row: the number of each one's row over all sources, `[n]`; never smaller than the one before, since pieces of a row
            (`overflow: split`) follow one another.
        length: tokens, `[n]`.
        text_hash: the same for rows of the same text, `[n]`.
        places: which of them, in which order, `[rows]`; None for all.
    """

    table: Dataset
    row: np.ndarray
    length: np.ndarray
    text_hash: np.ndarray
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row if self.places is None else self.places)

    def of(self, column: np.ndarray) -> np.ndarray:
        """The part of a column of the table that belongs to these rows, `[rows]`."""
        return column if self.places is None else column[self.places]

    def select(self, places: np.ndarray) -> Selection:
        """Some of these."""
        return replace(self, places=places if self.places is None else self.places[places])

    def lengths(self) -> np.ndarray:
        """Tokens of each, `[rows]`."""
        return self.of(self.length)

    def digest(self) -> str:
        """SHA-256 over which rows these are, in which order and of which lengths."""
        found = hashlib.sha256()
        for column in (self.row, self.length):
            found.update(np.ascontiguousarray(self.of(column)).data)
        return found.hexdigest()

    def dataset(self) -> Dataset:
        """As a data set without the column `text_hash`.

        `Dataset.select` would do, but makes a Python list of the places first, of 40 bytes each.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        rows = self.table.remove_columns("text_hash")
        if self.places is None:
            return rows
        name = hashlib.sha256(self.places.data).hexdigest()[:32]
        indices = InMemoryTable(pa.table({"indices": pa.array(self.places.view(np.uint64))}))
        return Dataset(rows.data, info=rows.info, split=rows.split, indices_table=indices, fingerprint=name)
