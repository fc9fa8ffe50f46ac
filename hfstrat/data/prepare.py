"""Prepared data: every row tokenized once and counted, and evaluation rows that share no text with training.

`divide` does this for the rows of any task; a `RowEncoder` is what differs. That of causal language models is here.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data import cache, splits
from hfstrat.data.chat_template import options_of
from hfstrat.data.formats import RowFormat
from hfstrat.data.render import RENDER_VERSION, TEMPLATES, Renderer
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import Selection, read_columns
from hfstrat.data.stats import Statistics
from hfstrat.data.tokenize import write_tokens
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    from datasets import Dataset

FEW_ROWS = 10  # evaluation rows below which metrics are called chance
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
    renderer: Any  # Renderer; Texts where a text has labels
    statistics: dict[str, Statistics]  # of "train", and of "eval" if evaluation rows have their own source
    samples: list[dict[str, Any]] = field(default_factory=list)  # evaluation rows as prompt and reference
    duplicates: dict[str, Any] = field(default_factory=dict)  # see `splits.find_duplicates`
    label_names: tuple[str, ...] = ()  # where a text has labels: their names, by id
    stream: Any = None  # `streaming.TokenStream`: all training rows, where these are read while training; `train` is a sample

    def probe(self, rows: int = 2, tokens: int = 128) -> Any:
        """Token ids `[rows, tokens]` of some evaluation rows, truncated to the shortest, for comparing models."""
        import torch

        chosen = self.eval["input_ids"][:rows]
        width = min(tokens, *(len(ids) for ids in chosen)) if len(chosen) > 1 else min(tokens, len(chosen[0]))
        return torch.tensor([ids[:width] for ids in chosen])

    def fingerprint(self) -> str:
        """A hash of the tokens of the training rows, their order, and their labels where they have names."""
        tokens = hashlib.sha256(f"{self.statistics['train'].sha256} {self.order}".encode()).hexdigest()
        if not self.label_names:
            return tokens
        return hashlib.sha256(f"{tokens}{(self.label_names, self.train['label'][:])!r}".encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """The statistics as they are stored in the report."""
        return {name: asdict(stats) for name, stats in self.statistics.items()} | {"overlap": self.duplicates}

    def lines_after(self) -> list[str]:
        """What reading the data while training has shown, one line each."""
        return []

    def lines(self) -> list[str]:
        """The statistics as text, one line each."""
        lines = [f"{name:<9} {line}" for name, stats in self.statistics.items() for line in stats.lines()]
        if "eval" not in self.statistics:
            held, left = plural(len(self.eval), "row"), len(self.train)
            lines.append(
                f"{'eval':<9} {held} of these {'is' if len(self.eval) == 1 else 'are'} held out; {left:,} remain for training"
            )
        lines += [f"{'eval':<9} {line}" for line in few_rows(len(self.eval))]
        return lines + [f"{'overlap':<9} {line}" for line in splits.describe_duplicates(self.duplicates)]


def few_rows(count: int) -> list[str]:
    """A line where metrics are over so few rows that they mean little."""
    if count >= FEW_ROWS:
        return []
    return [
        f"warning: only {plural(count, 'evaluation row')}: metrics and their intervals are mostly chance; raise "
        f"data.eval_size, or set data.eval to at least {FEW_ROWS} rows"
    ]


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


class RowEncoder(ABC):
    """How the rows of one task become token ids and labels.

    Args:
        renderer: turns examples into token ids.
    """

    def __init__(self, renderer: Any) -> None:
        self.renderer, self.tokenizer = renderer, renderer.tokenizer
        self.tokenizer_key = self.digest_of_tokenizer()

    def digest_of_tokenizer(self) -> str:
        """A hash of what the prepared rows depend on of the tokenizer."""
        return cache.tokenizer_digest(self.tokenizer)

    def open(self, source: Source, data: Data, key: str) -> DataSource:
        """A source of rows, checked or loaded."""
        return DataSource.open(source, data, key)

    def shown(self, row: dict[str, Any]) -> str:
        """The beginning of a prepared row as text; with loss the end of the prompt and the beginning of the answer."""
        return splits.text_of(row, self.tokenizer)

    def what(self, options: dict[str, Any]) -> str:
        """What the prepared rows are, for the list of the cache."""
        return f"at most {options['max_length']} tokens per row"

    def reader(self, source: DataSource) -> Callable[..., Any]:
        """The function that chooses how to read the rows of a source, from the first of them."""
        return RowFormat.detect

    @abstractmethod
    def options(self, source: DataSource) -> dict[str, Any]:
        """What the prepared rows depend on in addition to the source and the tokenizer."""

    @abstractmethod
    def write(self, source: DataSource, target: Path) -> Statistics:
        """Write the tokenized rows to an Arrow file and return their statistics."""

    def with_labels(self, table: Table, key: str) -> Selection:
        """The tokenized rows with their labels.

        Args:
            key: the setting that names their sources; rows of `data.train` come first.
        """
        return table.rows

    def strata(self, rows: Selection) -> list[str] | None:
        """The class of each row, in whose proportions rows are held out; None where rows have none."""
        return None

    def some(self, rows: Selection, count: int | None) -> Selection:
        """At most `count` evaluation rows; all for None."""
        return rows.first(count)

    def reference(self, example: Any) -> str:
        """The answer to an example, as text."""
        return str(example.answer)

    def tokenize(self, source: DataSource) -> tuple[Path, Statistics]:
        """The Arrow file of the tokenized rows of a source, new or cached, and their statistics."""
        source.detect, options = self.reader(source), self.options(source)
        inputs = {**source.fingerprint_inputs(), "tokenizer": self.tokenizer_key, **options}
        entry = cache.fetch(
            "rows",
            cache.fingerprint(inputs),
            f"{source.source.path}, {self.what(options)}",
            lambda target: asdict(self.write(source, target)),
            source.estimate_bytes(),
        )
        stats = Statistics.from_dict(entry.value)
        tail = f" (last {source.data.eval_size:.0%})" if source.part == "tail" else ""
        stats.source, stats.weight = f"{source.source.path}{tail}", source.source.weight
        stats.warnings += source.remarks()
        return entry.path, stats


class ConversationEncoder(RowEncoder):
    """Conversations and plain texts, whose labels are their own tokens."""

    def options(self, source: DataSource) -> dict[str, Any]:
        names = ("max_length", "overflow", "train_on", "documents")
        given = {name: getattr(source.data, name) for name in names}
        if source.data.chat_template_kwargs:
            given["chat_template_kwargs"] = source.data.chat_template_kwargs
        return {"template": self.renderer.template, "render_version": RENDER_VERSION, **given}

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write_tokens(*source.read(), source.data, self.renderer, target)

    def with_labels(self, table: Table, key: str) -> Selection:
        if key == "data.train":
            self.renderer.continues_text = table.statistics.format == "text"
        return table.rows


@dataclass
class Parts:
    """The training and the evaluation rows of a recipe, before the weights of the sources apply.

    `evaluated` is the table of the evaluation rows: that of the training rows where they are held out.
    """

    encoder: RowEncoder
    table: Table
    train: Selection
    evaluated: Table
    held: Selection

    def fields(self, data: Data, seed: int, samples: int) -> dict[str, Any]:
        """The fields of `PreparedData`."""
        if not len(self.held):
            raise UserError(
                "data.eval: all evaluation rows were dropped; raise data.max_length, or set data.overflow: truncate"
            )
        train, weights = self.train, [source.weight for source in data.train]
        if any(weight != 1 for weight in weights):
            origin = np.searchsorted(self.table.ends, train.take(np.arange(len(train.row))), "right")
            train = train.select(splits.apply_weights(origin, weights, seed))
        given = {"train": self.table, "eval": self.evaluated} if self.evaluated is not self.table else {"train": self.table}
        found = _fields(self.encoder, train, self.held, {name: table.statistics for name, table in given.items()})
        found["samples"] = samples_of(self.encoder, self.evaluated, self.held, samples)
        return found | {"duplicates": splits.find_duplicates(self.train, self.held, self.encoder.shown)}


def divide(encoder: RowEncoder, data: Data, seed: int, limit: int | None = None, held_out: np.ndarray | None = None) -> Parts:
    """The tokenized training and evaluation rows of a recipe, from its files or from the cache.

    Args:
        limit: evaluation rows at most.
        held_out: hashes of the texts to hold out, if they were chosen before the tokenizer existed.
    """
    holds_out_tails = data.documents == "files" and not (data.eval or data.eval_split)
    table = load_table(encoder, data.train, data, "data.train", "head" if holds_out_tails else "all")
    train = encoder.with_labels(table, "data.train")
    if holds_out_tails:
        evaluated = load_table(encoder, data.train, data, "data.train", "tail")
    elif data.eval or data.eval_split:
        evaluated = load_table(encoder, data.eval or data.train, data, "data.eval")
    else:
        if held_out is None:
            hashes, strata = train.take(train.text_hash), encoder.strata(train)
            held_out = splits.choose_held_out(hashes, data.eval_size, limit, data.drawn_by(seed), strata)
        left, out = splits.divide(train, held_out)
        return Parts(encoder, table, train.select(left), table, train.select(out))
    return Parts(encoder, table, train, evaluated, encoder.some(encoder.with_labels(evaluated, "data.eval"), limit))


def evaluation_fields(encoder: RowEncoder, data: Data, samples: int, limit: int | None) -> dict[str, Any]:
    """The fields of `PreparedData` with all rows of `data.train` as evaluation rows, or the first `limit` of them."""
    table = load_table(encoder, data.train, data, "data.train")
    held = encoder.some(encoder.with_labels(table, "data.train"), limit)
    found = _fields(encoder, held, held, {"eval": table.statistics})
    return found | {"samples": samples_of(encoder, table, held, samples)}


def _fields(encoder: RowEncoder, train: Selection, held: Selection, statistics: dict[str, Statistics]) -> dict[str, Any]:
    by_length = held.select(np.argsort(-held.lengths(), kind="stable"))  # similar lengths share a forward pass
    return {
        "train": train.dataset(),
        "eval": by_length.dataset(),
        "lengths": train.lengths(),
        "eval_lengths": by_length.lengths(),
        "order": train.digest(),
        "renderer": encoder.renderer,
        "statistics": statistics,
    }


def samples_of(encoder: RowEncoder, table: Table, held: Selection, count: int) -> list[dict[str, Any]]:
    """The first evaluation rows as prompt and reference, spread over the classes."""
    if not count:
        return []
    some, seen, ranked = encoder.some(held, 100 * count), Counter[str](), list[tuple[int, int]]()
    labels = encoder.strata(some)
    rows = held.take(held.row) if labels is None else some.take(some.row)
    for place, label in enumerate(labels or ()):
        ranked.append((seen[label], place))
        seen[label] += 1
    numbers = (rows[place] for _, place in sorted(ranked)) if ranked else (row for row, _ in itertools.groupby(rows))
    chosen = [int(row) for row in itertools.islice(numbers, count)]
    pairs = [(example.prompt, encoder.reference(example)) for example in table.examples(chosen)]
    return [{"prompt": prompt, "reference": reference} for prompt, reference in pairs if prompt]


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> PreparedData:
    """The data of a causal language model.

    Args:
        samples: evaluation rows to return as prompt and reference.
        held_out: see `divide`.

    Raises:
        UserError: data that cannot be read, rows that do not fit their format, no token with loss, or more than one percent
            of the supervised tokens lost to `max_length`.
    """
    encoder = ConversationEncoder(Renderer(tokenizer, data.template, data.train_on, data.chat_template_kwargs))
    return PreparedData(**divide(encoder, data, seed, max_eval_rows, held_out).fields(data, seed, samples))


def prepare_eval(data: Data, tokenizer: Any, samples: int = 0, max_rows: int | None = None) -> PreparedData:
    """All rows of `data.train` as evaluation rows, with the masks of training. Raises UserError as `prepare` does."""
    template = data.template if data.template in TEMPLATES else "chat"  # the template of a file is by now the tokenizer's own
    encoder = ConversationEncoder(Renderer(tokenizer, template, data.train_on, data.chat_template_kwargs))
    return PreparedData(**evaluation_fields(encoder, data, samples, max_rows))


def prepare_untruncated(data: Data, tokenizer: Any) -> Selection:
    """All rows of `data.train` in order and not truncated, for another tokenizer with its own template and those of its
    arguments that it reads."""
    options = options_for(tokenizer, data)
    unlimited = data.model_copy(update={"max_length": UNLIMITED, "overflow": "truncate", "chat_template_kwargs": options})
    encoder = ConversationEncoder(Renderer(tokenizer, "auto", data.train_on, options))
    return load_table(encoder, data.train, unlimited, "data.train").rows


def options_for(tokenizer: Any, data: Data) -> dict[str, Any]:
    """The arguments of the chat template that this tokenizer's template reads too."""
    template = getattr(tokenizer, "chat_template", None)
    known = options_of(template) if template and data.chat_template_kwargs else ()
    return {name: value for name, value in data.chat_template_kwargs.items() if name in known}


def load_table(encoder: RowEncoder, given: list[Source], data: Data, key: str, part: str = "all") -> Table:
    """The tokenized rows of several sources.

    Args:
        key: the setting that names them, `data.train` or `data.eval`.
        part: of each document; see `DataSource`.
    """
    from datasets import Dataset, concatenate_datasets

    tables, columns = list[Dataset](), list[dict[str, np.ndarray]]()
    statistics, sources = list[Statistics](), list[DataSource]()
    for one in given:
        source = encoder.open(one, data, key)
        source.part = part
        file, stats = encoder.tokenize(source)
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
