"""Labels as numbers, a held-out part in the proportions of the whole, and rows that stand somewhere twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.data.account import Account
from hfstrat.data.labels import as_number
from hfstrat.data.parts import EXAMPLES, MAX_HELD_OUT, column
from hfstrat.errors import UserError

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
            "are expected. Scores (regression) are not learnt by this task"
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
