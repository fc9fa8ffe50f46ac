"""report.html: one file without scripts or external resources; for light and dark mode, wide and narrow windows.

The layout is the template report.html.jinja with style.css; this module provides its values.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hfstrat.comparison import text
from hfstrat.engine import charts
from hfstrat.engine.charts import Curve, Point
from hfstrat.publish.scrub import Scrubber
from hfstrat.recipe import format

HERE = Path(__file__).parent
MOST_LABELS = 12  # of a confusion matrix that is shown in full
CONFUSED = 8  # pairs of labels that are listed instead
LEADING = ("loss", "accuracy", "bits")  # lines of the table that are emphasized
Table = dict[str, Any]


def render(table: Table) -> str:
    """The page of a comparison."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(values(without_paths(table)))


def without_paths(table: Table) -> Table:
    """The table without what is local to this machine, since a page is shared; comparison.json keeps it."""
    scrubber, kept = Scrubber({}), {"samples": table["samples"]}
    scrubbed: Table = scrubber.value({name: value for name, value in table.items() if name not in kept})
    return scrubbed | kept


def values(table: Table) -> dict[str, Any]:
    """The values of the template."""
    data, seeds, rows = table["rows"], format.plural(len(table["seeds"]), "seed"), table["entries"]
    return {
        "title": f"{table['task']}: {table.get('about') or format.plural(len(rows), 'recipe')} compared",
        "style": Markup(charts.STYLE.read_text(encoding="utf-8").strip()),
        "colors": charts.COLORS,
        "marker": lambda number: Markup(charts.marker(number, 7, 7, 4.6)),
        "labels": [row["label"] for row in rows],
        "setting": f"Budget per run: {table['budget']['text']}; {seeds} each; {data['train_rows']:,} training examples, the "
        f"same {data['eval_rows']:,} evaluation examples for all.",
        "summary": [_sentence(line) for line in text.summary(table)],
        "remarks": [_sentence(line) for line in text.remarks(table)],
        "failures": text.failures(table),
        "sheet": _sheet(table),
        "charts": [Markup(chart) for chart in _charts(table) if chart],
        "confusions": [_confusion(label, found) for label, found in table["confusions"].items()],
        "samples": [_sample(sample) for sample in table["samples"]],
        "run_columns": ["recipe", "seed", "status", text.metric_name(table["quality"]["metric"], table["task"])]
        + ["steps", "time", "peak memory", "folder (with log.txt)"],
        "runs": _runs(table),
        "environment": _environment(table["environment"]),
        "commands": _commands(table),
    }


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}."


def _sheet(table: Table) -> list[dict[str, Any]]:
    """The lines of the table with their classes in the style."""
    labels, lines, group = [row["label"] for row in table["entries"]], [], "measured"
    for line in text.sheet(table):
        if line.is_empty:
            continue
        leads, starts_factors = line.name.startswith(LEADING), line.group == "factors" != group
        group = line.group
        lines.append(
            {
                "name": line.name.strip(),
                "indented": line.name.startswith("  "),
                "classes": " ".join(["lead"] * leads + ["first"] * starts_factors),
                "best": labels.index(table["best"]) if leads and table["best"] else None,
                "folded": line.group == "sources",
                "cells": line.cells,
            }
        )
    return lines


def _charts(table: Table) -> list[str]:
    """The charts as SVG; empty texts where nothing was measured."""
    rows, metric = table["entries"], table["quality"]["metric"]
    task = table["task"]
    loss = text.metric_name(metric if metric == "bits_per_byte" else "loss", task)
    axes = (("time", charts.TIME, "seconds", charts.time_tick), ("tokens", "training tokens", "tokens", format.count))
    found = [
        charts.curves(f"Evaluation loss over {name}", (axis, loss), _curves(rows, key), (show, charts.plain_tick))
        for name, axis, key, show in axes
    ]
    as_quality: Callable[[float], str] = lambda value: charts.quality_tick(value, metric)  # noqa: E731
    costs = (
        (charts.TIME, "seconds", "seconds", charts.time_tick),
        ("memory (GiB)", "memory", "peak_memory_bytes", charts.plain_tick),
    )
    for axis, cost, key, show in costs:
        points, better = _points(rows, key, cost), table["quality"]["higher_is_better"]
        title = f"Quality over {axis.removesuffix(' (GiB)')}"
        found.append(charts.scatter(title, (axis, text.metric_name(metric, task)), points, better, (show, as_quality)))
    return found


def _curves(rows: list[Table], key: str) -> list[Curve]:
    found = []
    for number, row in enumerate(rows):
        lines = [[(point[key], point["loss"]) for point in run.get("curve", [])] for run in row["runs"]]
        lines = [line for line in lines if len(line) > 1 and line[-1][0] > 0]
        if lines:
            found.append(Curve(row["label"], number, lines))
    return found


def _points(rows: list[Table], key: str, cost: str) -> list[Point]:
    found = []
    for number, row in enumerate(rows):
        if row["quality"] is not None and row[key] is not None:
            low, high = row["over_seeds"] or row.get("over_rows") or (None, None)
            amount = row[key] / 2**30 if cost == "memory" else row[key]
            found.append(Point(row["label"], number, amount, row["quality"], low, high, row.get("front", {}).get(cost, False)))
    return found


def _confusion(label: str, found: Table) -> dict[str, Any]:
    """The matrix of one recipe, or its most frequent confusions if there are many labels."""
    names, counts = found["labels"], found["counts"]
    card: dict[str, Any] = {"label": label, "matrix": [], "columns": [], "confused": []}
    if len(names) <= MOST_LABELS:
        cells = [[(count, f"{count / max(sum(row), 1):.2f}") for count in row] for row in counts]
        return card | {
            "columns": [_shorten(name, 10) for name in names],
            "matrix": [(_shorten(name, 14), row) for name, row in zip(names, cells, strict=True)],
        }
    pairs = [(counts[i][j], i, j) for i in range(len(names)) for j in range(len(names)) if i != j and counts[i][j]]
    worst = sorted(pairs, reverse=True)[:CONFUSED]
    return card | {"confused": [(_shorten(names[i], 40), _shorten(names[j], 40), count) for count, i, j in worst]}


def _shorten(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _sample(sample: Table) -> list[tuple[str, str]]:
    """The prompt, the reference and the answers, each with its heading."""
    texts = [("prompt", sample["prompt"]), ("reference", sample["reference"]), ("before training", sample["before"])]
    return [(heading, _shorten(each.strip(), 500)) for heading, each in [*texts, *sample["after"].items()] if each]


def _runs(table: Table) -> list[list[str]]:
    metric = table["quality"]["metric"]
    return [
        [row["label"], str(run["seed"]), text.status_name(run["status"]), format.metric(metric, run.get("quality"))]
        + [format.count(run.get("steps")), format.duration(run.get("seconds")), format.memory(run.get("peak_memory_bytes"))]
        + [run["folder"]]
        for row in table["entries"]
        for run in row["runs"]
    ]


def _environment(found: Table) -> str:
    if not found:
        return ""
    libraries = ", ".join(f"{name} {version}" for name, version in found.get("libraries", {}).items())
    device = (
        ", ".join(found.get("gpus") or [])
        or f"{found.get('processor') or 'CPU'}, {format.plural(found.get('threads') or 1, 'thread')}"
    )
    return f"{device}; Python {found.get('python')}; {libraries}"


def _commands(table: Table) -> str:
    """The command that repeats the comparison, and those of single recipes."""
    lines = ["# in the folder where the comparison was started", table["repeat"]["command"], ""]
    for row in table["entries"]:
        lines += [f"# only {row['label']}", shlex.join(row["runs"][0]["command"])]
    return "\n".join(lines)
