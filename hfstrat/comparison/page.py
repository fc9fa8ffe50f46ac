"""report.html: one file, no script, nothing from elsewhere; light and dark, wide and narrow."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from hfstrat.comparison import charts, sheet
from hfstrat.comparison.charts import Curve, Point

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{title}</title><style>
{style}</style></head><body>
"""
MOST_LABELS = 12  # of a confusion matrix that is shown whole
LEADING = ("loss", "accuracy", "bits")
Table = dict[str, Any]


def render(table: Table) -> str:
    """The whole page."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    title = f"{table['task']}: {sheet.plural(len(table['entries']), 'strategy').replace('strategys', 'strategies')} compared"
    parts = [HEAD.format(title=escape(title), style=style), f"<h1>{escape(title)}</h1>", _summary(table), _sheet(table)]
    parts += [_charts(table), _confusions(table), _samples(table), _runs(table), _environment(table), "</body></html>\n"]
    return "\n".join(part for part in parts if part)


def _summary(table: Table) -> str:
    """What was done, what came out, and what to be careful about."""
    rows, seeds = table["rows"], sheet.plural(len(table["seeds"]), "seed")
    said = [
        f"{escape(table['budget']['text'])} a run, {seeds} each; {rows['train_rows']:,} training rows, the same "
        f"{rows['eval_rows']:,} evaluation rows for all."
    ]
    first, *others = sheet.summary(table) or [""]
    said += [f"<b>{escape(first)}.</b>"] * bool(first) + [f"{escape(line[:1].upper() + line[1:])}." for line in others]
    lines = [f"<p>{line}</p>" for line in said]
    lines += [f'<p class="faint">{escape(line)}</p>' for line in sheet.remarks(table)]
    return "\n".join(lines + [f'<p class="bad">{escape(line)}</p>' for line in sheet.failures(table)])


def _sheet(table: Table) -> str:
    labels = [row["label"] for row in table["entries"]]
    head = "".join(f"<th>{_mark(number)} {escape(label)}</th>" for number, label in enumerate(labels))
    lines, group = [], "measured"
    for line in (line for line in sheet.sheet(table) if not line.is_empty):
        sub, classes = line.name.startswith("  "), []
        if line.name.startswith(LEADING):
            classes.append("lead")
        if line.group == "factors" and group != "factors":
            classes.append("first")
        group = line.group
        cells = "".join(
            f"<td{' class=best' if 'lead' in classes and label == table['best'] else ''}>{_cell(cell, group)}</td>"
            for label, cell in zip(labels, line.cells, strict=True)
        )
        kind = f' class="{" ".join(classes)}"' if classes else ""
        lines.append(f"<tr{kind}><th{' class=sub' if sub else ''}>{escape(line.name.strip())}</th>{cells}</tr>")
    note = (
        "Time is from the start of the process to trained weights: loading, what is computed once, training with its "
        "evaluations. The interval over examples is a paired bootstrap of 2,000 resamples of the evaluation rows. On the "
        "front: no other is as good and cheaper, or better at no higher price."
    )
    return (
        f'<h2>Side by side</h2><div class="wide"><table class="sheet"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="faint">{note}</p>'
    )


def _cell(text: str, group: str) -> str:
    """Sources are long, and few look for them."""
    return escape(text) if group != "sources" else f"<details><summary>sources</summary>{escape(text)}</details>"


def _mark(number: int) -> str:
    shape = charts.marker(number, 7, 7, 4.6)
    return f'<svg class="mark s{number % charts.COLOURS}" viewBox="0 0 14 14" width="12" height="12">{shape}</svg>'


def _charts(table: Table) -> str:
    rows, metric = table["entries"], table["quality"]["metric"]
    loss = sheet.metric_name(metric) if metric in ("loss", "bits_per_byte") else "loss (nats)"
    as_quality: Callable[[float], str] = lambda value: sheet.rounded(value, metric)  # noqa: E731
    made = [
        charts.curves("Evaluation loss against time", (charts.TIME, loss), _curves(rows, "seconds"), (_tick, _plain)),
        charts.curves(
            "Evaluation loss against tokens", ("tokens trained on", loss), _curves(rows, "tokens"), (_tokens, _plain)
        ),
    ]
    for price, key, say in ((charts.TIME, "seconds", _tick), ("peak memory (GiB)", "peak_memory_bytes", _plain)):
        found = _points(rows, key, "seconds" if key == "seconds" else "memory")
        name = f"Quality against {price.removesuffix(' (GiB)')}"
        better = table["quality"]["higher_is_better"]
        made.append(charts.scatter(name, (price, sheet.metric_name(metric)), found, better, (say, as_quality)))
    drawn = "".join(made)
    if not drawn:
        return ""
    legend = "".join(f"<span>{_mark(number)}{escape(row['label'])}</span>" for number, row in enumerate(rows))
    return (
        f'<h2>Curves and prices</h2><div class="legend">{legend}</div><div class="charts">{drawn}</div>'
        '<p class="faint">A line for each seed. Bars are the 95 % interval over seeds (of one seed: over examples); the dashed '
        "line is the front.</p>"
    )


def _curves(rows: list[Table], key: str) -> list[Curve]:
    found = []
    for number, row in enumerate(rows):
        lines = [[(point[key], point["loss"]) for point in run.get("curve", [])] for run in row["runs"]]
        lines = [line for line in lines if len(line) > 1 and line[-1][0] > 0]
        if lines:
            found.append(Curve(row["label"], number, lines))
    return found


def _points(rows: list[Table], key: str, price: str) -> list[Point]:
    found = []
    for number, row in enumerate(rows):
        if row["quality"] is not None and row[key] is not None:
            low, high = row["over_seeds"] or row.get("over_rows") or (None, None)
            cost = row[key] / 2**30 if key == "peak_memory_bytes" else row[key]
            on_front = row.get("front", {}).get(price, False)
            found.append(Point(row["label"], number, cost, row["quality"], low, high, on_front))
    return found


def _tick(value: float) -> str:
    if value < 60:
        return sheet.seconds(value).replace(".0", "") if value else "0"
    return f"{value // 60:.0f}:{value % 60:02.0f}" if value < 3600 else sheet.seconds(value)


def _tokens(value: float) -> str:
    return sheet.count(value).replace(".00", "").replace(".0", "")


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _confusions(table: Table) -> str:
    cards = []
    for label, found in table["confusions"].items():
        names, counts = found["labels"], found["counts"]
        inner = _matrix(names, counts) if len(names) <= MOST_LABELS else _worst(names, counts)
        cards.append(f'<div class="card"><h3>{escape(label)}</h3><div style="overflow-x:auto">{inner}</div></div>')
    if not cards:
        return ""
    note = '<p class="faint">Rows are what is true, columns what was said; summed over seeds.</p>'
    return f'<h2>What is taken for what</h2>{note}<div class="cards">{"".join(cards)}</div>'


def _matrix(names: list[str], counts: list[list[int]]) -> str:
    head = "".join(f"<th>{escape(_cut(name, 10))}</th>" for name in names)
    lines = []
    for name, row in zip(names, counts, strict=True):
        most = max(sum(row), 1)
        cells = "".join(f'<td style="--a:{value / most:.2f}">{value}</td>' for value in row)
        lines.append(f"<tr><th>{escape(_cut(name, 14))}</th>{cells}</tr>")
    return f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _worst(names: list[str], counts: list[list[int]]) -> str:
    """The pairs that are mixed up most, where a matrix would be a carpet."""
    pairs = [(counts[i][j], i, j) for i in range(len(names)) for j in range(len(names)) if i != j and counts[i][j]]
    said = [f"{escape(_cut(names[i]))} as {escape(_cut(names[j]))}: {n}" for n, i, j in sorted(pairs, reverse=True)[:8]]
    return "<br>".join(said) or "nothing was mixed up"


def _cut(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _samples(table: Table) -> str:
    cards = []
    for sample in table["samples"]:
        said = [("prompt", sample["prompt"]), ("reference", sample["reference"]), ("before training", sample["before"])]
        said += list(sample["after"].items())
        blocks = "".join(
            f'<p class="said"><b>{escape(who)}</b>{escape(_cut(text.strip(), 500))}</p>' for who, text in said if text
        )
        cards.append(f'<div class="card">{blocks}</div>')
    return f'<h2>Answers side by side</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def _runs(table: Table) -> str:
    metric, lines = table["quality"]["metric"], []
    for row in table["entries"]:
        for run in row["runs"]:
            cells = [row["label"], str(run["seed"]), sheet.STATUS.get(run["status"], run["status"])]
            cells += [
                sheet.quality(run.get("quality"), metric),
                sheet.count(run.get("steps")),
                sheet.seconds(run.get("seconds")),
            ]
            cells += [sheet.memory(run.get("peak_memory_bytes")), run["folder"]]
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    names = ("recipe", "seed", "ended", sheet.metric_name(metric), "steps", "time", "peak memory", "folder, with its log")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Every run</h2><div class="wide">{body}</div>'


def _environment(table: Table) -> str:
    found, repeat = table["environment"], table["repeat"]
    libraries = ", ".join(f"{name} {version}" for name, version in found.get("libraries", {}).items())
    device = ", ".join(found.get("gpus") or []) or f"{found.get('processor', '')}, {found.get('threads', '?')} threads"
    lines = [f"cd {repeat['folder']}", repeat["command"], ""]
    for row in table["entries"]:
        lines += [f"# {row['label']} alone", " ".join(_quoted(word) for word in row["runs"][0]["command"])]
    about = f"<p>{escape(device)}; Python {escape(str(found.get('python')))}; {escape(libraries)}</p>" if found else ""
    return f"<h2>Where, and how to repeat it</h2>{about}<pre>{escape(chr(10).join(lines))}</pre>"


def _quoted(word: str) -> str:
    return shlex.quote(word)
