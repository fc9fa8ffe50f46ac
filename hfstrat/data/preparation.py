"""The data of a run: tokenised once, every row accounted for, an evaluation part that shares no row with training."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data import cache, parts, readers, sources
from hfstrat.data.account import Account
from hfstrat.data.readers import Row
from hfstrat.data.reading import Reading, read_as
from hfstrat.data.render import Renderer, answer_of, prompt_of
from hfstrat.data.tokenise import tokenise
from hfstrat.data_section import Data, Source

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Prepared:
    """Tokenised data, memory-mapped: columns `input_ids`, `labels` (-100 where there is no loss), `length`, `row`.

    `row` numbers the rows of all sources one after another; the pieces of a split row have the same one.
    """

    train: Dataset
    eval: Dataset
    renderer: Any  # Renderer; of a classification Texts
    accounts: dict[str, Account]
    samples: list[dict[str, Any]] = field(default_factory=list)  # evaluation rows as prompt and reference
    overlap: dict[str, Any] = field(default_factory=dict)  # of `parts.overlap`
    label_names: tuple[str, ...] = ()  # of a classification, by the number that stands for each

    def probe(self, rows: int = 2, tokens: int = 128) -> Any:
        """Token ids `[rows, tokens]` of some evaluation rows, cut to the shortest, for comparing models."""
        import torch

        chosen = self.eval["input_ids"][:rows]
        width = min(tokens, *(len(ids) for ids in chosen)) if len(chosen) > 1 else min(tokens, len(chosen[0]))
        return torch.tensor([ids[:width] for ids in chosen])

    def fingerprint(self) -> str:
        """A hash of the training rows' ids and of their order."""
        digest = hashlib.sha256()
        for name in ("row", "length"):
            digest.update(parts.column(self.train, name).tobytes())
        for chunk in self.train.data.column("input_ids").chunks:
            digest.update(chunk.flatten().to_numpy().tobytes())
        return digest.hexdigest()

    def account(self) -> dict[str, Any]:
        return {name: asdict(account) for name, account in self.accounts.items()} | {"overlap": self.overlap}

    def lines(self) -> list[str]:
        """The account in words."""
        lines = [f"{name:<9} {line}" for name, account in self.accounts.items() for line in account.lines()]
        if "eval" not in self.accounts:
            lines.append(f"{'eval':<9} {len(self.eval):,} rows held out, {len(self.train):,} left to train on")
        return lines + [f"{'twice':<9} {line}" for line in parts.overlap_lines(self.overlap)]


class Table(NamedTuple):
    """The tokenised rows of all sources of one part, with the account, and how to find a row as it was written."""

    rows: Dataset
    account: Account
    origins: list[Origin]
    origin: np.ndarray  # the number of each row's source, `[rows]`

    def example(self, row: int) -> Any:
        """The example of a row by its number over all sources."""
        for origin in self.origins:
            if row < origin.count:
                rows, reading = origin.read()
                return reading.example(next(itertools.islice(rows, row, None)))
            row -= origin.count
        raise IndexError(row)


@dataclass
class Origin:
    """One source: its rows can be read again at any time."""

    source: Source
    data: Data
    files: list[Path] | None
    hub: Dataset | None
    count: int = 0
    told: Callable[..., Any] = Reading.of  # how to read its rows, from the first of them

    @classmethod
    def of(cls, source: Source, data: Data, key: str, splits: tuple[str, ...], split: str) -> Origin:
        files = sources.local_files(source.path, key, splits)
        hub = sources.load_from_hub(source.path, key, data.config, split, data.revision) if files is None else None
        return cls(source, data, files, hub)

    def rows(self) -> Iterator[Row]:
        if self.hub is not None:
            return (readers.without_fill(row) for row in self.hub)
        return itertools.chain.from_iterable(map(readers.read, self.files or []))

    @property
    def wanted(self) -> tuple[str, dict[str, str]]:
        """Format and columns that the recipe names."""
        columns = self.data.columns if self.source.columns is None else self.source.columns
        return self.source.format or self.data.format, columns

    def read(self) -> tuple[Iterator[Row], Any]:
        return read_as(self.rows(), self.source.path, *self.wanted, self.told)

    def inputs(self) -> dict[str, Any]:
        """What its rows depend on, for a fingerprint."""
        path, hub = self.source.path, self.hub
        return {
            "bytes": self.digest(),
            "kinds": [readers.kind_of(file) for file in self.files or []],
            "hub": None if hub is None else [path, self.data.config, str(hub.split), len(hub)],
            "format": self.wanted[0],
            "columns": self.wanted[1],
        }

    def digest(self) -> str:
        """Over the bytes that the rows come from."""
        if self.hub is None:
            return cache.digest_of(*(self.files or []))
        stored = [Path(file["filename"]) for file in self.hub.cache_files]
        return cache.digest_of(*stored) if stored else cache.fingerprint({"rows": json.dumps(self.hub.to_list(), default=str)})


Tokenised = Callable[[Origin], "tuple[Dataset, Account]"]


def prepare(data: Data, tokenizer: Any, seed: int, samples: int = 0, max_eval_rows: int | None = None) -> Prepared:
    """Load, render and tokenise the training and evaluation rows of a recipe, or take them from the cache.

    Raises:
        UserError: data that cannot be read, rows that do not fit their format, no token that carries loss, or more
            than one percent of the supervised tokens lost to `max_length`.
    """
    renderer = Renderer(tokenizer, data.template, data.train_on)
    key = cache.tokenizer_digest(tokenizer)
    tokenised: Tokenised = lambda origin: _tokenised(origin, renderer, key)  # noqa: E731
    split = sources.SPLITS.get(data.split, data.split)
    table = table_of(data.train, data, "data.train", (split,), data.split, tokenised)
    accounts, train, origin = {"train": table.account}, table.rows, table.origin
    if data.eval or data.eval_split:
        asked = data.eval_split
        splits = (sources.SPLITS.get(asked, asked),) if asked else sources.EVALUATION
        evaluated = table_of(data.eval or data.train, data, "data.eval", splits, asked or data.split, tokenised)
        accounts["eval"], held = evaluated.account, evaluated.rows
        held = held.select(range(min(max_eval_rows or len(held), len(held))))
    else:
        evaluated = table
        left, out = parts.hold_out(train, data.eval_size, max_eval_rows, seed)
        train, held, origin = train.select(left), train.select(out), origin[left]
    overlap = parts.overlap(train, held, tokenizer)
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        train = train.select(parts.weigh(origin, weights, seed))
    shown = _samples(evaluated, held, samples)
    # rows of like length share a forward pass; no sum depends on the order
    held = held.select(np.argsort(-parts.column(held, "length"), kind="stable"))
    return Prepared(train.remove_columns("text_hash"), held.remove_columns("text_hash"), renderer, accounts, shown, overlap)


def table_of(given: list[Source], data: Data, name: str, splits: tuple[str, ...], split: str, tokenised: Tokenised) -> Table:
    """All rows of one part: of `data.train`, or of `data.eval`."""
    from datasets import concatenate_datasets

    tables, accounts, origins = [], [], list[Origin]()
    for source in given:
        origin = Origin.of(source, data, name, splits, split)
        rows, account = tokenised(origin)
        if before := sum(each.count for each in origins):
            rows = rows.remove_columns("row").add_column("row", parts.column(rows, "row") + before)
        origin.count = account.rows_read
        tables.append(rows)
        accounts.append(account)
        origins.append(origin)
    numbers = np.repeat(np.arange(len(tables)), [len(rows) for rows in tables])
    return Table(concatenate_datasets(tables), Account.together(accounts), origins, numbers)


def _tokenised(origin: Origin, renderer: Renderer, tokenizer_key: str) -> tuple[Dataset, Account]:
    from datasets import Dataset

    source, data = origin.source, origin.data
    options = {name: getattr(data, name) for name in ("max_length", "overflow", "train_on")}
    inputs = {**origin.inputs(), "tokenizer": tokenizer_key, "template": renderer.template, **options}
    said = f"{source.path}, at most {data.max_length} tokens a row"

    def build(target: Path) -> dict[str, Any]:
        return asdict(tokenise(*origin.read(), data, renderer, target))

    entry = cache.fetch("rows", cache.fingerprint(inputs), said, build)
    account = Account.of(entry.value)
    account.source, account.weight = source.path, source.weight
    return Dataset.from_file(str(entry.path)), account


def _samples(table: Table, held: Dataset, count: int) -> list[dict[str, Any]]:
    """The first evaluation rows as prompt and reference; rows without a prompt (plain text) are none."""
    chosen = dict.fromkeys(int(row) for row in parts.column(held, "row")) if count else {}
    examples = [table.example(row) for row in itertools.islice(chosen, count)]
    return [{"prompt": prompt, "reference": answer_of(e)} for e in examples if (prompt := prompt_of(e))]
