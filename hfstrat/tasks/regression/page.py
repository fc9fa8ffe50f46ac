"""What the page of a run shows of a regression: errors by target, targets against predictions, and the largest errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages import charts
from hfstrat.pages.blocks import Block, Cards, Charts, Prose, Row, Section, Table, shorten
from hfstrat.tasks.mistakes import cards

if TYPE_CHECKING:
    from hfstrat.tasks.base import Pictures
    from hfstrat.tasks.report import Result

ABOUT = "The evaluation examples with the largest errors: of the model, or of the number in the data."


def sections(result: Result, pictures: Pictures) -> list[Section]:
    """Errors by target with a chart of each, and the largest errors."""
    found, shown = result.evaluation, list[Section]()
    if found and found.targets:
        rows = [
            Row([row.target, f"{row.mae:.4g}", f"{row.rmse:.4g}", f"{row.pearson:.3f}", f"{row.spearman:.3f}"])
            for row in found.targets
        ]
        if found.baseline:
            rows.append(
                Row(["always the training mean", f"{found.baseline['mae']:.4g}", f"{found.baseline['rmse']:.4g}", "", ""])
            )
        head = ["target", "MAE", "RMSE", "Pearson", "Spearman"]
        blocks: list[Block] = [Table("Errors and correlations on the evaluation examples", head, rows)]
        drawn = [
            charts.agreement(
                f"Predictions of {shorten(row.target, 40)}", ("target", "prediction"), row.points, charts.number_tick
            )
            for row in found.targets
            if row.points
        ]
        if drawn := [chart for chart in drawn if chart]:
            blocks += [Charts(drawn), Prose(["On the dashed line a prediction is right."], "faint")]
        shown.append(Section("Targets", blocks))
    if result.mistakes:
        shown.append(
            Section(
                "Largest errors", [Prose([ABOUT], "faint"), Cards(cards(result.mistakes, pictures, is_number=True), "small")]
            )
        )
    return shown
