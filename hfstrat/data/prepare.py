"""The data of a run: tokenised once, every row accounted for, an evaluation part that shares no row with training."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfstrat.data import cache, splits
from hfstrat.data.render import FORM, NAMES, Renderer, answer_of, prompt_of
from hfstrat.data.sources import Origin
from hfstrat.data.stats import Account
from hfstrat.data.tokenize import Selection, read_numbers, tokenise
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data, Source

if TYPE_CHECKING:
    from datasets import Dataset

UNCUT = 1 << 30  # tokens: more than any row has


@dataclass
class Prepared:
    """Tokenised data, memory-mapped: columns `input_ids`, `labels` (-100 where there is no loss), `length`, `row`.

    `row` numbers the rows of all sources one after another; the pieces of a split row have the same one, and the answers
    of a conversation that became several rows.
    """

    train: Dataset
    eval: Dataset
    lengths: np.ndarray  # tokens of each training row, and of each evaluation row
    eval_lengths: np.ndarray
    order: str  # a hash of which rows train, in which order
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
        """A hash of the training rows' tokens and of their order."""
        return hashlib.sha256(f"{self.accounts['train'].sha256} {self.order}".encode()).hexdigest()

    def account(self) -> dict[str, Any]:
        return {name: asdict(account) for name, account in self.accounts.items()} | {"overlap": self.overlap}

    def lines(self) -> list[str]:
        """The account in words."""
        lines = [f"{name:<9} {line}" for name, account in self.accounts.items() for line in account.lines()]
        if "eval" not in self.accounts:
            lines.append(f"{'eval':<9} {len(self.eval):,} rows held out, {len(self.train):,} left to train on")
        return lines + [f"{'twice':<9} {line}" for line in splits.overlap_lines(self.overlap)]


class Table(NamedTuple):
    """The tokenised rows of all sources of one part, with the account, and how to find a row as it was written."""

    rows: Selection
    account: Account
    origins: list[Origin]
    ends: np.ndarray  # where the rows of each source end, `[sources]`

    def examples(self, wanted: list[int]) -> list[Any]:
        """The examples of rows by their numbers over all sources: each source is read once, up to its last one."""
        found, first = dict[int, Any](), 0
        for origin in self.origins:
            mine = {row - first for row in wanted if first <= row < first + origin.count}
            if mine:
                rows, reading = origin.read()
                some = enumerate(itertools.islice(rows, max(mine) + 1))
                found |= {first + place: reading.example(row) for place, row in some if place in mine}
            first += origin.count
        return [found[row] for row in wanted]


Tokenised = Callable[[Origin], tuple[Path, Account]]


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Prepared:
    """Load, render and tokenise the training and evaluation rows of a recipe, or take them from the cache.

    Args:
        held_out: hashes of the texts to hold out, where that was decided before there was a tokenizer.

    Raises:
        UserError: data that cannot be read, rows that do not fit their format, no token that carries loss, or more
            than one percent of the supervised tokens lost to `max_length`.
    """
    renderer = Renderer(tokenizer, data.template, data.train_on)
    key = cache.tokenizer_digest(tokenizer)
    tokenised: Tokenised = lambda origin: _tokenised(origin, renderer, key)  # noqa: E731
    own_tail = data.documents == "files" and not (data.eval or data.eval_split)
    table = table_of(data.train, data, "data.train", tokenised, "head" if own_tail else "all")
    renderer.continues = table.account.format == "text"
    accounts, train = {"train": table.account}, table.rows
    if data.eval or data.eval_split:
        evaluated = table_of(data.eval or data.train, data, "data.eval", tokenised)
        accounts["eval"], held = evaluated.account, evaluated.rows
        held = held.select(np.arange(min(max_eval_rows or len(held), len(held))))
    elif own_tail:
        evaluated = table_of(data.train, data, "data.train", tokenised, "tail")
        accounts["eval"], held = evaluated.account, evaluated.rows
        held = held.select(np.arange(min(max_eval_rows or len(held), len(held))))
    else:
        evaluated = table
        if held_out is None:
            held_out = splits.choose_held_out(train.of(train.text_hash), data.eval_size, max_eval_rows, data.drawn_by(seed))
        left, out = splits.divide(train, held_out)
        train, held = train.select(left), train.select(out)
    if not len(held):
        raise UserError(
            "data.eval: no row is left to evaluate on, as all were dropped; raise data.max_length, or say overflow: truncate"
        )
    overlap = splits.overlap(train, held, tokenizer)
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        origin = np.searchsorted(table.ends, train.of(np.arange(len(table.rows))), "right")
        train = train.select(splits.weigh(origin, weights, seed))
    shown = _samples(evaluated, held, samples)
    # rows of like length share a forward pass; no sum depends on the order
    held = held.select(np.argsort(-held.of(held.length), kind="stable"))
    return Prepared(
        train=train.dataset(),
        eval=held.dataset(),
        lengths=train.lengths(),
        eval_lengths=held.lengths(),
        order=train.digest(),
        renderer=renderer,
        accounts=accounts,
        samples=shown,
        overlap=overlap,
    )


def prepare_held(data: Data, tokenizer: Any, samples: int = 0, max_rows: int | None = None) -> Prepared:
    """The rows of `data.train` to evaluate on, all of them, with the masks that training has; errors are those of `prepare`."""
    template = data.template if data.template in NAMES else "chat"  # a file's template is the tokenizer's own by now
    renderer = Renderer(tokenizer, template, data.train_on)
    key = cache.tokenizer_digest(tokenizer)
    table = table_of(data.train, data, "data.train", lambda origin: _tokenised(origin, renderer, key))
    renderer.continues = table.account.format == "text"
    held = table.rows.select(np.arange(min(max_rows or len(table.rows), len(table.rows))))
    shown = _samples(table, held, samples)
    held = held.select(np.argsort(-held.of(held.length), kind="stable"))
    rows, lengths = held.dataset(), held.lengths()
    return Prepared(rows, rows, lengths, lengths, held.digest(), renderer, {"eval": table.account}, shown)


def rendered_for(data: Data, tokenizer: Any) -> Selection:
    """All rows of `data.train`, uncut and in their order, as another tokenizer and its own template have them."""
    whole = data.model_copy(update={"max_length": UNCUT, "overflow": "truncate"})
    renderer, key = Renderer(tokenizer, "auto", data.train_on), cache.tokenizer_digest(tokenizer)
    return table_of(data.train, whole, "data.train", lambda origin: _tokenised(origin, renderer, key)).rows


def table_of(given: list[Source], data: Data, name: str, tokenised: Tokenised, part: str = "all") -> Table:
    """All rows of one part: of `data.train`, or of `data.eval`."""
    from datasets import Dataset, concatenate_datasets

    tables, numbers, accounts, origins = list[Dataset](), list[dict[str, np.ndarray]](), list[Account](), list[Origin]()
    for source in given:
        origin = Origin.of(source, data, name)
        origin.part = part
        file, account = tokenised(origin)
        rows = Dataset.from_file(str(file))
        before = sum(each.count for each in origins)
        wide = np.int32 if before + account.rows_read < 2**31 else np.int64
        found = read_numbers(file, {"row": wide, "length": np.int32, "text_hash": np.int64}, len(rows))
        if before:
            found["row"] += before
            rows = rows.remove_columns("row").add_column("row", found["row"].astype(np.int64))
        origin.count = account.rows_read
        tables.append(rows)
        numbers.append(found)
        accounts.append(account)
        origins.append(origin)
    ends = np.cumsum([len(rows) for rows in tables])
    columns = numbers[0] if len(numbers) == 1 else {each: np.concatenate([n[each] for n in numbers]) for each in numbers[0]}
    return Table(Selection(concatenate_datasets(tables), **columns), Account.together(accounts), origins, ends)


def _tokenised(origin: Origin, renderer: Renderer, tokenizer_key: str) -> tuple[Path, Account]:
    source, data = origin.source, origin.data
    options = {name: getattr(data, name) for name in ("max_length", "overflow", "train_on", "documents")}
    inputs = {**origin.inputs(), "tokenizer": tokenizer_key, "template": renderer.template, "form": FORM, **options}
    said = f"{source.path}, at most {data.max_length} tokens a row"

    def build(target: Path) -> dict[str, Any]:
        return asdict(tokenise(*origin.read(), data, renderer, target))

    entry = cache.fetch("rows", cache.fingerprint(inputs), said, build, origin.predicted())
    account = Account.of(entry.value)
    tail = f" (its last {data.eval_size:.0%})" if origin.part == "tail" else ""
    account.source, account.weight = f"{source.path}{tail}", source.weight
    return entry.path, account


def _samples(table: Table, held: Selection, count: int) -> list[dict[str, Any]]:
    """The first evaluation rows as prompt and reference; of plain text its beginning and how it goes on."""
    chosen = itertools.islice((row for row, _ in itertools.groupby(held.of(held.row))), count)
    examples = table.examples([int(row) for row in chosen])
    return [{"prompt": prompt, "reference": answer_of(e)} for e in examples if (prompt := prompt_of(e))]
