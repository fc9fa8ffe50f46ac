"""What the page of a run shows of a classifier: labels, confusions, and the examples that it gets most wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages.blocks import Block, Cards, Prose, Row, Section, Table
from hfstrat.pages.matrices import confusion, confusions
from hfstrat.recipe import format
from hfstrat.tasks.mistakes import cards

if TYPE_CHECKING:
    from hfstrat.tasks.base import Pictures
    from hfstrat.tasks.report import Result
    from hfstrat.tasks.report_parts import Details, Label

RANKED = {  # that tasks measure in addition
    "auroc": "AUROC",
    "average_precision": "average precision",
    "recall_at_90_precision": "recall at 90% precision",
}
RARE = 10  # evaluation examples of a label below which its scores are mostly chance
WEAK = 0.5  # F1 of a label, below which it is named
SPARSE = 20  # training examples of a label below which more of them are advised


def sections(result: Result, pictures: Pictures, unit: str) -> list[Section]:
    """Scores by label with the confusions, and mistakes."""
    found = result.evaluation
    shown = []
    if found and found.labels:
        shown.append(Section("Labels", [labels(found.labels), *_confusions(found)]))
    if result.mistakes:
        about = (
            f"The evaluation {unit}s with a wrong prediction and the highest loss. A low probability of the expected label is "
            "a confident mistake: of the model, or of the label in the data."
        )
        blocks = [
            Prose([about], "faint"),
            Cards(cards(result.mistakes, pictures), "small"),
        ]
        shown.append(Section("Largest mistakes", blocks))
    return shown


def labels(rows: list[Label]) -> Table:
    """Precision, recall and F1 of each label, the lowest F1 first."""
    ranked = [key for key in RANKED if any(getattr(row, key, None) is not None for row in rows)]
    has_thresholds = any(row.threshold is not None for row in rows)
    head = ["label", "precision", "recall", "F1", *(RANKED[key] for key in ranked), *["threshold"] * has_thresholds, "examples"]
    lines = []
    for row in sorted(rows, key=lambda row: (row.f1, row.label)):
        cells = [row.label, *(format.percent(value) for value in (row.precision, row.recall, row.f1))]
        cells += [format.percent(getattr(row, key, None)) for key in ranked]
        cells += [format.MISSING if row.threshold is None else f"{row.threshold:.3g}"] * has_thresholds
        lines.append(Row([*cells, f"{row.support:,}"]))
    return Table("Scores of each label on the evaluation examples, the lowest F1 first", head, lines)


def _confusions(found: Details) -> list[Block]:
    names = [row.label for row in found.labels]
    if found.confusion and len(found.confusion.counts) == len(names):
        return [confusion("", names, found.confusion.counts)]
    if found.confusions:
        return [confusions("", [(pair.true, pair.predicted, pair.count) for pair in found.confusions])]
    return []


def advice(result: Result) -> list[tuple[str, str]]:
    """Labels with a low F1, and labels whose scores mean little."""
    rows = result.evaluation.labels if result.evaluation else []
    weak = sorted((row for row in rows if row.f1 < WEAK and row.support >= RARE), key=lambda row: row.f1)
    found = []
    if weak:
        named = ", ".join(f"{row.label} ({format.percent(row.f1)})" for row in weak[:3])
        found.append(
            (f"The labels with the lowest F1 are {named}: look at their mistakes, and add training examples of them.", "")
        )
    if rare := [row for row in rows if 0 < row.support < RARE]:
        words = format.plural(len(rare), "label")
        found.append((f"{words} with fewer than {RARE} evaluation examples: their scores are mostly chance.", "data.eval_size"))
    return found
