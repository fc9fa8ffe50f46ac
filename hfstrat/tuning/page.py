"""report.html of a search: one file without scripts or external resources, in the style of a comparison's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hfstrat.engine import charts
from hfstrat.engine.charts import Curve, Point
from hfstrat.publish.scrub import Scrubber
from hfstrat.recipe import format
from hfstrat.tuning import results
from hfstrat.tuning.results import Table

METRIC = "metric"
COLUMNS = ["", "strategy", "settings", METRIC, "95% CI", "loss", "steps", "time", "peak memory", "artifact", "status"]
CURVES = 8  # trials with a learning curve
SHARE = 10  # trials in the charts of costs


def render(table: Table) -> str:
    """The page of a search."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scrubbed: Table = Scrubber({}).value(table)
    return environment.get_template("report.html.jinja").render(values(scrubbed))


def publish(folder: Path, table: Table) -> None:
    """Write tune.json and report.html, each atomically."""
    results.write(folder / results.DATA, json.dumps(table, indent=1, default=str) + "\n")
    results.write(folder / results.PAGE, render(table))


def values(table: Table) -> dict[str, Any]:
    """The values of the template."""
    metric, rows = table["quality"]["metric"], table["trials"]
    numbers = {label: at for at, label in enumerate(dict.fromkeys(each["label"] for each in rows))}
    return {
        "title": f"{table['task']}: {table['about']} tuned",
        "style": Markup(charts.STYLE.read_text(encoding="utf-8").strip()),
        "colors": charts.COLORS,
        "marker": lambda number: Markup(charts.marker(number, 7, 7, 4.6)),
        "summary": [f"{line[:1].upper()}{line[1:]}." for line in results.sentences(table)],
        "interrupted": table["interrupted"],
        "notes": results.notes(table),
        "labels": numbers,
        "columns": _without_loss(COLUMNS, metric),
        "rows": [(numbers[each["label"]], each["wins"], _without_loss(cells(each, metric), metric)) for each in rows],
        "charts": [Markup(chart) for chart in _charts(table, numbers) if chart],
        "importances": [(name, _bars(shares)) for name, shares in table["importances"].items()],
        "rows_for": f"{table['train_rows']:,} training rows; {table['choosing_rows']:,} held-out rows choose",
    }


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


def _bars(shares: dict[str, float]) -> list[tuple[str, str, str]]:
    return [(name, f"{share:.0%}", f"{100 * share:.1f}") for name, share in sorted(shares.items(), key=lambda each: -each[1])]


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
