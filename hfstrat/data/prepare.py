"""The data of a causal language model: tokenized once, every row counted, evaluation rows that share no text with training."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data import cache, splits
from hfstrat.data.render import RENDER_VERSION, TEMPLATES, Renderer
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import Selection, read_columns
from hfstrat.data.stats import Statistics
from hfstrat.data.tokenize import write_tokens
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source

if TYPE_CHECKING:
    from datasets import Dataset

UNLIMITED = 1 << 30  # tokens: more than any row has


@dataclass
class PreparedData:
    """Tokenized data, memory-mapped: columns `input_ids`, `labels` (-100 where there is no loss), `length`, `row`.

    `row` is the index of the source row over all sources; the parts of a split row share it, as do the rows that one
    conversation became.
    """

    train: Dataset
    eval: Dataset
    lengths: np.ndarray  # tokens of each training row
    eval_lengths: np.ndarray  # tokens of each evaluation row
    order: str  # a hash of which rows train, and their order
    renderer: Any  # Renderer; for a classification Texts
    statistics: dict[str, Statistics]  # of "train", and of "eval" if evaluation rows have their own source
    samples: list[dict[str, Any]] = field(default_factory=list)  # evaluation rows as prompt and reference
    duplicates: dict[str, Any] = field(default_factory=dict)  # see `splits.find_duplicates`
    label_names: tuple[str, ...] = ()  # of a classification, by label id

    def probe(self, rows: int = 2, tokens: int = 128) -> Any:
        """Token ids `[rows, tokens]` of some evaluation rows, truncated to the shortest, for comparing models."""
        import torch

        chosen = self.eval["input_ids"][:rows]
        width = min(tokens, *(len(ids) for ids in chosen)) if len(chosen) > 1 else min(tokens, len(chosen[0]))
        return torch.tensor([ids[:width] for ids in chosen])

    def fingerprint(self) -> str:
        """A hash of the tokens of the training rows and their order."""
        return hashlib.sha256(f"{self.statistics['train'].sha256} {self.order}".encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """The statistics as they are stored in the report."""
        return {name: asdict(stats) for name, stats in self.statistics.items()} | {"overlap": self.duplicates}

    def lines(self) -> list[str]:
        """The statistics as text, one line each."""
        lines = [f"{name:<9} {line}" for name, stats in self.statistics.items() for line in stats.lines()]
        if "eval" not in self.statistics:
            lines.append(f"{'eval':<9} {len(self.eval):,} rows held out, {len(self.train):,} rows left to train on")
        return lines + [f"{'overlap':<9} {line}" for line in splits.describe_duplicates(self.duplicates)]


class Table(NamedTuple):
    """The tokenized rows of all sources of one split, their statistics, and where the original rows are.

    `ends` are the positions at which the rows of each source end, `[sources]`.
    """

    rows: Selection
    statistics: Statistics
    sources: list[DataSource]
    ends: np.ndarray

    def examples(self, wanted: list[int]) -> list[Any]:
        """The examples of rows by their index over all sources. Each source is read once, up to the last row needed."""
        found, first = dict[int, Any](), 0
        for source in self.sources:
            mine = {row - first for row in wanted if first <= row < first + source.count}
            if mine:
                rows, row_format = source.read()
                head = enumerate(itertools.islice(rows, max(mine) + 1))
                found |= {first + index: row_format.example(row) for index, row in head if index in mine}
            first += source.count
        return [found[row] for row in wanted]


Tokenize = Callable[[DataSource], tuple[Path, Statistics]]


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> PreparedData:
    """Read, render and tokenize the training and evaluation rows of a recipe, or take them from the cache.

    Args:
        samples: evaluation rows to return as prompt and reference.
        held_out: hashes of the texts to hold out, if they were chosen before the tokenizer existed.

    Raises:
        UserError: data that cannot be read, rows that do not fit their format, no token with loss, or more than one percent
            of the supervised tokens lost to `max_length`.
    """
    renderer = Renderer(tokenizer, data.template, data.train_on)
    key = cache.tokenizer_digest(tokenizer)
    tokenize: Tokenize = lambda source: _tokenize(source, renderer, key)  # noqa: E731
    holds_out_tails = data.documents == "files" and not (data.eval or data.eval_split)
    table = load_table(data.train, data, "data.train", tokenize, "head" if holds_out_tails else "all")
    renderer.continues_text = table.statistics.format == "text"
    statistics, train = {"train": table.statistics}, table.rows
    if data.eval or data.eval_split or holds_out_tails:
        if holds_out_tails:
            evaluated = load_table(data.train, data, "data.train", tokenize, "tail")
        else:
            evaluated = load_table(data.eval or data.train, data, "data.eval", tokenize)
        statistics["eval"], held = evaluated.statistics, evaluated.rows
        held = held.select(np.arange(min(max_eval_rows or len(held), len(held))))
    else:
        evaluated = table
        if held_out is None:
            held_out = splits.choose_held_out(train.take(train.text_hash), data.eval_size, max_eval_rows, data.drawn_by(seed))
        left, out = splits.divide(train, held_out)
        train, held = train.select(left), train.select(out)
    if not len(held):
        raise UserError("data.eval: all evaluation rows were dropped; raise data.max_length, or set data.overflow: truncate")
    duplicates = splits.find_duplicates(train, held, tokenizer)
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        origin = np.searchsorted(table.ends, train.take(np.arange(len(table.rows))), "right")
        train = train.select(splits.apply_weights(origin, weights, seed))
    shown = _samples(evaluated, held, samples)
    held = _by_length(held)
    return PreparedData(
        train=train.dataset(),
        eval=held.dataset(),
        lengths=train.lengths(),
        eval_lengths=held.lengths(),
        order=train.digest(),
        renderer=renderer,
        statistics=statistics,
        samples=shown,
        duplicates=duplicates,
    )


def prepare_eval(data: Data, tokenizer: Any, samples: int = 0, max_rows: int | None = None) -> PreparedData:
    """All rows of `data.train` as evaluation rows, with the masks of training. Raises UserError as `prepare` does."""
    template = data.template if data.template in TEMPLATES else "chat"  # the template of a file is by now the tokenizer's own
    renderer = Renderer(tokenizer, template, data.train_on)
    key = cache.tokenizer_digest(tokenizer)
    table = load_table(data.train, data, "data.train", lambda source: _tokenize(source, renderer, key))
    renderer.continues_text = table.statistics.format == "text"
    held = table.rows.select(np.arange(min(max_rows or len(table.rows), len(table.rows))))
    shown = _samples(table, held, samples)
    held = _by_length(held)
    rows, lengths = held.dataset(), held.lengths()
    return PreparedData(rows, rows, lengths, lengths, held.digest(), renderer, {"eval": table.statistics}, shown)


def prepare_untruncated(data: Data, tokenizer: Any) -> Selection:
    """All rows of `data.train` in order and not truncated, for another tokenizer with its own template."""
    unlimited = data.model_copy(update={"max_length": UNLIMITED, "overflow": "truncate"})
    renderer, key = Renderer(tokenizer, "auto", data.train_on), cache.tokenizer_digest(tokenizer)
    return load_table(data.train, unlimited, "data.train", lambda source: _tokenize(source, renderer, key)).rows


def load_table(given: list[Source], data: Data, key: str, tokenize: Tokenize, part: str = "all") -> Table:
    """The tokenized rows of several sources.

    Args:
        key: the setting that names them, `data.train` or `data.eval`.
        part: of each document; see `DataSource`.
    """
    from datasets import Dataset, concatenate_datasets

    tables, columns, statistics, sources = (
        list[Dataset](),
        list[dict[str, np.ndarray]](),
        list[Statistics](),
        list[DataSource](),
    )
    for one in given:
        source = DataSource.open(one, data, key)
        source.part = part
        file, stats = tokenize(source)
        rows = Dataset.from_file(str(file))
        before = sum(each.count for each in sources)
        row_type = np.int32 if before + stats.rows_read < 2**31 else np.int64
        found = read_columns(file, {"row": row_type, "length": np.int32, "text_hash": np.int64}, len(rows))
        if before:
            found["row"] += before
            rows = rows.remove_columns("row").add_column("row", found["row"].astype(np.int64))
        source.count = stats.rows_read
        tables.append(rows)
        columns.append(found)
        statistics.append(stats)
        sources.append(source)
    ends = np.cumsum([len(rows) for rows in tables])
    joined = columns[0] if len(columns) == 1 else {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    return Table(Selection(concatenate_datasets(tables), **joined), Statistics.merge(statistics), sources, ends)


def _tokenize(source: DataSource, renderer: Renderer, tokenizer_key: str) -> tuple[Path, Statistics]:
    data, path = source.data, source.source.path
    options = {name: getattr(data, name) for name in ("max_length", "overflow", "train_on", "documents")}
    rendering = {"tokenizer": tokenizer_key, "template": renderer.template, "render_version": RENDER_VERSION}
    inputs = {**source.fingerprint_inputs(), **rendering, **options}

    def build(target: Path) -> dict[str, Any]:
        return asdict(write_tokens(*source.read(), data, renderer, target))

    description = f"{path}, at most {data.max_length} tokens per row"
    entry = cache.fetch("rows", cache.fingerprint(inputs), description, build, source.estimate_bytes())
    stats = Statistics.from_dict(entry.value)
    tail = f" (last {data.eval_size:.0%})" if source.part == "tail" else ""
    stats.source, stats.weight = f"{path}{tail}", source.source.weight
    return entry.path, stats


def _by_length(held: Selection) -> Selection:
    """Longest first: rows of similar length share a forward pass, and no sum depends on the order."""
    return held.select(np.argsort(-held.lengths(), kind="stable"))


def _samples(table: Table, held: Selection, count: int) -> list[dict[str, Any]]:
    """The first evaluation rows as prompt and reference; of a plain text its beginning and its continuation."""
    chosen = itertools.islice((row for row, _ in itertools.groupby(held.take(held.row))), count)
    examples = table.examples([int(row) for row in chosen])
    return [{"prompt": prompt, "reference": example.answer} for example in examples if (prompt := example.prompt)]
