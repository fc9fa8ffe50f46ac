"""report.html of a comparison: recipes side by side, curves and costs, confusions, answers, all runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from hfstrat import __version__
from hfstrat.comparison import text
from hfstrat.pages import charts
from hfstrat.pages.blocks import PLAIN, Block, Card, Cards, Cell, Charts, Code, Line, Page, Part, Prose, Row, Section, Verdict
from hfstrat.pages.blocks import Table as Cells
from hfstrat.pages.charts import Curve, Point
from hfstrat.pages.matrices import confusion
from hfstrat.pages.render import render as render_page
from hfstrat.publish.scrub import Scrubber
from hfstrat.recipe import format

LEADING = ("loss", "accuracy", "bits")  # lines of the table that are emphasized
Table = dict[str, Any]

ABOUT_TIMES = (
    "Time is from the start of the process to trained weights: loading, cached computations, training and its evaluations. The "
    "interval over examples is a paired bootstrap of 2,000 resamples of the evaluation examples. Pareto-optimal: no other "
    "recipe is at least as good and cheaper, or better at no higher cost."
)
ABOUT_CURVES = (
    "One line per seed. Bars are 95% confidence intervals over seeds (with one seed: over examples). The dashed line is the "
    "Pareto front."
)


def render(table: Table) -> str:
    """The page of a comparison."""
    return render_page(page_of(without_paths(table)))


def without_paths(table: Table) -> Table:
    """The table without what is local to this machine, since a page is shared; comparison.json keeps it."""
    scrubber, kept = Scrubber({}), {"samples": table["samples"]}
    scrubbed: Table = scrubber.value({name: value for name, value in table.items() if name not in kept})
    return scrubbed | kept


def page_of(table: Table) -> Page:
    """The page of a table without paths."""
    data, rows = table["rows"], table["entries"]
    setting = (
        f"Budget per run: {table['budget']['text']}; {format.plural(len(table['seeds']), 'seed')} each; "
        f"{data['train_rows']:,} training examples, the same {data['eval_rows']:,} evaluation examples for all."
    )
    drawn = [chart for chart in _charts(table) if chart]
    legend = [(number, row["label"]) for number, row in enumerate(rows)]
    sections = [
        Section("Result", _result(table)),
        Section("Side by side", [_sheet(table), Prose([ABOUT_TIMES], "faint")]),
        Section("Curves and costs", [Charts(drawn, legend), Prose([ABOUT_CURVES], "faint")]) if drawn else None,
        _confusions(table),
        Section("Answers side by side", [Cards([_sample(*each) for each in enumerate(table["samples"], 1)])])
        if table["samples"]
        else None,
        Section("All runs", [_runs(table)]),
        Section("Environment and commands", _environment(table)),
    ]
    title = f"{table['task']}: {table.get('about') or format.plural(len(rows), 'recipe')} compared"
    return Page(title, [each for each in sections if each], setting, f"Written by hfstrat {__version__} compare.")


def _result(table: Table) -> list[Block]:
    first, *more = [_sentence(line) for line in text.summary(table)] or ["Nothing has been measured yet."]
    return [
        Verdict(Line(first, PLAIN)),
        Prose(more),
        Prose([_sentence(line) for line in text.remarks(table)], "faint"),
        Prose(text.failures(table), "bad"),
    ]


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}."


def _sheet(table: Table) -> Cells:
    """The lines of the table; those that lead are emphasized, and their best cell is marked."""
    labels, lines, group = [row["label"] for row in table["entries"]], [], "measured"
    for line in text.sheet(table):
        if line.is_empty:
            continue
        leads, starts_factors = line.name.startswith(LEADING), line.group == "factors" != group
        group = line.group
        best = labels.index(table["best"]) if leads and table["best"] else None
        cells: list[Cell | str] = [
            Cell(cell, best=place == best, folded="sources" if line.group == "sources" else "")
            for place, cell in enumerate(line.cells)
        ]
        classes = " ".join(["lead"] * leads + ["first"] * starts_factors)
        lines.append(Row([line.name.strip(), *cells], classes, indented=line.name.startswith("  ")))
    head: list[Cell | str] = ["", *(Cell(label, mark=number) for number, label in enumerate(labels))]
    return Cells("Recipes side by side", head, lines, "sheet")


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


def _confusions(table: Table) -> Section | None:
    """The matrix of each recipe, or its most frequent confusions if there are many labels."""
    if not table["confusions"]:
        return None
    about = "Rows are true labels, columns are predictions, summed over seeds."
    blocks = [confusion(label, found["labels"], found["counts"]) for label, found in table["confusions"].items()]
    return Section("Confusion matrices", [Prose([about], "faint"), *blocks])


def _sample(number: int, sample: Table) -> Card:
    """The prompt, the reference and the answers, each with its heading."""
    after = [("before training", sample["before"]), ("reference", sample["reference"]), *sample["after"].items()]
    beside = [Part(heading, each.strip()) for heading, each in after if each]
    return Card(f"Example {number}", [Part("prompt", sample["prompt"].strip())], beside)


def _runs(table: Table) -> Cells:
    metric = table["quality"]["metric"]
    head = ["recipe", "seed", "status", text.metric_name(metric, table["task"]), "steps", "time", "peak memory"]
    return Cells(
        "All runs, with the folder of each, which has log.txt",
        [*head, "folder"],
        [
            Row(
                [row["label"], str(run["seed"]), text.status_name(run["status"]), format.metric(metric, run.get("quality"))]
                + [format.count(run.get("steps")), format.duration(run.get("seconds"))]
                + [format.memory(run.get("peak_memory_bytes")), run["folder"]]
            )
            for row in table["entries"]
            for run in row["runs"]
        ],
    )


def _environment(table: Table) -> list[Block]:
    found, commands = table["environment"], Code(_commands(table), "Commands")
    if not found:
        return [commands]
    libraries = ", ".join(f"{name} {version}" for name, version in found.get("libraries", {}).items())
    device = (
        ", ".join(found.get("gpus") or [])
        or f"{found.get('processor') or 'CPU'}, {format.plural(found.get('threads') or 1, 'thread')}"
    )
    return [Prose([f"{device}; Python {found.get('python')}; {libraries}"]), commands]


def _commands(table: Table) -> str:
    """The command that repeats the comparison, and those of single recipes."""
    lines = ["# in the folder where the comparison was started", table["repeat"]["command"], ""]
    for row in table["entries"]:
        lines += [f"# only {row['label']}", shlex.join(row["runs"][0]["command"])]
    return "\n".join(lines)
