"""The data of a classification: tokenized once, labels collected from training, evaluation rows in the same proportions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.label_names import same_names
from hfstrat.data.labeled import FORMAT, LABELS, LabelFormat, Texts, write
from hfstrat.data.labels import check_labels, similar_labels, sort_labels
from hfstrat.data.prepare import PreparedData, RowEncoder, Table, divide, evaluation_fields
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import EXAMPLES, Selection, show
from hfstrat.data.stats import Statistics
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    from datasets import Dataset


def encode_labels(rows: Dataset, names: list[str], many: bool, key: str) -> Dataset:
    """The rows with a column `label` (a number, or a list of numbers) instead of `names`.

    Raises:
        UserError: one split has one label per row, the other has lists of labels.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    listed = rows.data.column("names").combine_chunks()
    numbers = pc.index_in(pc.list_flatten(listed), value_set=pa.array(names, pa.string())).to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(listed).to_numpy(zero_copy_only=False)
    if not many and (lengths != 1).any():
        raise UserError(f"{key}: rows have lists of labels, but the first source has one label per row; use the same in all")
    stops = np.cumsum(lengths)
    labels = [numbers[stop - n : stop].tolist() for stop, n in zip(stops, lengths, strict=True)] if many else numbers
    return rows.remove_columns("names").add_column("label", labels)


def check_seen(rows: Dataset, names: list[str], stats: Statistics, whose: str) -> None:
    """Refuse evaluation rows with labels that the model cannot predict.

    Args:
        whose: names they are: those of training rows, or of the model.

    Raises:
        UserError: a label that is not one of them.
    """
    import pyarrow.compute as pc

    counts = pc.value_counts(pc.list_flatten(rows.data.column("names"))).to_pylist()
    if unseen := [entry for entry in counts if entry["values"] not in set(names)]:
        first = unseen[0]
        more = f" (and {len(unseen) - 1} more labels)" if len(unseen) > 1 else ""
        known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        found = f"{stats.source}: {plural(first['counts'], 'row')} have the label '{first['values']}'{more}"
        if whose == "training":
            raise UserError(
                f"data.eval: {found}, which no training row has; training has {known}. Remove these rows, or add training "
                "rows with this label"
            )
        raise UserError(f"{found}; {whose} predicts {known}. Remove these rows, or map the labels to its names")


def find_conflicts(train: Selection, shown: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Count and examples of training texts that occur with more than one label (or set of labels)."""
    hashes = train.take(train.text_hash)
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(np.diff(hashes[order]) == 0)
    places = np.unique(order[np.concatenate([repeats, repeats + 1])]) if len(repeats) else repeats
    labels: dict[int, set[str]] = {}
    for place, label in zip(places, train.select(places).dataset()["label"][:], strict=True):
        labels.setdefault(int(hashes[place]), set()).add(str(label))
    conflicting = {key for key, several in labels.items() if len(several) > 1}
    firsts = {int(hashes[place]): place for place in reversed(places) if int(hashes[place]) in conflicting}
    examples = show(train, list(firsts.values())[:EXAMPLES], shown)
    return {"conflicting_texts": len(conflicting), "conflicting_text_examples": examples}


NAMES_SHOWN = 3


@dataclass
class Classes(PreparedData):
    """Rows with `input_ids`, `token_type_ids` (empty where all zero), `label`, `length`, `row`, memory-mapped.

    `label` is an id, or a list of ids where a row may have several labels (`many`); `label_names` are the names by id.
    `counts` are training rows per label, `[labels]`; `renderer` is the `Texts`.
    """

    many: bool = False
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def report(self) -> dict[str, Any]:
        classes = dict(zip(self.label_names, map(int, self.counts), strict=True))
        kind = "multi_label_classification" if self.many else "single_label_classification"
        return super().report() | {"labels": {"problem_type": kind, "training_rows": classes}}

    def lines(self) -> list[str]:
        """The statistics as text, with the class imbalance."""
        lines = super().lines()
        small, large = int(self.counts.argmin()), int(self.counts.argmax())
        names = ", ".join(self.label_names[:NAMES_SHOWN]) + (", ..." if len(self.label_names) > NAMES_SHOWN else "")
        kind = "any number per row" if self.many else "one per row"
        line = f"{len(self.label_names):,} ({names}), {kind}; training rows: {self.counts[small]:,} of "
        if self.counts[small] == self.counts[large]:
            line += "each label"
        else:
            line += f"{self.label_names[small]} (fewest), {self.counts[large]:,} of {self.label_names[large]} (most)"
        if not self.many:
            line += f" = {self.counts[large] / self.counts.sum():.1%}, the accuracy of always predicting it"
        cut = sum(stats.rows_cut for stats in self.statistics.values())
        if cut and self.renderer.max_length:
            lines.append(
                f"{'cut':<9} {plural(cut, 'text')} truncated to {self.renderer.max_length:,} tokens; special tokens are kept"
            )
        similar = [f"{'labels':<9} {each}" for each in similar_labels(self.label_names)]
        return [*lines, f"{'labels':<9} {line}", *similar]

    def hold_out(self, count: int, seed: int) -> tuple[Classes, Dataset]:
        """The same with about `count` fewer training rows, and these rows; all copies of a row are on the same side.

        With one class per row they are the same share of each class.
        """
        row = np.asarray(self.train["row"][:], dtype=np.int64)
        source, share = np.random.default_rng((seed, 3)), count / len(row)
        if self.many:
            sources = np.unique(row)
            chosen = source.permutation(sources)[: max(1, round(share * len(sources)))]
        else:
            given = np.asarray(self.train["label"][:], dtype=np.int64)
            of_class = [source.permutation(np.unique(row[given == label])) for label in range(len(self.label_names))]
            chosen = np.concatenate([rows[: round(share * len(rows))] for rows in of_class])
        held = np.isin(row, chosen)
        kept = np.flatnonzero(~held)
        train = self.train.select(kept)
        labels = itertools.chain.from_iterable(train["label"][:]) if self.many else train["label"][:]
        counts = np.bincount(np.fromiter(labels, dtype=np.int64), minlength=len(self.label_names))
        order = hashlib.sha256(f"{self.order} {np.sort(chosen).tolist()}".encode()).hexdigest()
        left = replace(self, train=train, lengths=np.asarray(self.lengths)[kept], order=order, counts=counts)
        return left, self.train.select(np.flatnonzero(held))


class TextEncoder(RowEncoder):
    """Texts, or pairs of texts, whose labels are of the complete text.

    Args:
        task: as the recipe names it.
    """

    task: str

    def __init__(self, tokenizer: Any, data: Data) -> None:
        super().__init__(Texts(tokenizer, data.max_length))

    def options(self, source: DataSource) -> dict[str, Any]:
        names, texts = class_names(source), self.renderer
        options = {"max_length": texts.max_length, "overflow": source.data.overflow, "between": texts.between}
        return {"task": self.task, "classes": names, **options}

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write(*source.read(), source.data, self.renderer, target)

    def selection(self, table: Table, labeled: Dataset) -> Selection:
        """All rows of a table, which have a column `label` in `labeled`."""
        return labeled_selection(table, labeled)


def labeled_selection(table: Table, labeled: Dataset) -> Selection:
    return replace(table.rows, table=labeled, row=table.rows.row.astype(np.int64))  # as earlier checkpoints hashed them


class LabelEncoder(RowEncoder):
    """Rows with one label, or any number of them (`many`), in a column `names`.

    The labels are those of the training rows unless given: `names`, and then `of_model`.

    Raises:
        UserError: fewer than two labels, labels that are not classes, or an evaluation label that no training row has.
    """

    names: list[str]
    many: bool
    of_model: bool

    def with_labels(self, table: Table, key: str) -> Selection:
        if self.names:
            spelled = spelling(table, self.names) if self.of_model else self.names
            check_seen(table.rows.table, spelled, table.statistics, "the model" if self.of_model else "training")
            return labeled_selection(table, encode_labels(table.rows.table, spelled, self.many, key))
        self.many, self.names = table.statistics.many_labels, collect_labels(table)
        rows = encode_labels(table.rows.table, self.names, self.many, key)
        check_labels(len(rows), self.names, self.many, f"{key}: {table.statistics.source}")
        return labeled_selection(table, rows)

    def strata(self, rows: Selection) -> list[str]:
        return [str(label) for label in rows.dataset()["label"][:]]

    def count(self, rows: Dataset) -> np.ndarray:
        """Rows per label, `[labels]`."""
        labels = rows["label"][:]
        flat = list(itertools.chain.from_iterable(labels)) if self.many else labels
        return np.bincount(np.asarray(flat, dtype=np.int64), minlength=len(self.names))


class ClassEncoder(LabelEncoder, TextEncoder):
    """Texts with labels."""

    task = FORMAT

    def __init__(self, tokenizer: Any, data: Data, names: list[str] | None = None, many: bool = False) -> None:
        super().__init__(tokenizer, data)
        self.names, self.many, self.of_model = names or [], many, names is not None

    def reader(self, source: DataSource) -> Callable[..., Any]:
        return LabelFormat.detect


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Classes:
    """The data of a classification.

    Raises:
        UserError: data that cannot be read, or labels that `ClassEncoder` refuses.
    """
    encoder = ClassEncoder(tokenizer, data)
    parts = divide(encoder, data, seed, max_eval_rows, held_out)
    fields, counts = parts.fields(data, seed, samples), encoder.count(parts.train.dataset())
    fields["duplicates"] |= find_conflicts(parts.train, encoder.shown)
    return Classes(**fields, label_names=tuple(encoder.names), many=encoder.many, counts=counts)


def prepare_eval(
    data: Data, tokenizer: Any, names: list[str], many: bool, samples: int = 0, max_rows: int | None = None
) -> Classes:
    """All rows of `data.train` as evaluation rows, by the labels that a classifier has.

    Raises:
        UserError: as `prepare`; also a label that the classifier does not have.
    """
    encoder = ClassEncoder(tokenizer, data, names, many)
    fields = evaluation_fields(encoder, data, samples, max_rows)
    return Classes(**fields, label_names=tuple(names), many=many, counts=encoder.count(fields["eval"]))


def collect_labels(table: Table) -> list[str]:
    """The labels of the training rows, in the order that all sources define, else in natural order."""
    import pyarrow.compute as pc

    found = pc.unique(pc.list_flatten(table.rows.table.data.column("names"))).to_pylist()
    orders = [class_names(source) for source in table.sources]
    known = orders[0] if orders[0] is not None and all(order == orders[0] for order in orders) else None
    return sort_labels(found, known)


def spelling(table: Table, names: list[str]) -> list[str]:
    """The labels of a model as the rows of a table spell them: they may differ in case, spaces or the form LABEL_1."""
    import pyarrow.compute as pc

    given = pc.unique(pc.list_flatten(table.rows.table.data.column("names"))).to_pylist()
    found = {known: name for name, known in same_names(given, names).items()}
    return [found.get(name, name) for name in names]


def class_names(source: DataSource) -> list[str] | None:
    """The class names of a source's label column, if the source has some."""
    named = {source.wanted[1].get(column, column): names for column, names in source.class_names.items()}
    return next((named[name] for name in LABELS if name in named), None)
