"""What was measured, in lines that fit 80 columns: value, interval, difference."""

from __future__ import annotations

from typing import Any

WIDTH = 80
PERCENT = ("accuracy", "f1", "exact_match", "acc", "regex", "json", "rouge", "chrf", "share")
FIRST, COLUMN = 17, 18
LABELS, MATRIX = 40, 9  # that are shown one by one, and against each other
LEGEND = "± half of a 95 % interval over rows; ~ a difference that may be chance"


def lines(measured: dict[str, Any], first: str = "before", second: str = "after") -> list[str]:
    """One block for each set of rows; `first` and `second` are the names of the two models."""
    found: list[str] = []
    for name, one in measured.items():
        found += block(name, one, first, second)
    return [*found, *gain(measured), LEGEND] if found else []


def gain(measured: dict[str, Any]) -> list[str]:
    """What was won on the evaluation rows, beside what was lost elsewhere."""
    blocks = [measured.get(name, {}).get("difference", {}).get("loss") for name in ("evaluation rows", "control text")]
    if None in blocks:
        return []
    won, lost = blocks
    verdict = "nothing was forgotten" if (lost["high"] or 0) < 0 else "no sign of forgetting"
    if (lost["low"] or 0) > 0:
        verdict = "something was forgotten"
    own, other = (with_interval("loss", entry, signed=True) for entry in (won, lost))
    return [f"gain and cost: loss {own}; on the control text {other}:", f"{'':<15}{verdict}"]


def by_label(details: dict[str, Any]) -> list[str]:
    """Precision, recall and F1 of each label, and what is taken for what, where there are few."""
    rows = details.get("labels", [])
    if not rows or len(rows) > LABELS:
        return []
    found = [f"  {'label':<24}{'precision':>11}{'recall':>11}{'F1':>11}{'rows':>9}"]
    for row in rows:
        cells = "".join(f"{row[name]:>11.1%}" for name in ("precision", "recall", "f1"))
        found.append(f"  {shortened(row['label'], 23):<24}{cells}{row['support']:>9,}")
    counts = details.get("confusion", {}).get("counts", [])
    if 0 < len(counts) <= MATRIX:
        found.append(f"  {'true, and as what':<18}" + "".join(f"{shortened(row['label'], 6):>7}" for row in rows))
        for row, line in zip(rows, counts, strict=True):
            found.append(f"  {shortened(row['label'], 17):<18}" + "".join(f"{count:>7,}" for count in line))
    return found


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def block(name: str, one: dict[str, Any], first: str = "before", second: str = "after") -> list[str]:
    """The metrics of one set of rows."""
    unit = f"{one['rows']:,} rows" + (f", {one['tokens']:,.0f} tokens" if "tokens" in one else "")
    two = "before" in one
    head = f"{'':<{FIRST}}" + (f"{cut(first):>{COLUMN}}{cut(second):>{COLUMN}}{'difference':>{COLUMN}}" if two else "")
    title = f"{name} ({unit})"
    return [title, *([head.rstrip()] if two else []), *(_line(metric, one) for metric in one["after"])]


def _line(metric: str, one: dict[str, Any]) -> str:
    after = one["after"][metric]
    if "before" not in one or metric not in one["before"]:
        return f"  {metric:<{FIRST - 2}}{with_interval(metric, after):>{COLUMN}}".rstrip()
    before, difference = one["before"][metric], one["difference"][metric]
    cells = [number(metric, before["value"]), with_interval(metric, after), with_interval(metric, difference, signed=True)]
    low, high = difference["low"], difference["high"]
    chance = " ~" if low is not None and high is not None and low <= 0 <= high else ""
    return f"  {metric:<{FIRST - 2}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells) + chance


def with_interval(metric: str, entry: dict[str, Any], signed: bool = False) -> str:
    """Value and half the width of its interval."""
    value, low, high = entry["value"], entry["low"], entry["high"]
    text = number(metric, value, signed)
    if low is None or high is None:
        return text
    return f"{text} ±{number(metric, (high - low) / 2)}"


def number(metric: str, value: float, signed: bool = False) -> str:
    """As people read it: shares in percent, losses with four digits."""
    sign = "+" if signed else ""
    if metric.startswith(PERCENT) or metric.endswith(("accuracy", "_f1")):
        return f"{value:{sign}.1%}"
    if abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.2f}" if abs(value) >= 100 or metric == "perplexity" else f"{value:{sign}.4f}"


def cut(name: str) -> str:
    """A model's name as it fits a column: its end says most."""
    return name if len(name) < COLUMN else "…" + name[-(COLUMN - 2) :]
