"""The data of a run: tokenised once, every row accounted for, an evaluation part that shares no row with training."""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hfstrat.data import formats, sources
from hfstrat.data.formats import BadRow, Example
from hfstrat.data.render import IGNORED, Rendered, Renderer, answer_of, prompt_of
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from hfstrat.config import Data

MAX_HELD_OUT = 1000
LOSS_ALLOWED = 0.01  # share of the supervised tokens that may be lost without being asked for
BATCH = 1000


@dataclass
class Account:
    """What became of the rows and tokens of one source. `supervised` tokens carry loss."""

    source: str
    format: str = ""
    template: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0
    tokens: int = 0
    supervised: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0

    def line(self) -> str:
        text = f"{self.source}: {self.rows_kept:,} of {self.rows_read:,} rows as {self.format}"
        text += f" ({self.template} template)" if self.template and self.format != "text" else ""
        text += f", {self.tokens:,} tokens, {self.supervised:,} carry loss"
        if self.rows_cut or self.rows_dropped:
            text += f"; {self.rows_cut:,} cut, {self.rows_dropped:,} dropped, {self.tokens_lost:,} tokens lost"
        return text


@dataclass
class Prepared:
    """Tokenised data: columns `input_ids`, `labels` (-100 where there is no loss), `length`."""

    train: Dataset
    eval: Dataset
    renderer: Renderer
    accounts: dict[str, Account]
    samples: list[dict[str, Any]] = field(default_factory=list)  # evaluation rows as prompt and reference

    def probe(self, rows: int = 2, tokens: int = 128) -> Any:
        """Token ids `[rows, tokens]` of some evaluation rows, cut to the shortest, for comparing models."""
        import torch

        chosen = self.eval["input_ids"][:rows]
        width = min(tokens, *(len(ids) for ids in chosen)) if len(chosen) > 1 else min(tokens, len(chosen[0]))
        return torch.tensor([ids[:width] for ids in chosen])

    def fingerprint(self) -> str:
        """A hash of the training rows' ids, in order."""
        digest = hashlib.sha256()
        for ids in self.train.with_format("numpy")["input_ids"]:
            digest.update(ids.tobytes() + b"|")
        return digest.hexdigest()

    def account(self) -> dict[str, Any]:
        return {name: asdict(account) for name, account in self.accounts.items()}


def prepare(data: Data, tokenizer: Any, seed: int, samples: int = 0, max_eval_rows: int | None = None) -> Prepared:
    """Load, render and tokenise the training and evaluation rows of a recipe.

    Raises:
        UserError: data that cannot be read, rows that do not fit their format, no token that carries loss, or more
            than one percent of the supervised tokens lost to `max_length`.
    """
    renderer = Renderer(tokenizer, data.template, data.train_on)
    rows = sources.load(data.train, "data.train", data.config, data.split)
    train, account = _tokenise(rows, data.train, data, renderer)
    accounts = {"train": account}
    if data.eval or data.eval_split:
        source = data.eval or data.train
        rows = sources.load(source, "data.eval", data.config, data.eval_split or data.split)
        held, accounts["eval"] = _tokenise(rows, source, data, renderer)
        if max_eval_rows:
            held = held.select(range(min(max_eval_rows, len(held))))
    else:
        train, held = _hold_out(train, data.eval_size, max_eval_rows, seed)
    chosen = held["row"][:samples] if samples else []
    examples = [_example(rows[index], _map(rows, data, ""), accounts.get("eval", account).format) for index in chosen]
    shown = [{"prompt": prompt, "reference": answer_of(e)} for e in examples if (prompt := prompt_of(e))]
    held = held.sort("length", reverse=True)  # rows of like length share a forward pass; no sum depends on the order
    return Prepared(train, held, renderer, accounts, shown)


def _map(rows: Dataset, data: Data, source: str) -> dict[str, str]:
    return formats.rename(rows.column_names, data.columns, source)


def _example(row: dict[str, Any], names: dict[str, str], kind: str) -> Example:
    return formats.FORMATS[kind][1]({names[column]: value for column, value in row.items()})


def _tokenise(rows: Dataset, source: str, data: Data, renderer: Renderer) -> tuple[Dataset, Account]:
    names = _map(rows, data, source)
    kind = formats.choose(data.format, names.values(), source)
    account = Account(source, kind, renderer.template, rows_read=len(rows))
    lengths: list[tuple[int, int]] = []  # of over-long rows: all tokens, supervised tokens beyond max_length

    def batch(columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rendered = [
            _render({column: columns[column][i] for column in columns}, names, kind, renderer, f"{source}: row {index + 1}")
            for i, index in enumerate(indices)
        ]
        kept: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": [], "row": []}
        for index, (ids, labels) in zip(indices, renderer.encode(rendered), strict=True):
            ids, labels = _fit(ids, labels, data, account, lengths, f"{source}: row {index + 1}")
            if any(label != IGNORED for label in labels):
                for name, value in (("input_ids", ids), ("labels", labels), ("length", len(ids)), ("row", index)):
                    kept[name].append(value)
            else:
                account.rows_dropped += 1
        account.rows_kept += len(kept["row"])
        account.tokens += sum(kept["length"])
        account.supervised += sum(label != IGNORED for labels in kept["labels"] for label in labels)
        return kept

    # in memory: `datasets` would cache by the code's hash, which knows nothing of the tokenizer's files
    out = rows.map(
        batch, batched=True, batch_size=BATCH, with_indices=True, remove_columns=rows.column_names, keep_in_memory=True
    )
    _check(account, lengths, data)
    return out, account


def _render(row: dict[str, Any], names: dict[str, str], kind: str, renderer: Renderer, where: str) -> Rendered:
    try:
        return renderer.render(_example(row, names, kind))
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None


def _fit(
    ids: list[int], labels: list[int], data: Data, account: Account, lengths: list[tuple[int, int]], where: str
) -> tuple[list[int], list[int]]:
    """The row within `max_length`, with what it loses written into the account."""
    excess = len(ids) - data.max_length
    if excess <= 0:
        return ids, labels
    if data.overflow == "error":
        raise UserError(f"{where}: {len(ids)} tokens, more than data.max_length = {data.max_length} (overflow: error)")
    keep = data.max_length if data.overflow == "truncate" else 0
    lost = sum(label != IGNORED for label in labels[keep:])
    account.rows_cut += keep > 0
    account.tokens_lost += len(ids) - keep
    account.supervised_lost += lost
    lengths.append((len(ids), lost))
    return ids[:keep], labels[:keep]


def _check(account: Account, lengths: list[tuple[int, int]], data: Data) -> None:
    if not account.supervised:
        raise UserError(
            f"{account.source}: no token would carry loss: every completion is empty or lies beyond "
            f"data.max_length = {data.max_length}; raise it or check the columns"
        )
    share = account.supervised_lost / (account.supervised + account.supervised_lost)
    if data.overflow == "truncate" and share > LOSS_ALLOWED:
        needed = _enough(lengths, LOSS_ALLOWED * (account.supervised + account.supervised_lost))
        raise UserError(
            f"{account.source}: data.max_length = {data.max_length} cuts {account.supervised_lost:,} of the tokens that "
            f"carry loss ({share:.1%}); max_length: {needed} would keep 99 % of them, or say overflow: drop"
        )


def _enough(lengths: list[tuple[int, int]], allowed: float) -> int:
    """The smallest of the over-long rows' lengths that loses no more than `allowed` supervised tokens."""
    lost = 0.0
    for length, supervised in sorted(lengths, reverse=True):
        lost += supervised
        if lost > allowed:
            return length
    return max(length for length, _ in lengths)


def _hold_out(rows: Dataset, size: float, limit: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """Split off evaluation rows; equal rows (by their ids) stay on one side."""
    wanted = max(1, min(MAX_HELD_OUT, limit or MAX_HELD_OUT, round(size if size >= 1 else size * len(rows))))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(rows["input_ids"]):
        groups.setdefault(tuple(ids), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held: list[int] = []
    while order and len(held) < wanted:
        held += order.pop()
    if not order:
        raise UserError(
            f"data: {len(rows)} rows ({len(groups)} different) are too few to hold out {wanted} for evaluation; "
            "name data.eval, lower data.eval_size or bring more rows"
        )
    held.sort()
    return rows.select(sorted(index for group in order for index in group)), rows.select(held)
