"""Data that are read and tokenized while training (`data.streaming`): memory and disk do not grow with the number of rows.

Before training the first rows are read: those that are held out for evaluation, and a sample, in which the settings are checked
as in data that are read completely. What happens to later rows is counted while training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data import cache
from hfstrat.data.coverage import Notes
from hfstrat.data.formats import Example, RowFormat, check_train_on, hash_text
from hfstrat.data.prepare import ConversationEncoder, PreparedData, few_rows, load_table, samples_of
from hfstrat.data.readers import HEAD_ROWS
from hfstrat.data.render import RENDER_VERSION, Renderer
from hfstrat.data.stats import LongRows, Statistics, check
from hfstrat.data.streams import Item, Mixture, StreamSource, is_local, shares_of
from hfstrat.data.tokenize import Part, RenderedRow, render_row, schema, take_notes, tokenize_rows
from hfstrat.data.values import ROWS_VERSION, BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE_ROWS = 1000  # rows that are looked at before training
CHUNK = 256  # rows tokenized at a time
MAX_UNUSED = 100_000  # rows one after another that may have nothing to train on


class Account:
    """What happened to the rows of one source, also before a position was stored (`before`)."""

    def __init__(self, source: StreamSource, renderer: Renderer) -> None:
        reading = source.reading
        assert reading is not None
        self.stats = Statistics(source.source.path, reading.kind, renderer.template, reading.resolve(source.data.train_on))
        self.stats.warnings = [*reading.remarks, *source.remarks]
        self.stats.tools_as_text = not renderer.supports_tools
        self.notes, self.renderer = Notes(), renderer
        self.before: Statistics | None = None

    def statistics(self) -> Statistics:
        """The statistics so far."""
        found = replace(self.stats, unread=dict(self.stats.unread), changes=dict(self.stats.changes))
        self.renderer.notes = self.notes
        take_notes(found, self.renderer)
        if self.before is None:
            return found
        total = Statistics.merge([self.before, found])
        names = {name: getattr(found, name) for name in ("source", "format", "template", "train_on", "warnings")}
        return replace(total, **names, sha256="", sources=[])


class Encoder:
    """Turns rows of the sources into token ids, and counts what happens to them.

    Args:
        evaluated: hashes of the texts of evaluation rows, which are left out; sorted.
    """

    def __init__(self, sources: list[StreamSource], data: Data, renderer: Renderer) -> None:
        self.sources, self.data, self.renderer = sources, data, renderer
        self.evaluated = frozenset[int]()

    def encode(
        self, items: list[Item], first: int, accounts: list[Account], long_rows: LongRows | None = None
    ) -> list[tuple[RenderedRow | None, list[Part]]]:
        """Each row, if it can be read, with the parts to train on, of which there may be none.

        Args:
            first: the number of the first item, in `Part.row`.

        Raises:
            UserError: a row that cannot be read, unless these are skipped (`data.bad_rows`).
        """
        found: list[tuple[RenderedRow | None, list[Part]]] = [(None, [])] * len(items)
        for index in sorted({item.source for item in items}):
            source, account = self.sources[index], accounts[index]
            assert source.reading is not None
            self.renderer.notes = account.notes
            rows = [
                (place, self._render(source, item, first + place, account))
                for place, item in enumerate(items)
                if item.source == index
            ]
            good = [(place, row) for place, row in rows if row is not None]
            plain = [row for _, row in good]
            parts = tokenize_rows(plain, source.reading, self.data, self.renderer, account.stats, long_rows)
            for (place, row), made in zip(good, parts, strict=True):
                found[place] = row, made
        return found

    def _render(self, source: StreamSource, item: Item, number: int, account: Account) -> RenderedRow | None:
        assert source.reading is not None
        stats = account.stats
        try:
            row = render_row(number, source.row(item), source.reading, self.renderer, source.where(item))
        except (UserError, BadRow) as error:
            message = str(error) if isinstance(error, UserError) else f"{source.where(item)}: {error}"
            if self.data.bad_rows == "error":
                raise _refused(message) from None
            stats.rows_bad += 1
            stats.bad_row = stats.bad_row or message
        else:
            if not self.evaluated or hash_text(row.example.content) not in self.evaluated:
                return row
            stats.rows_evaluated += 1
        stats.rows_read += 1
        stats.rows_dropped += 1
        return None


def _refused(message: str) -> UserError:
    return UserError(f"{message}; data.bad_rows: skip leaves out rows that cannot be read, and counts them")


class Ready(NamedTuple):
    """An example, the position of its row, and which part of the row it is."""

    part: Part
    place: dict[str, Any]
    number: int


class TokenStream:
    """The training examples of all sources, without an end. Each process of a run reads the same ones."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        self.encoder = encoder
        self.mixture = Mixture(encoder.sources, encoder.data.shuffle_buffer, seed)
        self.accounts = self._new_accounts()
        self._ready = deque[Ready]()
        self._counted = 0  # rows in the accounts
        self._skipped = 0  # parts of the first row, which were given out before a position was stored
        self._unused = 0  # rows without a part since the last one that has some

    def _new_accounts(self) -> list[Account]:
        return [Account(source, self.encoder.renderer) for source in self.encoder.sources]

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next examples: `input_ids`, `labels`, `length`, and `row`, which numbers the rows of the stream."""
        found = list[dict[str, Any]]()
        while len(found) < count:
            if not self._ready:
                self._read(min(CHUNK, count - len(found)))
            while self._ready and len(found) < count:
                part = self._ready.popleft().part
                found.append({"input_ids": part.input_ids, "labels": part.labels, "length": part.length, "row": part.row})
        return found

    def _read(self, count: int) -> None:
        """Tokenize the next rows; after a position was restored, first those that had been read and counted beyond it."""
        first, places, items = self.mixture.draws, list[dict[str, Any]](), list[Item]()
        again = self._counted - first
        for _ in range(again or count):
            places.append(self.mixture.position())
            items.append(self.mixture.next())
        made = self.encoder.encode(items, first, self._new_accounts() if again else self.accounts)
        self._counted = self.mixture.draws
        for place, (_, parts) in zip(places, made, strict=True):
            self._ready.extend(Ready(part, place, number) for number, part in enumerate(parts))
            self._unused = 0 if parts else self._unused + 1
        for _ in range(self._skipped):
            self._ready.popleft()
        self._skipped = 0
        if self._unused > MAX_UNUSED:
            raise UserError(
                f"data.train: {self._unused:,} rows one after another have nothing to train on; check them with `hfstrat check`"
            )

    def state(self) -> dict[str, Any]:
        """The position of the next example, and the statistics so far; `restore` takes it, and JSON can hold it."""
        place, part = (self._ready[0].place, self._ready[0].number) if self._ready else (self.mixture.position(), 0)
        statistics = [asdict(account.statistics()) for account in self.accounts]
        return {"place": place, "part": part, "counted": self._counted, "statistics": statistics}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the example at a position."""
        self.mixture.restore(state["place"])
        self._skipped, self._counted = state["part"], state["counted"]
        self._ready.clear()
        self.set_statistics(state["statistics"])

    def set_statistics(self, statistics: list[dict[str, Any]]) -> None:
        """Continue to count from the statistics of a state."""
        self.accounts = self._new_accounts()
        for account, stored in zip(self.accounts, statistics, strict=True):
            account.before = Statistics.from_dict(stored)

    def statistics(self) -> Statistics:
        """What happened to the rows so far."""
        return Statistics.merge([account.statistics() for account in self.accounts])


@dataclass
class StreamedData(PreparedData):
    """Data of which `train` is a sample, the first rows; `stream` has all of them.

    `lengths` are those of the sample and `max_length`, since a later row may be as long.
    """

    identity: str = field(kw_only=True)
    rows_held_out: int = field(kw_only=True)  # 0 where evaluation rows have their own source

    def fingerprint(self) -> str:
        return self.identity

    def report(self) -> dict[str, Any]:
        read = self.stream.statistics()
        return super().report() | ({"train": asdict(read)} if read.rows_read else {})

    def lines(self) -> list[str]:
        lines = [f"{name:<9} {line}" for name, stats in self.statistics.items() for line in stats.lines()]
        data = self.stream.encoder.data
        order = f"shuffled in blocks of {data.shuffle_buffer:,}" if data.shuffle_buffer > 1 else "in order"
        lines.append(f"{'stream':<9} rows are read and tokenized while training, {order}; later rows are not checked yet")
        if len(data.train) > 1:
            shares = ", ".join(f"{share:.1%} {one.path}" for one, share in zip(data.train, shares_of(data.train), strict=True))
            lines.append(f"{'stream':<9} the next row is of a source with a probability of {shares}")
        if self.rows_held_out:
            count = plural(self.rows_held_out, "row")
            lines.append(f"{'eval':<9} the first {count} of the data {'is' if self.rows_held_out == 1 else 'are'} held out")
        return lines + [f"{'eval':<9} {line}" for line in few_rows(len(self.eval))]

    def lines_after(self) -> list[str]:
        return [f"{'read':<9} {line}" for line in self.stream.statistics().lines()]


class FirstRows(NamedTuple):
    """Rows at the beginning of the sources, with all of what they became, and what happened to them."""

    items: list[Item]
    examples: list[Example]
    parts: list[Part]
    statistics: Statistics


class Evaluation(NamedTuple):
    """The evaluation rows, longest first: fields of `PreparedData`, the hashes of their texts, and their statistics.

    `statistics` is None where they are the first rows of the training sources.
    """

    fields: dict[str, Any]
    hashes: Iterable[int]
    statistics: Statistics | None
    rows_held_out: int = 0


def prepare_streamed(data: Data, tokenizer: Any, seed: int, samples: int = 0, max_eval_rows: int | None = None) -> StreamedData:
    """The data of a causal language model, of which the first rows are read.

    Args:
        samples: evaluation rows to return as prompt and reference.
        max_eval_rows: evaluation rows at most.

    Raises:
        UserError: as `prepare.prepare` does, by the sample; and a row of it that cannot be read.
    """
    renderer = Renderer(tokenizer, data.template, data.train_on, data.chat_template_kwargs)
    encoder, rows = begin(data.train, data, renderer, "data.train")
    if data.eval or data.eval_split:
        evaluation = _evaluation(data.eval or data.train, data, renderer, samples, max_eval_rows)
    else:
        evaluation = _hold_out(encoder, rows, samples, max_eval_rows)
    encoder.evaluated = frozenset(map(int, evaluation.hashes))
    if not encoder.evaluated:
        raise UserError("data.eval: all evaluation rows were dropped; raise data.max_length, or set data.overflow: truncate")
    sample = first_rows(encoder, rows, apportion(SAMPLE_ROWS, shares_of(data.train)))
    renderer.continues_text = sample.statistics.format == "text"
    statistics = {"train": sample.statistics} | ({"eval": evaluation.statistics} if evaluation.statistics else {})
    return StreamedData(
        train=dataset_of(sample.parts),
        lengths=np.array([*(part.length for part in sample.parts), data.max_length]),
        order="",
        renderer=renderer,
        statistics=statistics,
        stream=TokenStream(encoder, seed),
        identity=_identity(encoder, seed),
        rows_held_out=evaluation.rows_held_out,
        **evaluation.fields,
    )


def begin(given: list[Source], data: Data, renderer: Renderer, key: str) -> tuple[Encoder, list[Iterator[Item]]]:
    """The opened sources, whose formats are detected, and the rows of each from the beginning."""
    sources = [StreamSource.open(source, data, key) for source in given]
    encoder = Encoder(sources, data, renderer)
    return encoder, [_detect(source, index) for index, source in enumerate(sources)]


def _detect(source: StreamSource, index: int) -> Iterator[Item]:
    """Detect the format of a source by its first rows; returns all of its rows."""
    items = source.in_order(index)
    head, rows = list(itertools.islice(items, HEAD_ROWS)), list[Row]()
    for item in head:
        try:
            rows.append(source.row(item))
        except UserError as error:
            if source.data.bad_rows == "error":
                raise _refused(str(error)) from None
    if not rows:
        raise UserError(f"{source.source.path}: none of its first rows can be read; expected at least one")
    source.reading = RowFormat.detect(rows, source.source.path, *source.wanted, source.class_names)
    check_train_on(source.data, source.reading)
    return itertools.chain(head, items)


def first_rows(encoder: Encoder, rows: list[Iterator[Item]], counts: list[int | None], trained: bool = True) -> FirstRows:
    """The next rows of each source, checked for settings by which too much would be lost.

    Args:
        counts: how many of each source; None for all.
        trained: whether rows without anything to train on count too.

    Raises:
        UserError: a source that has none, one that cannot be read, or data that are refused (`stats.check`).
    """
    found = FirstRows([], [], [], Statistics(""))
    statistics = list[Statistics]()
    for index, (iterator, count) in enumerate(zip(rows, counts, strict=True)):
        source, long_rows = encoder.sources[index], LongRows()
        accounts = [Account(one, encoder.renderer) for one in encoder.sources]
        used = 0
        while used != count and (items := list(itertools.islice(iterator, min(CHUNK, (count or CHUNK + used) - used)))):
            made = encoder.encode(items, len(found.items), accounts, long_rows)
            found.items.extend(items)
            found.parts.extend(part for _, parts in made for part in parts)
            found.examples.extend(row.example for row, parts in made if row and parts)
            used += len(items) if trained else sum(bool(parts) for _, parts in made)
        mine = accounts[index].statistics()
        if not mine.rows_read and count != 0:
            raise UserError(
                f"{source.source.path}: no row is left to train on after those that are held out; lower data.eval_size"
            )
        if count is not None:
            mine.source += f" (the first {plural(mine.rows_read, 'row')})"
        if mine.rows_read:
            check(mine, long_rows, encoder.data)
        statistics.append(mine)
    return found._replace(statistics=Statistics.merge(statistics))


def _hold_out(encoder: Encoder, rows: list[Iterator[Item]], samples: int, limit: int | None) -> Evaluation:
    """The first rows of the training sources, in the proportion of their weights. They are never trained on, also those that
    are not evaluated (beyond `limit`)."""
    data = encoder.data
    found = first_rows(encoder, rows, apportion(int(data.eval_size), shares_of(data.train)), trained=False)
    for item in found.items:
        encoder.sources[item.source].held[item.shard] = item.number + 1
    hashes = [part.text_hash for part in found.parts]
    evaluated = _in_memory(found._replace(parts=found.parts[:limit]), samples)
    return evaluated._replace(hashes=hashes, rows_held_out=len(found.examples), statistics=None)


def _evaluation(given: list[Source], data: Data, renderer: Renderer, samples: int, limit: int | None) -> Evaluation:
    """Evaluation rows of their own sources: those of files from the disk, as without streaming; of the Hub the first ones."""
    if not all(is_local(source, data, "data.eval") for source in given):
        encoder, rows = begin(given, data, renderer, "data.eval")
        counts: list[int | None] = [None] * len(given)
        counts = counts if limit is None else apportion(limit, shares_of(given))
        return _in_memory(first_rows(encoder, rows, counts, trained=False), samples)
    conversations = ConversationEncoder(renderer)
    table = load_table(conversations, given, data, "data.eval")
    held = table.rows.first(limit)
    by_length = held.select(np.argsort(-held.lengths(), kind="stable"))
    fields = {"eval": by_length.dataset(), "eval_lengths": by_length.lengths()}
    fields["samples"] = samples_of(conversations, table, held, samples)
    return Evaluation(fields, table.rows.take(table.rows.text_hash), table.statistics)  # of all: `limit` may change later


def _in_memory(found: FirstRows, samples: int) -> Evaluation:
    by_length = sorted(found.parts, key=lambda part: -part.length)
    pairs = [{"prompt": example.prompt, "reference": str(example.answer)} for example in found.examples[:samples]]
    fields = {"eval": dataset_of(by_length), "eval_lengths": np.array([part.length for part in by_length], dtype=np.int64)}
    fields["samples"] = [pair for pair in pairs if pair["prompt"]]
    return Evaluation(fields, (part.text_hash for part in found.parts), found.statistics)


def apportion(total: int, shares: list[float]) -> list[int | None]:
    """A number of rows divided in the proportion of the shares."""
    ends = [round(end) for end in total * np.cumsum(shares)]
    return [int(end - start) for start, end in itertools.pairwise([0, *ends])]


def dataset_of(parts: list[Part]) -> Dataset:
    """Parts as a data set in memory, without their hashes."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = pa.Table.from_batches([pa.record_batch([list(column) for column in zip(*parts, strict=True)], schema=schema())])
    return Dataset(InMemoryTable(table.drop_columns(["text_hash"])))


def _identity(encoder: Encoder, seed: int) -> str:
    """A hash of which rows these are, and of all that their tokens and their order depend on."""
    data, renderer = encoder.data, encoder.renderer
    options = ("max_length", "overflow", "train_on", "chat_template_kwargs", "shuffle_buffer")
    inputs = {
        "sources": [[one.identity, one.wanted, sorted(one.held.items())] for one in encoder.sources],
        "shares": shares_of(data.train),
        "evaluated": hashlib.sha256(np.sort(np.array([*encoder.evaluated])).tobytes()).hexdigest(),
        "tokenizer": cache.tokenizer_digest(renderer.tokenizer),
        "template": [renderer.template, RENDER_VERSION, ROWS_VERSION],
        "options": {name: getattr(data, name) for name in options},
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
