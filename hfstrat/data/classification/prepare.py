"""Labels as numbers, a held-out part in the proportions of the whole, and rows that stand somewhere twice.

The data of a classification: tokenised once, labels discovered in training, an evaluation part in like proportions."""

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
from hfstrat.data.classification import tokenize
from hfstrat.data.classification.labels import Labelled, LabelReading, as_number, in_order
from hfstrat.data.classification.tokenize import Texts
from hfstrat.data.prepare import Prepared, Table, table_of
from hfstrat.data.sources import Origin
from hfstrat.data.splits import EXAMPLES, MAX_HELD_OUT, column
from hfstrat.data.stats import Account
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

if TYPE_CHECKING:
    from datasets import Dataset


SHOWN_TOKENS = 24


def encode_labels(rows: Dataset, names: list[str], many: bool, key: str) -> Dataset:
    """The rows with a column `label` (a number, or a list of numbers) instead of `names`.

    Raises:
        UserError: one part has one label a row, the other one lists of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    listed = rows.data.column("names").combine_chunks()
    numbers = pc.index_in(pc.list_flatten(listed), value_set=pa.array(names, pa.string())).to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(listed).to_numpy(zero_copy_only=False)
    if not many and (lengths != 1).any():
        raise UserError(f"{key}: rows have lists of labels, but the first source has one label a row; expected one of both")
    stops = np.cumsum(lengths)
    labels = [numbers[stop - n : stop].tolist() for stop, n in zip(stops, lengths, strict=True)] if many else numbers
    return rows.remove_columns("names").add_column("label", labels)


def unseen(rows: Dataset, names: list[str], account: Account) -> None:
    """Refuse an evaluation that asks for what cannot have been learnt.

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
            f"data.eval: {account.source}: {first['counts']:,} rows have the label '{first['values']}'{more}, which no "
            f"training row has; training has {known}. Remove these rows, or bring training rows of it"
        )


def check_labels(rows: Dataset, names: list[str], many: bool, account: Account) -> None:
    """Refuse labels from which nothing can be learnt.

    Raises:
        UserError: one label only, scores, or a label of its own for each row.
    """
    if not names or (len(names) == 1 and not many):
        said = f"every row has the label '{names[0]}'" if names else "no row has a label"
        raise UserError(f"data.train: {account.source}: {said}; a classifier needs at least two labels")
    numbers = [as_number(name) for name in names]
    if all(n is not None for n in numbers) and any(n is not None and not n.is_integer() for n in numbers):
        raise UserError(
            f"data.train: {account.source}: the labels are numbers with fractions, such as {names[0]} and {names[-1]}; classes "
            "are expected. For numbers set task: regression"
        )
    if not many and len(names) == len(rows) > 2:
        raise UserError(
            f"data.train: {account.source}: each of {len(rows):,} rows has a label of its own, such as '{names[0]}'; expected "
            "classes with several rows each. Is this column an id? Map another one by data.columns"
        )


def hold_out(
    rows: Dataset, size: float, limit: int | None, seed: int, held_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to evaluate on, `[n]` each; see `choose_held_out`, which may have been asked before."""
    hashes = column(rows, "text_hash")
    if held_out is None:
        held_out = choose_held_out(hashes, [str(label) for label in rows["label"][:]], size, limit, seed)
    held = np.isin(hashes, held_out)
    return np.flatnonzero(~held), np.flatnonzero(held)


def choose_held_out(hashes: np.ndarray, labels: list[str], size: float, limit: int | None, seed: int) -> np.ndarray:
    """Hashes of the texts to evaluate on, of rows with these hashes and labels, `[n]` each; each label in like proportions.

    Equal texts stay on one side. A label, or a set of labels, that stands in one text only is trained on.

    Raises:
        UserError: too few different texts.
    """
    wanted = max(1, min(MAX_HELD_OUT, limit or MAX_HELD_OUT, round(size if size >= 1 else size * len(hashes))))
    different, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    sizes = np.bincount(group)
    _, stratum = np.unique([labels[place] for place in first], return_inverse=True)
    order = np.random.default_rng((seed, 0)).permutation(len(first))
    members = _split(order, stratum)
    share = np.array([sizes[each].sum() for each in members]) * wanted / len(hashes)
    quota = np.floor(share).astype(int)
    rest = np.argsort(-(share - quota), kind="stable")
    quota[rest[: wanted - quota.sum()]] += 1
    taken = [_take(each[:-1], sizes, count) for each, count in zip(members, quota, strict=True)]  # one is left to train on
    held = np.concatenate(taken)
    if not len(held):
        raise UserError(
            f"data: {len(hashes)} rows ({len(first)} different texts) are too few to hold out {wanted} for evaluation; "
            "name data.eval, or bring more rows"
        )
    return different[np.sort(held)]


def _split(order: np.ndarray, stratum: np.ndarray) -> list[np.ndarray]:
    """The members of each stratum, in this order."""
    by_stratum = order[np.argsort(stratum[order], kind="stable")]
    return np.split(by_stratum, np.cumsum(np.bincount(stratum))[:-1])


def _take(groups: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """The first groups that together have `count` rows."""
    return groups[: int(np.searchsorted(np.cumsum(sizes[groups]), count)) + 1] if count and len(groups) else groups[:0]


def overlap(train: Dataset, held: Dataset, tokenizer: Any) -> dict[str, Any]:
    """As `parts.overlap`: rows whose texts are the same, without regard to case, white space and label."""
    hashes, others = column(train, "text_hash"), column(held, "text_hash")
    found, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    shared = np.flatnonzero(np.isin(others, found))
    return {
        "train_duplicates": int((counts - 1).sum()),
        "train_duplicate_examples": _shown(train, first[counts > 1], tokenizer),
        "eval_rows_in_train": len(shared),
        "eval_rows_in_train_examples": _shown(held, shared, tokenizer),
    }


def conflicts(train: Dataset, tokenizer: Any) -> dict[str, Any]:
    """Texts that stand in train with more than one label (or set of labels)."""
    hashes = column(train, "text_hash")
    order = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(np.diff(hashes[order]) == 0)
    places = np.unique(order[np.concatenate([twice, twice + 1])]) if len(twice) else twice
    labels: dict[int, set[str]] = {}
    for place, label in zip(places, train.select(places)["label"][:], strict=True):
        labels.setdefault(int(hashes[place]), set()).add(str(label))
    odd = {key for key, several in labels.items() if len(several) > 1}
    chosen = [place for place in places if int(hashes[place]) in odd]
    firsts = list({int(hashes[place]): place for place in reversed(chosen)}.values())
    return {"conflicting_texts": len(odd), "conflicting_text_examples": _shown(train, np.array(firsts, dtype=int), tokenizer)}


def _shown(rows: Dataset, places: np.ndarray, tokenizer: Any) -> list[str]:
    ids = [rows[int(place)]["input_ids"][:SHOWN_TOKENS] for place in places[:EXAMPLES]]
    return [" ".join(tokenizer.decode(each, skip_special_tokens=True).split()) for each in ids]


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


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    samples: int = 0,
    max_eval_rows: int | None = None,
    held_out: np.ndarray | None = None,
) -> Classes:
    """Load, tokenise and label the training and evaluation rows of a recipe, or take them from the cache.

    Args:
        held_out: hashes of the texts to evaluate on, where that was decided before.

    Raises:
        UserError: data that cannot be read, rows that do not fit, fewer than two labels, labels that are no classes, or a
            label in the evaluation that training does not have.
    """
    texts = Texts(tokenizer, data.max_length)
    tokenised = partial(tokenized, texts=texts, key=cache.tokenizer_digest(tokenizer))
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
        left, out = hold_out(train, data.eval_size, max_eval_rows, data.drawn_by(seed), held_out)
        train, held, origin = train.select(left), train.select(out), origin[left]
    found = overlap(train, held, tokenizer) | conflicts(train, tokenizer)
    counts = np.bincount(flat(train), minlength=len(names))
    weights = [source.weight for source in data.train]
    if any(weight != 1 for weight in weights):
        train = train.select(splits.weigh(origin, weights, seed))
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
    table = table_of(data.train, data, "data.train", partial(tokenized, texts=texts, key=cache.tokenizer_digest(tokenizer)))
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


def tokenized(
    origin: Origin, texts: Texts, key: str, task: str = "text-classification", reader: Callable[..., Any] | None = None
) -> tuple[Path, Account]:
    """The Arrow file of one source's prepared rows, new or cached, and what became of its rows.

    Args:
        key: a hash of the tokenizer.
        reader: how rows are read from the first of them; by default as texts with labels.
    """
    source, data = origin.source, origin.data
    origin.told = reader or partial(LabelReading.of, names=class_names(origin))
    options = {"max_length": texts.max_length, "overflow": data.overflow, "between": texts.between}
    inputs = {**origin.inputs(), "task": task, "tokenizer": key, "classes": class_names(origin), **options}
    said = f"{source.path}, labelled, at most {texts.max_length} tokens a row"
    entry = cache.fetch(
        "rows",
        cache.fingerprint(inputs),
        said,
        lambda target: asdict(tokenize.write(*origin.read(), data, texts, target)),
        origin.predicted(),
    )
    account = Account.of(entry.value)
    account.source, account.weight = source.path, source.weight
    return entry.path, account


def prompt_of(example: Labelled) -> dict[str, str]:
    """The text, or both texts of a pair, under the names that tokenizers of pairs have for them."""
    return {"text": example.text} | ({"text_pair": example.pair} if example.pair is not None else {})


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
            "prompt": prompt_of(e),
            "reference": ", ".join(e.labels),
        }
        for e in examples
    ]
