"""A confusion matrix as a table; of many labels the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence

from hfstrat.pages.blocks import Cell, Row, Table, shorten

MOST_LABELS = 12  # of a confusion matrix that is shown in full
CONFUSED = 12  # pairs of labels that are listed instead
COLUMN, LINE, LISTED = 10, 18, 40  # characters of a label


def confusion(title: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    """The matrix, or its most frequent confusions.

    Args:
        title: whose it is; "" where there is only one.
        names: of the labels.
        counts: examples, a row for each true label, a column for each predicted one.
    """
    of = f" of {title}" if title else ""
    if len(names) <= MOST_LABELS:
        head = ["true \\ predicted", *(shorten(name, COLUMN) for name in names)]
        rows = [
            Row([shorten(name, LINE), *(Cell(f"{count:,}", shade=f"{count / max(sum(line), 1):.2f}") for count in line)])
            for name, line in zip(names, counts, strict=True)
        ]
        return Table(f"Confusion matrix{of}", head, rows, "heat")
    places = range(len(names))
    pairs = [(counts[i][j], i, j) for i in places for j in places if i != j and counts[i][j]]
    named = [
        (shorten(names[i], LISTED), shorten(names[j], LISTED), count) for count, i, j in sorted(pairs, reverse=True)[:CONFUSED]
    ]
    return confusions(title, named)


def confusions(title: str, pairs: Sequence[tuple[str, str, int]]) -> Table:
    """Pairs of labels that are confused, and how often: true, predicted, examples."""
    rows = [Row([true, predicted, f"{count:,}"]) for true, predicted, count in pairs] or [Row(["none", "", "0"])]
    return Table(f"Most frequent confusions{f' of {title}' if title else ''}", ["true label", "predicted as", "examples"], rows)
