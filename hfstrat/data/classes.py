"""The data of a classification: tokenised once, labels discovered in training, an evaluation part in like proportions."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data import cache, class_rows, parts
from hfstrat.data.account import Account
from hfstrat.data.class_parts import check_labels, conflicts, encode_labels, hold_out, overlap, unseen
from hfstrat.data.labels import LabelReading, in_order
from hfstrat.data.parts import column
from hfstrat.data.preparation import Origin, Prepared, Table, table_of
from hfstrat.data.texts import Texts
from hfstrat.data_section import Data

if TYPE_CHECKING:
    from datasets import Dataset

NAMES_SHOWN = 3


@dataclass
class Classes(Prepared):
    """Rows with `input_ids`, `token_type_ids` (empty where all zero), `label`, `length`, `row`, memory-mapped.

    `label` is a number, or a list of numbers where a row may have several labels (`many`); `label_names` is what they stand
    for. `counts` are training rows by label, `[labels]`; `renderer` are the `Texts`.
    """

    many: bool = False
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(repr((self.label_names, self.train["label"][:])).encode())
        return digest.hexdigest()

    def account(self) -> dict[str, Any]:
        classes = dict(zip(self.label_names, map(int, self.counts), strict=True))
        kind = "multi_label_classification" if self.many else "single_label_classification"
        return super().account() | {"labels": {"problem_type": kind, "training_rows": classes}}

    def lines(self) -> list[str]:
        """The account in words, with how unlike the classes are in size."""
        lines = super().lines()
        small, large = int(self.counts.argmin()), int(self.counts.argmax())
        names = ", ".join(self.label_names[:NAMES_SHOWN]) + (", ..." if len(self.label_names) > NAMES_SHOWN else "")
        kind = "any number of them a row" if self.many else "one a row"
        line = f"{len(self.label_names):,} ({names}), {kind}; training rows: smallest {self.label_names[small]} "
        line += f"{self.counts[small]:,}, largest {self.label_names[large]} {self.counts[large]:,}"
        if not self.many:
            line += f" = {self.counts[large] / self.counts.sum():.1%}, the accuracy of always saying it"
        cut = sum(account.rows_cut for account in self.accounts.values())
        if cut and self.renderer.max_length:
            lines.append(f"{'cut':<9} {cut:,} texts to {self.renderer.max_length:,} tokens, special tokens kept")
        return [*lines, f"{'labels':<9} {line}"]


def prepare(data: Data, tokenizer: Any, seed: int, samples: int = 0, max_eval_rows: int | None = None) -> Classes:
    """Load, tokenise and label the training and evaluation rows of a recipe, or take them from the cache.

    Raises:
        UserError: data that cannot be read, rows that do not fit, fewer than two labels, labels that are no classes, or a
            label in the evaluation that training does not have.
    """
    texts = Texts(tokenizer, data.max_length)
    tokenised = partial(_tokenised, texts=texts, key=cache.tokenizer_digest(tokenizer))
    table = table_of(data.train, data, "data.train", tokenised)
    many, names = table.account.many_labels, discovered(table)
    train = encode_labels(table.rows.table, names, many, "data.train")
    origin = np.searchsorted(table.ends, np.arange(len(train)), "right")
    accounts = {"train": table.account}
    check_labels(train, names, many, table.account)
    if data.eval or data.eval_split:
        evaluated = table_of(data.eval or data.train, data, "data.eval", tokenised)
        unseen(evaluated.rows.table, names, evaluated.account)
        accounts["eval"], held = evaluated.account, encode_labels(evaluated.rows.table, names, many, "data.eval")
        held = held.select(range(min(max_eval_rows or len(held), len(held))))
    else:
        evaluated = table
        left, out = hold_out(train, data.eval_size, max_eval_rows, seed)
        train, held, origin = train.select(left), train.select(out), origin[left]
    found = overlap(train, held, tokenizer) | conflicts(train, tokenizer)
    counts = np.bincount(flat(train), minlength=len(names))
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        train = train.select(parts.weigh(origin, weights, seed))
    shown = _samples(evaluated, held, samples)
    # rows of like length share a forward pass; no sum depends on the order
    held = held.select(np.argsort(-column(held, "length"), kind="stable"))
    train, held = train.remove_columns("text_hash"), held.remove_columns("text_hash")
    lengths = column(train, "length")
    return Classes(
        train=train,
        eval=held,
        lengths=lengths,
        eval_lengths=column(held, "length"),
        order=hashlib.sha256(column(train, "row").tobytes() + lengths.tobytes()).hexdigest(),
        renderer=texts,
        accounts=accounts,
        samples=shown,
        overlap=found,
        label_names=tuple(names),
        many=many,
        counts=counts,
    )


def prepare_held(
    data: Data, tokenizer: Any, names: list[str], many: bool, samples: int = 0, max_rows: int | None = None
) -> Classes:
    """The rows of `data.train` to evaluate on, all of them, by the labels that a classifier knows.

    Raises:
        UserError: as `prepare`; also a label that the classifier does not know.
    """
    texts = Texts(tokenizer, data.max_length)
    table = table_of(data.train, data, "data.train", partial(_tokenised, texts=texts, key=cache.tokenizer_digest(tokenizer)))
    unseen(table.rows.table, names, table.account)
    held = encode_labels(table.rows.table, names, many, "data.train")
    held = held.select(range(min(max_rows or len(held), len(held))))
    counts, shown = np.bincount(flat(held), minlength=len(names)), _samples(table, held, samples)
    held = held.select(np.argsort(-column(held, "length"), kind="stable")).remove_columns("text_hash")
    lengths, accounts = column(held, "length"), {"eval": table.account}
    return Classes(held, held, lengths, lengths, "", texts, accounts, shown, {}, tuple(names), many, counts)


def flat(rows: Dataset) -> np.ndarray:
    """The numbers of all labels of all rows, one after another."""
    values = rows["label"][:]
    return np.asarray(
        [v for each in values for v in each] if values and isinstance(values[0], list) else values, dtype=np.int64
    )


def discovered(table: Table) -> list[str]:
    """The labels of the training rows, in the data set's own order if all sources say the same one, else sorted naturally."""
    import pyarrow.compute as pc

    found = pc.unique(pc.list_flatten(table.rows.table.data.column("names"))).to_pylist()
    orders = [class_names(origin) for origin in table.origins]
    known = orders[0] if orders[0] is not None and all(order == orders[0] for order in orders) else None
    return in_order(found, known)


def class_names(origin: Origin) -> list[str] | None:
    """What the numbers of a Hub data set's label column mean, where it says so."""
    for name, feature in (origin.hub.features if origin.hub is not None else {}).items():
        feature = getattr(feature, "feature", feature)  # of a list of labels
        if origin.wanted[1].get(name, name) in ("label", "labels") and getattr(feature, "names", None):
            return list(feature.names)
    return None


def _tokenised(origin: Origin, texts: Texts, key: str) -> tuple[Path, Account]:
    source, data = origin.source, origin.data
    origin.told = partial(LabelReading.of, names=class_names(origin))
    options = {"max_length": texts.max_length, "overflow": data.overflow, "between": texts.between}
    inputs = {**origin.inputs(), "task": "text-classification", "tokenizer": key, "classes": class_names(origin), **options}
    said = f"{source.path}, labelled, at most {texts.max_length} tokens a row"
    entry = cache.fetch(
        "rows",
        cache.fingerprint(inputs),
        said,
        lambda target: asdict(class_rows.write(*origin.read(), data, texts, target)),
        origin.predicted(),
    )
    account = Account.of(entry.value)
    account.source, account.weight = source.path, source.weight
    return entry.path, account


def _samples(table: Table, held: Dataset, count: int) -> list[dict[str, Any]]:
    """The first evaluation rows as prompt and reference, of as many labels as there are."""
    rows = column(held, "row")
    seen: Counter[str] = Counter()
    ranked = []
    for place, label in enumerate(map(str, held["label"][: 100 * count])):
        ranked.append((seen[label], place))
        seen[label] += 1
    examples = table.examples([int(rows[place]) for _, place in sorted(ranked)[:count]])
    return [
        {
            "prompt": {"text": e.text} | ({"text_pair": e.pair} if e.pair is not None else {}),
            "reference": ", ".join(e.labels),
        }
        for e in examples
    ]
