"""The rows of several sources, read one after another without an end, from the beginning or from a position that was stored.

`datasets.IterableDataset` reads the files and restores positions (`state_dict`). Two of its transforms are not used. The buffer
of `shuffle` is lost when a position is restored, as its documentation says; here the rows of a source are shuffled in blocks,
each a function of the seed and of the position at which it begins, so that a block is read again instead of being stored.
`interleave_datasets` needs the same columns in all sources; here the source of each row is drawn by seed and number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data import cache, features, readers
from hfstrat.data.formats import RowFormat
from hfstrat.data.sources import DataSource, local_files, splits_of
from hfstrat.data.values import Row
from hfstrat.errors import RunError, UserError, first_line
from hfstrat.recipe.data import Data, Source

if TYPE_CHECKING:
    from datasets import IterableDataset

BLOCK_IN_ORDER = 256  # rows that are read ahead where rows stay in order
DRAWS = 1024  # sources that are drawn at a time
DRAWN, SHUFFLED, FILES = 2, 3, 4  # the purposes of random numbers, besides the seed
PIECES, PIECE = 16, 1 << 16  # of a file, by which it is recognized, and their bytes


class Item(NamedTuple):
    """A row as it was read: `number` counts the rows of its shard (a file) from 0, `content` is not parsed yet."""

    source: int
    shard: int
    number: int
    content: Any


@dataclass
class StreamSource:
    """One source of a recipe, opened: its shards (files) can be read any number of times.

    Args:
        dataset: of `readers.RawRow` for local files, else of rows.
        identity: which rows these are, for recognizing them after an interruption.
        remarks: what may be wrong with the files, in words.
        held: by shard, how many of its first rows are held out.
    """

    source: Source
    data: Data
    dataset: IterableDataset
    files: list[Path] | None
    identity: Any
    class_names: dict[str, list[str]]
    remarks: list[str] = field(default_factory=list)
    reading: RowFormat | None = None
    held: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Source, data: Data, key: str) -> StreamSource:
        """The source, checked (local) or found on the Hub. Raises UserError."""
        split, folder_splits = splits_of(source, data, key)
        files = local_files(source.path, key, folder_splits)
        if files is None:
            return cls._of_hub(source, data, key, split)
        from datasets import IterableDataset

        checked = DataSource(source, data, files, None)
        if len(files) > 1:
            checked.check_files()
        dataset = IterableDataset.from_generator(read_files, gen_kwargs={"files": [str(file) for file in files]})
        identity = [cache.digest_sampled(file, PIECES, PIECE) for file in files]
        return cls(source, data, dataset, files, identity, checked.class_names, checked.remarks())

    @classmethod
    def _of_hub(cls, source: Source, data: Data, key: str, split: str) -> StreamSource:
        config, revision = data.of(source, "config"), data.of(source, "revision")
        try:
            builder = hub_builder(source.path, config, revision)
            dataset: Any = builder.as_streaming_dataset(split=split)
        except Exception as error:
            raise UserError(
                f"{key}: {source.path} is neither a local file nor a data set that can be streamed from the Hub "
                f"({first_line(error)}); check the name, data.config, data.split, data.revision and your login"
            ) from error
        files = {str(name): list(map(str, names)) for name, names in (builder.config.data_files or {}).items()}
        identity = [source.path, config, split, files]  # the address of a file has the commit
        return cls(source, data, dataset, None, identity, features.of_features(dataset.features or {}))

    @property
    def wanted(self) -> tuple[str, dict[str, str]]:
        """Format and columns as the recipe sets them."""
        return self.data.of(self.source, "format"), self.data.of(self.source, "columns")

    @property
    def shards(self) -> int:
        return int(self.dataset.num_shards)

    def shard(self, index: int) -> IterableDataset:
        """One shard, to be read alone."""
        return self.dataset.shard(num_shards=self.shards, index=index)

    def in_order(self, source: int) -> Iterator[Item]:
        """All rows once, in the order of the files. `source` is the number that the items have."""
        for shard in range(self.shards):
            for number, content in enumerate(self.shard(shard)):
                yield Item(source, shard, number, content)

    def row(self, item: Item) -> Row:
        """The row. Raises UserError, which names the file and the line or row, if it cannot be parsed."""
        if self.files is None:
            return readers.drop_nulls(item.content)
        return readers.parse_row(item.content, self.files[item.shard])

    def where(self, item: Item) -> str:
        """A row, named for messages."""
        if self.files is not None:
            return readers.where(item.content, self.files[item.shard])
        return f"{self.source.path}: row {item.number + 1}" + (f" of file {item.shard + 1}" if self.shards > 1 else "")


def hub_builder(path: str, config: str | None, revision: str | None) -> Any:
    """The builder of a Hub data set, which has read the list of its files and none of its rows."""
    import datasets

    return datasets.load_dataset_builder(path, config, revision=revision)


def read_files(files: list[str]) -> Iterator[readers.RawRow]:
    """The rows of files. `datasets` calls it for each file, and skips rows to restore a position."""
    for file in files:
        yield from readers.read_raw(Path(file))


class SourceStream:
    """The rows of one source, without those that are held out, epoch after epoch.

    Rows are read in blocks of `buffer` rows, which are shuffled; a block ends where an epoch does, so that each row is seen
    once per epoch. Files are in another random order in each epoch. With a buffer of 1 all is in order.
    """

    def __init__(self, source: StreamSource, index: int, buffer: int, seed: int) -> None:
        self.source, self.index, self.buffer, self.seed = source, index, buffer, seed
        self.epoch = self.place = self.number = 0  # of the next row: its file by its place in the order, its number in the file
        self._shard: IterableDataset | None = None
        self._rows: Iterator[Any] | None = None
        self._block: list[Item] = []
        self._used = 0  # rows of the block
        self._begin: dict[str, Any] = self._tell()
        self._restored: dict[str, Any] | None = None  # where the next block begins, if a position was restored
        self._order = lru_cache(maxsize=1)(self._draw_order)

    def next(self) -> Item:
        while self._used == len(self._block):
            self._fill()
        self._used += 1
        return self._block[self._used - 1]

    def position(self) -> dict[str, Any]:
        """Where the next row is: where its block begins, and the number of its rows that were given out."""
        return {"block": self._begin, "used": self._used}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position."""
        begin = position["block"]
        self.epoch, self.place, self.number = begin["epoch"], begin["place"], begin["number"]
        self._rows = self._shard = None
        if begin["state"] is not None:
            self._open(begin["state"])
        self._block, self._used = [], 0
        self._begin = self._restored = begin
        if position["used"]:
            self._fill()
            self._used = position["used"]

    def _tell(self) -> dict[str, Any]:
        state = None if self._shard is None else self._shard.state_dict()
        return {"epoch": self.epoch, "place": self.place, "number": self.number, "state": state}

    def _fill(self) -> None:
        """Read the next block; it is empty at the end of an epoch."""
        self._begin = begin = self._restored or self._tell()
        self._block, self._used, self._restored = [], 0, None
        while len(self._block) < (self.buffer if self.buffer > 1 else BLOCK_IN_ORDER):
            item = self._read()
            if item is None:
                break
            self._block.append(item)
        if not self._block and not (begin["place"] or begin["number"]):
            raise UserError(f"{self.source.source.path}: it has no rows to train on; lower data.eval_size, or add rows")
        if self.buffer > 1:
            numbers = (self.seed, SHUFFLED, self.index, begin["epoch"], begin["place"], begin["number"])
            order = np.random.default_rng(numbers).permutation(len(self._block))
            self._block = [self._block[place] for place in order]

    def _read(self) -> Item | None:
        """The next row of this epoch; None at its end, after which the next epoch begins."""
        while self.place < self.source.shards:
            if self._rows is None:
                self._open(None)
            shard, number = self._order(self.epoch)[self.place], self.number
            try:
                content = next(self._rows, None)  # type: ignore[arg-type]  # it has been opened
            except RunError:
                raise
            except Exception as error:  # of the network, or of a file format
                raise RunError(
                    f"data.train: {self.source.source.path} cannot be read from row {number + 1:,} of file {shard + 1} on: "
                    f"{type(error).__name__}: {first_line(error)}; the same command resumes from the last checkpoint"
                ) from error
            if content is None:
                self._rows = self._shard = None
                self.place, self.number = self.place + 1, 0
                continue
            self.number += 1
            if number >= self.source.held.get(shard, 0):
                return Item(self.index, shard, number, content)
        self.epoch, self.place = self.epoch + 1, 0
        return None

    def _open(self, state: dict[str, Any] | None) -> None:
        self._shard = self.source.shard(self._order(self.epoch)[self.place])
        if state is not None:
            self._shard.load_state_dict(state)
        self._rows = iter(self._shard)

    def _draw_order(self, epoch: int) -> list[int]:
        if self.buffer == 1:
            return list(range(self.source.shards))
        drawn = np.random.default_rng((self.seed, FILES, self.index, epoch)).permutation(self.source.shards)
        return [int(shard) for shard in drawn]


class Mixture:
    """The rows of all sources: each is of a source that is drawn with a probability of its weight over the sum of all."""

    def __init__(self, sources: list[StreamSource], buffer: int, seed: int) -> None:
        self.streams = [SourceStream(source, index, buffer, seed) for index, source in enumerate(sources)]
        self.shares, self.seed = shares_of([source.source for source in sources]), seed
        self.draws = 0  # the number of rows so far
        self._drawn = lru_cache(maxsize=1)(self._draw)

    def next(self) -> Item:
        which = 0
        if len(self.streams) > 1:
            block, place = divmod(self.draws, DRAWS)
            which = self._drawn(block)[place]
        self.draws += 1
        return self.streams[which].next()

    def position(self) -> dict[str, Any]:
        """What `restore` takes; it can be written as JSON."""
        return {"draws": self.draws, "sources": [stream.position() for stream in self.streams]}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position."""
        self.draws = position["draws"]
        for stream, one in zip(self.streams, position["sources"], strict=True):
            stream.restore(one)

    def _draw(self, block: int) -> list[int]:
        generator = np.random.default_rng((self.seed, DRAWN, block))
        return [int(which) for which in generator.choice(len(self.shares), size=DRAWS, p=self.shares)]


def shares_of(sources: list[Source]) -> list[float]:
    """The share of each source of the rows of a mixture."""
    total = sum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def is_local(source: Source, data: Data, key: str) -> bool:
    """Whether a source is of local files. Raises UserError where these do not exist."""
    return local_files(source.path, key, splits_of(source, data, key)[1]) is not None
