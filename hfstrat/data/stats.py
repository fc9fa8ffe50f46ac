"""What became of every row and token, and when that is an error."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field, fields
from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

LOSS_ALLOWED = 0.01  # share of the supervised tokens that may be lost without being asked for
UNSUPERVISED_ALLOWED = 0.05  # share of the rows that may have nothing to train on
COUNTS = (
    "rows_read",
    "rows_kept",
    "rows_cut",
    "rows_split",
    "rows_dropped",
    "rows_blank",
    "rows_unreached",
    "rows_with_tools",
    "rows_unrolled",
    "unrolled_into",
    "tokens",
    "supervised",
    "tokens_lost",
    "supervised_lost",
)


@dataclass
class Account:
    """What became of the rows and tokens of one source, or of several together (then `sources` has one for each).

    `rows_read = rows_kept + rows_dropped`. Dropped are rows that are too long (`overflow: drop`), `rows_blank` without an
    answer to learn, and `rows_unreached` whose answer lies wholly beyond `max_length`. `rows_unrolled` are conversations
    that became `unrolled_into` rows, one for each answer, because the template renders earlier turns otherwise; each counts
    as one row elsewhere, as do those that are split. `supervised` tokens carry loss; the tokens of a row count once,
    whatever its weight.
    """

    source: str
    format: str = ""
    template: str = ""
    train_on: str = ""
    weight: float = 1.0
    rows_read: int = 0
    rows_kept: int = 0
    rows_cut: int = 0
    rows_split: int = 0
    rows_dropped: int = 0
    rows_blank: int = 0
    rows_unreached: int = 0
    rows_with_tools: int = 0
    rows_unrolled: int = 0
    unrolled_into: int = 0
    tokens: int = 0
    supervised: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0
    tools_as_text: bool = False  # the template does not know tools
    misread: str = ""  # where the ids of a row are read as something else than it says
    sha256: str = ""  # of all token ids and labels, in their order
    many_labels: bool = False  # a row of a classification has a list of labels
    sources: list[Account] = field(default_factory=list)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Account:
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known - {"sources"}})

    @classmethod
    def together(cls, accounts: list[Account]) -> Account:
        """One account of several sources; a single one stays as it is."""
        if len(accounts) == 1:
            return accounts[0]
        total = cls(f"{len(accounts)} sources", template=accounts[0].template, sources=accounts)
        total.tools_as_text = any(account.tools_as_text for account in accounts)
        total.misread = next((f"{each.source}: {each.misread}" for each in accounts if each.misread), "")
        total.many_labels = accounts[0].many_labels
        total.train_on = " and ".join(dict.fromkeys(account.train_on for account in accounts))
        total.format = " and ".join(dict.fromkeys(account.format for account in accounts))
        total.sha256 = hashlib.sha256(" ".join(account.sha256 for account in accounts).encode()).hexdigest()
        for name in COUNTS:
            setattr(total, name, sum(getattr(account, name) for account in accounts))
        return total

    def line(self) -> str:
        text = f"{self.source}: {self.rows_kept:,} of {self.rows_read:,} rows as {self.format}"
        text += f" ({self.template} template, loss on {self.train_on})" if self.template and self.format != "text" else ""
        if self.rows_with_tools:
            text += f", {self.rows_with_tools:,} with tools{' as text: the template knows none' if self.tools_as_text else ''}"
        text += f", {self.tokens:,} tokens" + (f", {self.supervised:,} carry loss" if self.train_on else "")
        if self.rows_blank and not self.train_on:
            text += f"; {self.rows_blank:,} without a text"
        if self.rows_cut or self.rows_split or self.rows_dropped:
            text += f"; {self.rows_cut:,} cut, {self.rows_split:,} split, {self.rows_dropped:,} dropped"
            text += f", {self.tokens_lost:,} tokens lost"
        return text + (f"; each row {self.weight:g} times an epoch" if self.weight != 1 else "")

    def lines(self) -> list[str]:
        """The account, and below it one of each source where there are several; then what is out of the ordinary."""
        return [self.line(), *(f"  {account.line()}" for account in self.sources), *self.remarks()]

    def remarks(self) -> list[str]:
        said = []
        if self.rows_unrolled:
            said.append(
                f"the chat template renders earlier turns otherwise: {self.rows_unrolled:,} conversations became "
                f"{self.unrolled_into:,} rows, one per answer"
            )
        if self.misread:
            said.append(f"the tokenizer does not give back what it was given: {self.misread}")
        return said


class Overlong:
    """Lengths of the rows beyond `max_length`, and what each lost: enough to say which `max_length` would do."""

    def __init__(self) -> None:
        self.lengths, self.lost = array("q"), array("q")

    def add(self, length: int, lost: int) -> None:
        self.lengths.append(length)
        self.lost.append(lost)

    def enough(self, allowed: float) -> int:
        """The smallest of these lengths that loses no more than `allowed` supervised tokens."""
        lost = 0.0
        for length, supervised in sorted(zip(self.lengths, self.lost, strict=True), reverse=True):
            lost += supervised
            if lost > allowed:
                return length
        return max(self.lengths)


def check(account: Account, overlong: Overlong, data: Data) -> None:
    """Refuse data of which too much would be lost without anyone having asked for it.

    Raises:
        UserError: no token that carries loss, rows without any in more than a small share, too many tokens cut.
    """
    if not account.supervised:
        raise UserError(
            f"{account.source}: no token would carry loss: every completion is empty or lies beyond "
            f"data.max_length = {data.max_length}; raise it or check the columns"
        )
    _check_rows(account, data)
    every = account.supervised + account.supervised_lost
    share = account.supervised_lost / every
    if data.overflow == "truncate" and share > LOSS_ALLOWED:
        needed = overlong.enough(LOSS_ALLOWED * every)
        raise UserError(
            f"{account.source}: data.max_length = {data.max_length} cuts {account.supervised_lost:,} of the tokens that "
            f"carry loss ({share:.1%}); max_length: {needed} would keep 99 % of them, or say overflow: split or drop"
        )


def _check_rows(account: Account, data: Data) -> None:
    without = account.rows_blank + account.rows_unreached
    if without <= UNSUPERVISED_ALLOWED * account.rows_read:
        return
    if account.rows_blank >= account.rows_unreached:
        cause = (
            f"in {account.rows_blank:,} of them the answer is blank, or of weight 0: check the columns, or remove these rows"
        )
    else:
        cause = (
            f"in {account.rows_unreached:,} of them the prompt alone fills data.max_length = {data.max_length}: raise it, "
            "or say overflow: split or drop"
        )
    raise UserError(
        f"{account.source}: {without:,} of {account.rows_read:,} rows ({without / account.rows_read:.1%}) have no token that "
        f"would carry loss; {cause}"
    )
