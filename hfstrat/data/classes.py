"""The data of a classification: tokenized once, labels collected from training, evaluation rows in the same proportions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data import cache, splits
from hfstrat.data.labeled import LabeledText, LabelFormat, Texts, as_number, sort_labels, write
from hfstrat.data.prepare import PreparedData, Table, load_table
from hfstrat.data.sources import DataSource
from hfstrat.data.splits import EXAMPLES, choose_stratified, column
from hfstrat.data.stats import Statistics
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    from datasets import Dataset


SHOWN_TOKENS = 24


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


def check_seen(rows: Dataset, names: list[str], stats: Statistics) -> None:
    """Refuse evaluation rows with labels that the model cannot predict.

    Raises:
        UserError: a label that no training row has.
    """
    import pyarrow.compute as pc

    counts = pc.value_counts(pc.list_flatten(rows.data.column("names"))).to_pylist()
    if strange := [entry for entry in counts if entry["values"] not in set(names)]:
        first = strange[0]
        more = f" (and {len(strange) - 1} more labels)" if len(strange) > 1 else ""
        known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(
            f"data.eval: {stats.source}: {first['counts']:,} rows have the label '{first['values']}'{more}, which no "
            f"training row has; training has {known}. Remove these rows, or add training rows with this label"
        )


def check_labels(rows: Dataset, names: list[str], many: bool, stats: Statistics) -> None:
    """Refuse labels that no classifier can be trained on.

    Raises:
        UserError: a single label, scores, or a different label for each row.
    """
    if not names or (len(names) == 1 and not many):
        found = f"every row has the label '{names[0]}'" if names else "no row has a label"
        raise UserError(f"data.train: {stats.source}: {found}; a classifier needs at least two labels")
    numbers = [as_number(name) for name in names]
    if all(n is not None for n in numbers) and any(n is not None and not n.is_integer() for n in numbers):
        raise UserError(
            f"data.train: {stats.source}: the labels are numbers with fractions, such as {names[0]} and {names[-1]}; classes "
            "are expected. For numbers set task: regression"
        )
    if not many and len(names) == len(rows) > 2:
        raise UserError(
            f"data.train: {stats.source}: each of {len(rows):,} rows has a different label, such as '{names[0]}'; expected "
            "classes with several rows each. Is this column an id? Map another one by data.columns"
        )


def hold_out(
    rows: Dataset, size: float, limit: int | None, seed: int, held_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the evaluation rows, `[n]` each; see `splits.choose_stratified` for `held_out`."""
    hashes = column(rows, "text_hash")
    if held_out is None:
        held_out = choose_stratified(hashes, [str(label) for label in rows["label"][:]], size, limit, seed)
    held = np.isin(hashes, held_out)
    return np.flatnonzero(~held), np.flatnonzero(held)


def find_duplicates(train: Dataset, held: Dataset, tokenizer: Any) -> dict[str, Any]:
    """As `splits.find_duplicates`: rows are duplicates if their texts are equal, ignoring case, white space and labels."""
    hashes, others = column(train, "text_hash"), column(held, "text_hash")
    found, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    shared = np.flatnonzero(np.isin(others, found))
    return {
        "train_duplicates": int((counts - 1).sum()),
        "train_duplicate_examples": _show(train, first[counts > 1], tokenizer),
        "eval_rows_in_train": len(shared),
        "eval_rows_in_train_examples": _show(held, shared, tokenizer),
    }


def find_conflicts(train: Dataset, tokenizer: Any) -> dict[str, Any]:
    """Count and examples of training texts that occur with more than one label (or set of labels)."""
    hashes = column(train, "text_hash")
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(np.diff(hashes[order]) == 0)
    places = np.unique(order[np.concatenate([repeats, repeats + 1])]) if len(repeats) else repeats
    labels: dict[int, set[str]] = {}
    for place, label in zip(places, train.select(places)["label"][:], strict=True):
        labels.setdefault(int(hashes[place]), set()).add(str(label))
    conflicting = {key for key, several in labels.items() if len(several) > 1}
    chosen = [place for place in places if int(hashes[place]) in conflicting]
    firsts = list({int(hashes[place]): place for place in reversed(chosen)}.values())
    return {
        "conflicting_texts": len(conflicting),
        "conflicting_text_examples": _show(train, np.array(firsts, dtype=int), tokenizer),
    }


def _show(rows: Dataset, places: np.ndarray, tokenizer: Any) -> list[str]:
    ids = [rows[int(place)]["input_ids"][:SHOWN_TOKENS] for place in places[:EXAMPLES]]
    return [" ".join(tokenizer.decode(each, skip_special_tokens=True).split()) for each in ids]


NAMES_SHOWN = 3


@dataclass
class Classes(PreparedData):
    """Rows with `input_ids`, `token_type_ids` (empty where all zero), `label`, `length`, `row`, memory-mapped.

    `label` is an id, or a list of ids where a row may have several labels (`many`); `label_names` are the names by id.
    `counts` are training rows per label, `[labels]`; `renderer` is the `Texts`.
    """

    many: bool = False
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(repr((self.label_names, self.train["label"][:])).encode())
        return digest.hexdigest()

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
        line = f"{len(self.label_names):,} ({names}), {kind}; training rows: smallest {self.label_names[small]} "
        line += f"{self.counts[small]:,}, largest {self.label_names[large]} {self.counts[large]:,}"
        if not self.many:
            line += f" = {self.counts[large] / self.counts.sum():.1%}, the accuracy of always predicting it"
        cut = sum(stats.rows_cut for stats in self.statistics.values())
        if cut and self.renderer.max_length:
            lines.append(f"{'cut':<9} {cut:,} texts truncated to {self.renderer.max_length:,} tokens; special tokens are kept")
        return [*lines, f"{'labels':<9} {line}"]


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Classes:
    """Read, tokenize and label the training and evaluation rows of a recipe, or take them from the cache.

    Args:
        held_out: hashes of the texts to hold out, if they were chosen before.

    Raises:
        UserError: data that cannot be read, rows that do not fit, fewer than two labels, labels that are not classes, or an
            evaluation label that no training row has.
    """
    texts = Texts(tokenizer, data.max_length)
    tokenized = partial(tokenize_texts, texts=texts, key=cache.tokenizer_digest(tokenizer))
    table = load_table(data.train, data, "data.train", tokenized)
    many, names = table.statistics.many_labels, collect_labels(table)
    train = encode_labels(table.rows.table, names, many, "data.train")
    origin = np.searchsorted(table.ends, np.arange(len(train)), "right")
    statistics = {"train": table.statistics}
    check_labels(train, names, many, table.statistics)
    if data.eval or data.eval_split:
        evaluated = load_table(data.eval or data.train, data, "data.eval", tokenized)
        check_seen(evaluated.rows.table, names, evaluated.statistics)
        statistics["eval"], held = evaluated.statistics, encode_labels(evaluated.rows.table, names, many, "data.eval")
        held = held.select(range(min(max_eval_rows or len(held), len(held))))
    else:
        evaluated = table
        left, out = hold_out(train, data.eval_size, max_eval_rows, data.drawn_by(seed), held_out)
        train, held, origin = train.select(left), train.select(out), origin[left]
    found = find_duplicates(train, held, tokenizer) | find_conflicts(train, tokenizer)
    counts = np.bincount(flatten_labels(train), minlength=len(names))
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        train = train.select(splits.apply_weights(origin, weights, seed))
    shown = _samples(evaluated, held, samples)
    train, held = train.remove_columns("text_hash"), longest_first(held)
    lengths = column(train, "length")
    return Classes(
        train=train,
        eval=held,
        lengths=lengths,
        eval_lengths=column(held, "length"),
        order=hashlib.sha256(column(train, "row").tobytes() + lengths.tobytes()).hexdigest(),
        renderer=texts,
        statistics=statistics,
        samples=shown,
        duplicates=found,
        label_names=tuple(names),
        many=many,
        counts=counts,
    )


def prepare_eval(
    data: Data, tokenizer: Any, names: list[str], many: bool, samples: int = 0, max_rows: int | None = None
) -> Classes:
    """All rows of `data.train` as evaluation rows, by the labels that a classifier has.

    Raises:
        UserError: as `prepare`; also a label that the classifier does not have.
    """
    texts = Texts(tokenizer, data.max_length)
    table = load_table(
        data.train, data, "data.train", partial(tokenize_texts, texts=texts, key=cache.tokenizer_digest(tokenizer))
    )
    check_seen(table.rows.table, names, table.statistics)
    held = encode_labels(table.rows.table, names, many, "data.train")
    held = held.select(range(min(max_rows or len(held), len(held))))
    counts, shown = np.bincount(flatten_labels(held), minlength=len(names)), _samples(table, held, samples)
    held = longest_first(held)
    lengths, statistics = column(held, "length"), {"eval": table.statistics}
    return Classes(held, held, lengths, lengths, "", texts, statistics, shown, {}, tuple(names), many, counts)


def longest_first(rows: Dataset) -> Dataset:
    """Evaluation rows by length: rows of similar length share a forward pass, and no sum depends on the order."""
    return rows.select(np.argsort(-column(rows, "length"), kind="stable")).remove_columns("text_hash")


def flatten_labels(rows: Dataset) -> np.ndarray:
    """The label ids of all rows, concatenated."""
    values = rows["label"][:]
    return np.asarray(
        [v for each in values for v in each] if values and isinstance(values[0], list) else values, dtype=np.int64
    )


def collect_labels(table: Table) -> list[str]:
    """The labels of the training rows, in the order that all sources define, else in natural order."""
    import pyarrow.compute as pc

    found = pc.unique(pc.list_flatten(table.rows.table.data.column("names"))).to_pylist()
    orders = [class_names(source) for source in table.sources]
    known = orders[0] if orders[0] is not None and all(order == orders[0] for order in orders) else None
    return sort_labels(found, known)


def class_names(source: DataSource) -> list[str] | None:
    """The class names of a Hub data set's label column, if its features define them."""
    for name, feature in (source.hub.features if source.hub is not None else {}).items():
        feature = getattr(feature, "feature", feature)  # of a list of labels
        if source.wanted[1].get(name, name) in ("label", "labels") and getattr(feature, "names", None):
            return list(feature.names)
    return None


def tokenize_texts(
    source: DataSource, texts: Texts, key: str, task: str = "text-classification", detect: Callable[..., Any] | None = None
) -> tuple[Path, Statistics]:
    """The Arrow file of the prepared rows of one source, new or cached, and their statistics.

    Args:
        key: a hash of the tokenizer.
        detect: how rows are read, from the first of them; by default as texts with labels.
    """
    data, path, names = source.data, source.source.path, class_names(source)
    source.detect = detect or partial(LabelFormat.detect, names=names)
    options = {"max_length": texts.max_length, "overflow": data.overflow, "between": texts.between}
    inputs = {**source.fingerprint_inputs(), "task": task, "tokenizer": key, "classes": names, **options}
    entry = cache.fetch(
        "rows",
        cache.fingerprint(inputs),
        f"{path}, labeled, at most {texts.max_length} tokens per row",
        lambda target: asdict(write(*source.read(), data, texts, target)),
        source.estimate_bytes(),
    )
    stats = Statistics.from_dict(entry.value)
    stats.source, stats.weight = path, source.source.weight
    return entry.path, stats


def prompt_of(example: LabeledText) -> dict[str, str]:
    """The text, or both texts of a pair, under the names that tokenizers of pairs have for them."""
    return {"text": example.text} | ({"text_pair": example.pair} if example.pair is not None else {})


def _samples(table: Table, held: Dataset, count: int) -> list[dict[str, Any]]:
    """The first evaluation rows as prompt and reference, spread over the labels."""
    rows = column(held, "row")
    seen: Counter[str] = Counter()
    ranked = []
    for place, label in enumerate(map(str, held["label"][: 100 * count])):
        ranked.append((seen[label], place))
        seen[label] += 1
    examples = table.examples([int(rows[place]) for _, place in sorted(ranked)[:count]])
    return [
        {
            "prompt": prompt_of(e),
            "reference": ", ".join(e.labels),
        }
        for e in examples
    ]
