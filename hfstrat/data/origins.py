"""Where rows come from: one source of a recipe, whose rows can be read again at any time."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data import cache, readers, sources
from hfstrat.data.readers import Row
from hfstrat.data.reading import Reading, read_as
from hfstrat.data_section import Data, Source
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TOKENS_PER_TEXT = 2  # an id and a label, of four bytes each, for every four bytes of text or so
PACKED = 3  # a compressed file, once it is text


@dataclass
class Origin:
    """One source: its rows can be read again at any time."""

    source: Source
    data: Data
    files: list[Path] | None
    hub: Dataset | None
    count: int = 0
    told: Callable[..., Any] = Reading.of  # how to read its rows, from the first of them
    part: str = "all"  # of each file, where a file is a document: all, head (to train on) or tail (held out)

    @classmethod
    def of(cls, source: Source, data: Data, key: str) -> Origin:
        split, of_files = sources.splits_of(source, data, key)
        files = sources.local_files(source.path, key, of_files)
        if files is not None:
            return cls(source, data, files, None)
        config, revision = data.of(source, "config"), data.of(source, "revision")
        return cls(source, data, None, sources.load_from_hub(source.path, key, config, split, revision))

    def rows(self) -> Iterator[Row]:
        if self.hub is not None:
            return (readers.without_fill(row) for row in self.hub)
        if self.data.documents == "files":
            return (self._cut(readers.read_whole(file), file) for file in self.files or [])
        return itertools.chain.from_iterable(map(readers.read, self.files or []))

    @property
    def wanted(self) -> tuple[str, dict[str, str]]:
        """Format and columns that the recipe names."""
        return self.data.of(self.source, "format"), self.data.of(self.source, "columns")

    def read(self) -> tuple[Iterator[Row], Any]:
        return read_as(self.rows(), self.source.path, *self.wanted, self.told)

    def _cut(self, row: Row, file: Path) -> Row:
        """The document's part, cut behind the line that its last `eval_size` begins in."""
        if self.part == "all":
            return row
        text = row["text"]
        place = text.find("\n", int(len(text) * (1 - self.data.eval_size))) + 1
        if not text[:place].strip() or not text[place:].strip():
            raise UserError(
                f"data.eval_size: {file}: its last {self.data.eval_size:.0%} hold no whole line to hold out; "
                "name data.eval, or raise eval_size"
            )
        return {"text": text[:place] if self.part == "head" else text[place:]}

    def inputs(self) -> dict[str, Any]:
        """What its rows depend on, for a fingerprint."""
        return {
            "bytes": self.digest(),
            "kinds": [readers.kind_of(file) for file in self.files or []],
            "hub": self.identity(),
            "format": self.wanted[0],
            "columns": self.wanted[1],
            "part": [self.part, self.data.eval_size if self.part != "all" else None],
        }

    def predicted(self) -> int:
        """Bytes that the rows will take as tokens, roughly."""
        if self.hub is not None:
            return TOKENS_PER_TEXT * sum(Path(file["filename"]).stat().st_size for file in self.hub.cache_files)
        packed = {".gz": PACKED, ".parquet": PACKED}
        return TOKENS_PER_TEXT * sum(file.stat().st_size * packed.get(file.suffix, 1) for file in self.files or [])

    def identity(self) -> list[Any] | None:
        """Which data set of the Hub this is, if it is one."""
        if self.hub is None:
            return None
        asked = [self.data.of(self.source, name) for name in ("config", "revision")]
        return [self.source.path, *asked, str(self.hub.split), len(self.hub)]

    def digest(self) -> str:
        """Over the bytes that the rows come from."""
        if self.hub is None:
            return cache.digest_of(*(self.files or []))
        stored = [Path(file["filename"]) for file in self.hub.cache_files]
        if stored:
            return cache.digest_of(*stored)
        digest = hashlib.sha256()
        for row in self.hub:  # made in memory
            digest.update(json.dumps(row, default=str).encode())
        return digest.hexdigest()
