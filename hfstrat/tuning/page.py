"""report.html of a search: what won, the leaderboard, curves and costs, importances; then the report of the winner's run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hfstrat import __version__
from hfstrat.pages import charts
from hfstrat.pages.blocks import PLAIN, Bar, Bars, Cell, Charts, Line, Page, Prose, Row, Section, Verdict
from hfstrat.pages.blocks import Table as Cells
from hfstrat.pages.charts import Curve, Point
from hfstrat.pages.render import render as render_page
from hfstrat.publish.scrub import Scrubber
from hfstrat.recipe import format
from hfstrat.run import page as run_page
from hfstrat.tuning import results
from hfstrat.tuning.results import Table

METRIC = "metric"
COLUMNS = ["", "strategy", "settings", METRIC, "95% CI", "loss", "steps", "time", "peak memory", "artifact", "status"]
CURVES = 8  # trials with a learning curve
SHARE = 10  # trials in the charts of costs

ABOUT_SCORES = (
    "The score of a candidate is that of its best rung, on the rows that choose. Time is that of all its rungs up to there: "
    "loading, training, evaluation. The artifact size is an estimate. The winner is measured again on other rows, because the "
    "best of many scores is partly luck."
)
ABOUT_CURVES = (
    "A point of a curve is a rung: training at a constant rate, then a short cooldown. Bars are 95% confidence intervals over "
    "the rows that choose. The dashed line is the Pareto front."
)
ABOUT_IMPORTANCE = "The share of the variance of first rungs that a setting explains (fANOVA); with few candidates it is rough."
INTERRUPTED = "The search was interrupted; the same command continues it."


def render(table: Table, folder: Path | None = None) -> str:
    """The page of a search; `folder` has the winner's run."""
    scrubbed: Table = Scrubber({}).value(table)
    found = run_page.sections_of(folder) if folder else []
    of_winner = [*(replace(first, title="The winner's run") for first in found[:1]), *found[1:]]
    return render_page(page_of(scrubbed, of_winner))


def publish(folder: Path, table: Table) -> None:
    """Write tune.json and report.html, each atomically."""
    results.write(folder / results.DATA, json.dumps(table, indent=1, default=str) + "\n")
    results.write(folder / results.PAGE, render(table, folder))


def page_of(table: Table, of_winner: list[Section]) -> Page:
    """The page of a table without paths."""
    numbers = {label: at for at, label in enumerate(dict.fromkeys(each["label"] for each in table["trials"]))}
    first, *more = [f"{line[:1].upper()}{line[1:]}." for line in results.sentences(table)]
    about = f"{table['train_rows']:,} training rows; {table['choosing_rows']:,} held-out rows choose."
    blocks = [Verdict(Line(first, PLAIN)), Prose(more), Prose([INTERRUPTED] if table["interrupted"] else [], "bad")]
    drawn = [chart for chart in _charts(table, numbers) if chart]
    legend = [(number, label) for label, number in numbers.items()]
    shares = [(name, _bars(found)) for name, found in table["importances"].items()]
    sections = [
        Section("Result", [*blocks, Prose(results.notes(table), "faint")]),
        Section("Leaderboard", [_leaderboard(table, numbers), Prose([ABOUT_SCORES], "faint")]),
        Section("Curves and costs", [Charts(drawn, legend), Prose([ABOUT_CURVES], "faint")]) if drawn else None,
        Section("Hyperparameter importance", [Bars(shares), Prose([ABOUT_IMPORTANCE], "faint")]) if shares else None,
        *of_winner,
    ]
    title = f"{table['task']}: {table['about']} tuned"
    return Page(title, [each for each in sections if each], about, f"Written by hfstrat {__version__} tune.")


def _leaderboard(table: Table, numbers: dict[str, int]) -> Cells:
    metric, rows = table["quality"]["metric"], []
    for each in table["trials"]:
        shown = _without_loss(cells(each, metric), metric)
        wins = each["wins"]
        named = [Cell(text, best=wins, mark=numbers[each["label"]] if at == 1 else None) for at, text in enumerate(shown)]
        rows.append(Row(named, "lead" if wins else ""))
    return Cells("Candidates, the best first", _without_loss(COLUMNS, metric), rows)


def _without_loss(cells: list[str], metric: str) -> list[str]:
    """The cells of a row without the loss, where that is the metric; the columns with the metric's name."""
    named = [metric.replace("_", " ") if cell == METRIC else cell for cell in cells]
    return [cell for at, cell in enumerate(named) if at != COLUMNS.index("loss") or metric != "loss"]


def cells(each: Table, metric: str) -> list[str]:
    if "quality" not in each:
        return [f"#{each['number']}", each["label"], each["settings"], *[format.MISSING] * 7, each["status"]]
    return [
        f"#{each['number']}",
        each["label"],
        each["settings"],
        *results.figures(each, metric),
        format.file_size(each["bytes"]),
        each["status"],
    ]


def _bars(shares: dict[str, float]) -> list[Bar]:
    return [Bar(name, f"{share:.0%}", share) for name, share in sorted(shares.items(), key=lambda each: -each[1])]


def _charts(table: Table, numbers: dict[str, int]) -> list[str]:
    """Learning curves, and quality over time, memory and size."""
    metric, better = table["quality"]["metric"], table["quality"]["higher_is_better"]
    measured = [each for each in table["trials"] if "quality" in each]
    show = (charts.time_tick, lambda value: charts.quality_tick(value, metric))
    lines = [
        Curve(
            f"#{each['number']} {each['label']}",
            numbers[each["label"]],
            [[(at["seconds"], at["quality"]) for at in each["curve"]]],
        )
        for each in measured[:CURVES]
    ]
    name = metric.replace("_", " ")
    found = [charts.curves("Quality over time, for each candidate", (charts.TIME, name), lines, show)]
    for axis, key, scale, tick in (
        (charts.TIME, "seconds", 1.0, charts.time_tick),
        ("memory (GiB)", "memory", 2.0**30, charts.plain_tick),
        ("artifact (MB)", "bytes", 1e6, charts.plain_tick),
    ):
        costly = {each["number"]: each for each in measured if each.get(key)}
        on = results.front({number: (each["quality"], each[key]) for number, each in costly.items()}, better)
        shown = [each for number, each in costly.items() if number in on or each in measured[:SHARE]]
        points = [
            Point(
                f"#{each['number']}",
                numbers[each["label"]],
                each[key] / scale,
                each["quality"],
                each["low"],
                each["high"],
                each["number"] in on,
            )
            for each in shown
        ]
        title = f"Quality over {axis.split(' (')[0]}"
        found.append(charts.scatter(title, (axis, name), points, better, (tick, show[1])))
    return found
