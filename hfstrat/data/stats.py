"""Statistics of the prepared data: what happened to every row and token, and which losses are refused."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from hfstrat.data.columns import unread_lines
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.format import plural

MAX_LOST = 0.01  # share of the supervised tokens that may be lost without the user's consent
MAX_UNSUPERVISED = 0.05  # share of the rows that may have nothing to train on


@dataclass
class Statistics:
    """What happened to the rows and tokens of one source, or of several (then `sources` holds those of each).

    `rows_read = rows_kept + rows_dropped`. Dropped rows are those that are too long (`overflow: drop`), `rows_blank` without
    an answer to train on, `rows_unreached` whose answer lies entirely beyond `max_length`, and those that a stream leaves
    out (`rows_bad`, `rows_evaluated`). `rows_unrolled` are conversations that became `unrolled_into` rows, one per answer,
    because the template renders earlier turns differently; each counts as one row elsewhere, as do split rows. `supervised`
    tokens have loss; the tokens of a row count once, whatever its weight.
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
    unusable: dict[str, int] = field(default_factory=dict)  # rows of preferences that are left out, by the reason
    rows_bad: int = 0  # that cannot be read and are left out (bad_rows: skip)
    bad_row: str = ""  # why the first of them cannot be read
    rows_evaluated: int = 0  # streamed rows that are left out, since their text is held out for evaluation
    rows_with_tools: int = 0
    rows_unrolled: int = 0
    unrolled_into: int = 0
    tokens: int = 0
    supervised: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0
    tools_as_text: bool = False  # the template does not support tools
    turns_blank: int = 0  # answers without text among others, which have no loss
    turns_skipped: int = 0  # answers that the template cannot render without the turns after them
    turns_unopened: int = 0  # answers that do not begin as the generation prompt ends, with `unopened_by`
    unopened_by: str = ""
    template_options: list[str] = field(default_factory=list)  # that could change the generation prompt
    left_out: dict[str, int] = field(default_factory=dict)  # texts that the template does not render, by kind
    left_out_examples: list[str] = field(default_factory=list)  # the beginning of one of each kind, in their order
    rewritten: dict[str, int] = field(default_factory=dict)  # messages in another form than that of the data, by kind
    end_remark: str = ""  # what to know about the end of answers
    misread: str = ""  # where the ids of a row decode to another text
    sha256: str = ""  # of all token ids and labels, in order
    many_labels: bool = False  # rows of a classification have lists of labels
    unread: dict[str, int] = field(default_factory=dict)  # columns that are not read: the rows that have a value
    changes: dict[str, int] = field(default_factory=dict)  # what reading changed, in words: the rows
    warnings: list[str] = field(default_factory=list)  # what may be wrong with the source
    sources: list[Statistics] = field(default_factory=list)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Statistics:
        """The statistics of one source, as `asdict` wrote them."""
        known = {each.name for each in fields(cls)} - {"sources"}
        return cls(**{name: value for name, value in stored.items() if name in known})

    @classmethod
    def merge(cls, parts: list[Statistics]) -> Statistics:
        """The statistics of several sources together; those of a single one as they are."""
        if len(parts) == 1:
            return parts[0]
        total = cls(f"{len(parts)} sources", template=parts[0].template, sources=parts)
        total.tools_as_text = any(part.tools_as_text for part in parts)
        total.bad_row = next((part.bad_row for part in parts if part.bad_row), "")
        total.misread = next((f"{part.source}: {part.misread}" for part in parts if part.misread), "")
        total.template_options = next((part.template_options for part in parts if part.template_options), [])
        total.unopened_by = next((part.unopened_by for part in parts if part.unopened_by), "")
        total.end_remark = next((part.end_remark for part in parts if part.end_remark), "")
        total.left_out = dict(sum((Counter(part.left_out) for part in parts), Counter()))
        pairs = (pair for part in reversed(parts) for pair in zip(part.left_out, part.left_out_examples, strict=True))
        examples = dict(pairs)
        total.left_out_examples = [examples[kind] for kind in total.left_out]
        total.rewritten = dict(sum((Counter(part.rewritten) for part in parts), Counter()))
        total.many_labels = parts[0].many_labels
        total.train_on = " and ".join(dict.fromkeys(part.train_on for part in parts))
        total.format = " and ".join(dict.fromkeys(part.format for part in parts))
        total.sha256 = hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()
        for name in (each.name for each in fields(cls) if each.type == "int"):
            setattr(total, name, sum(getattr(part, name) for part in parts))
        for part in parts:
            total.unread = _added(total.unread, part.unread)
            total.changes = _added(total.changes, part.changes)
            total.unusable = _added(total.unusable, part.unusable)
            total.warnings += [f"{part.source}: {warning}" for warning in part.warnings]
        return total

    def note(self, unread: Iterable[str], changes: Iterable[str]) -> None:
        """Count the columns of a row that are not read, and what reading it has changed."""
        for found, names in ((self.unread, unread), (self.changes, changes)):
            for name in names:
                found[name] = found.get(name, 0) + 1

    def line(self) -> str:
        """The statistics in one line."""
        kept = f"{self.rows_kept:,}" if self.rows_kept == self.rows_read else f"{self.rows_kept:,} of {self.rows_read:,}"
        text = f"{self.source}: {kept} {'row' if kept == '1' else 'rows'}, format {self.format}"
        text += f" ({self.template} template, loss on {self.train_on})" if self.template and self.format != "text" else ""
        if self.rows_with_tools:
            as_text = " as text (the chat template does not support tools)" if self.tools_as_text else ""
            text += f", {self.rows_with_tools:,} with tools{as_text}"
        if self.tokens:  # images have none
            text += f", {plural(self.tokens, 'token')}" + (f", {self.supervised:,} with loss" if self.train_on else "")
        if self.rows_blank and not self.train_on:
            text += f"; {self.rows_blank:,} without text"
        if self.rows_cut or self.rows_split or self.rows_dropped:
            changed = (("truncated", self.rows_cut), ("split", self.rows_split), ("dropped", self.rows_dropped))
            text += "; " + ", ".join(f"{count:,} {word}" for word, count in changed if count)
            text += f" ({', '.join(reasons)})" if (reasons := self._why_dropped()) else ""
        return text + (f"; weight {self.weight:g}: each row {self.weight:g} times per epoch" if self.weight != 1 else "")

    def _why_dropped(self) -> list[str]:
        whys = (("without a text to train on", self.rows_blank), ("with all of it beyond max_length", self.rows_unreached))
        reasons = [f"{count:,} {why}" for why, count in whys if count and self.train_on]
        reasons += self.reasons()
        reasons += [f"{self.rows_evaluated:,} with a text that is held out for evaluation"] if self.rows_evaluated else []
        reasons += [f"{self.rows_bad:,} that cannot be read: data.bad_rows: skip"] if self.rows_bad else []
        return [*reasons, f"{plural(self.tokens_lost, 'token')} lost"] if self.tokens_lost else reasons

    def reasons(self) -> list[str]:
        """Why rows of preferences were left out, with their numbers."""
        return [f"{count:,} with {why}" for why, count in self.unusable.items()]

    def lines(self) -> list[str]:
        """The line of all sources, below it one for each if there are several, then anything unusual."""
        return [self.line(), *(f"  {part.line()}" for part in self.sources), *self.remarks()]

    def _template_settings(self) -> str:
        options = ", ".join(self.template_options)
        return f"data.chat_template_kwargs (the template reads {options}) or data.template" if options else "data.template"

    def remarks(self) -> list[str]:
        remarks = [*self.warnings, *unread_lines(self.unread, self.rows_read)]
        if self.bad_row:
            remarks.append(f"the first row that cannot be read and is left out: {self.bad_row}")
        for what, count in self.changes.items():
            remarks.append(f"{plural(count, 'row')} {what if count > 1 else what.replace('have ', 'has ', 1)}")
        if self.rows_unrolled:
            remarks.append(
                f"the chat template renders earlier turns differently: {self.rows_unrolled:,} conversations became "
                f"{plural(self.unrolled_into, 'row')}, one per answer"
            )
        if self.turns_blank:
            remarks.append(f"{plural(self.turns_blank, 'answer')} without text among others have no loss")
        if self.turns_skipped:
            skipped = plural(self.turns_skipped, "answer")
            remarks.append(f"{skipped} before the first user turn have no loss: the chat template does not render them alone")
        if self.turns_unopened:
            remarks.append(
                f"the generation prompt of the chat template ends with {json.dumps(self.unopened_by)}, with which "
                f"{plural(self.turns_unopened, 'answer')} do not begin: trained without it, they are generated after it; set "
                f"{self._template_settings()} to a generation prompt that fits the answers"
            )
        for kind, count in self.rewritten.items():
            remarks.append(f"{count:,} {kind}, since the chat template does not render them")
        for (kind, count), example in zip(self.left_out.items(), self.left_out_examples, strict=True):
            shown = json.dumps(example, ensure_ascii=False)
            remarks.append(f"the chat template leaves out {count:,} {kind} (the first: {shown}): the model does not see them")
        remarks += [self.end_remark] if self.end_remark else []
        if self.misread:
            remarks.append(f"the tokenizer does not reproduce its input: {self.misread}")
        return remarks


def _added(some: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: some.get(name, 0) + more.get(name, 0) for name in (*some, *more)}


class LongRows:
    """Lengths of the rows beyond `max_length` and the tokens that each lost, to find a sufficient `max_length`."""

    def __init__(self) -> None:
        self.lengths, self.lost = array("q"), array("q")

    def add(self, length: int, lost: int) -> None:
        self.lengths.append(length)
        self.lost.append(lost)

    def sufficient_length(self, allowed: float) -> int:
        """The smallest of these lengths that loses no more than `allowed` supervised tokens."""
        lost = 0.0
        for length, supervised in sorted(zip(self.lengths, self.lost, strict=True), reverse=True):
            lost += supervised
            if lost > allowed:
                return length
        return max(self.lengths)


def check(stats: Statistics, long_rows: LongRows, data: Data, can_split: bool = True) -> None:
    """Refuse data of which too much would be lost without the user's consent.

    Args:
        can_split: whether rows may become several (`overflow: split`).

    Raises:
        UserError: no token with loss, too many rows without any, or too many supervised tokens truncated.
    """
    if not stats.supervised:
        if stats.unusable:
            check_rows(stats, data, can_split)  # names why
        raise UserError(
            f"{stats.source}: no token contributes to the loss: every completion is empty or lies beyond "
            f"data.max_length = {data.max_length}; raise it, or check the columns"
        )
    check_rows(stats, data, can_split)
    total = stats.supervised + stats.supervised_lost
    share = stats.supervised_lost / total
    if data.overflow == "truncate" and share > MAX_LOST:
        needed = long_rows.sufficient_length(MAX_LOST * total)
        raise UserError(
            f"{stats.source}: data.max_length = {data.max_length} truncates {stats.supervised_lost:,} of the tokens with loss "
            f"({share:.1%}); data.max_length: {needed} would keep 99 % of them, or set data.overflow: {_instead(can_split)}"
        )


def _instead(can_split: bool) -> str:
    return "split (or drop)" if can_split else "drop"


def check_rows(stats: Statistics, data: Data, can_split: bool = True) -> None:
    """Raises UserError where too many rows have nothing to train on."""
    without = stats.rows_blank + stats.rows_unreached + sum(stats.unusable.values())
    if without <= MAX_UNSUPERVISED * stats.rows_read:
        return
    worst = max(stats.unusable, key=lambda why: stats.unusable[why], default="")
    if stats.unusable.get(worst, 0) > max(stats.rows_blank, stats.rows_unreached):
        raise UserError(
            f"{stats.source}: {without:,} of {stats.rows_read:,} rows ({without / stats.rows_read:.1%}) cannot be trained on: "
            f"{', '.join(stats.reasons())}; check the columns, or remove these rows"
        )
    if stats.rows_blank >= stats.rows_unreached:
        cause = f"in {stats.rows_blank:,} of them the answer is blank or of weight 0: check the columns, or remove these rows"
    else:
        cause = (
            f"in {stats.rows_unreached:,} of them the prompt alone fills data.max_length = {data.max_length}: raise it, "
            f"or set data.overflow: {_instead(can_split)}"
        )
    raise UserError(
        f"{stats.source}: {without:,} of {stats.rows_read:,} rows ({without / stats.rows_read:.1%}) have no token that "
        f"contributes to the loss; {cause}"
    )
