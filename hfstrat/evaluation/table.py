"""What was measured, in lines that fit 80 columns: value, interval, difference."""

from __future__ import annotations

from typing import Any

WIDTH = 80
PERCENT = ("accuracy", "f1", "exact_match", "acc", "regex", "json", "rouge", "chrf", "share")
FIRST, COLUMN = 17, 18


def lines(measured: dict[str, Any], first: str = "before", second: str = "after") -> list[str]:
    """One block for each set of rows; `first` and `second` are the names of the two models."""
    found: list[str] = []
    for name, one in measured.items():
        found += block(name, one, first, second)
    return found


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
    return f"  {metric:<{FIRST - 2}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)


def with_interval(metric: str, entry: dict[str, Any], signed: bool = False) -> str:
    """Value and half the width of its interval; of a difference a mark where the interval holds zero."""
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
