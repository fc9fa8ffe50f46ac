"""The card's tables of what was measured beside the loss, with intervals."""

from __future__ import annotations

from typing import Any

from hfstrat.markdown import table

SHARES = ("acc", "f1", "match", "share", "rouge", "chrf", "json", "regex")  # in the names of metrics that are shares


def measured(sets: dict[str, Any]) -> list[str]:
    """A table for each set of rows: value with half its 95 % interval, before, after and the difference."""
    blocks: list[str] = []
    for name, one in sets.items():
        before, change = one.get("before") or {}, one.get("difference") or {}
        rows = [
            [metric, _said(metric, before.get(metric)), f"**{_said(metric, entry)}**", _said(metric, change.get(metric), "+")]
            for metric, entry in one["after"].items()
        ]
        blocks.append(f"**{name[:1].upper()}{name[1:]}** ({one['rows']:,} rows)")
        blocks.append(table(["", "before", "after", "difference"], rows, range(1, 4)))
    return [*blocks, "± is half of a 95 % interval over rows."] if blocks else []


def _said(metric: str, entry: dict[str, float | None] | None, sign: str = "") -> str:
    if entry is None or entry["value"] is None:
        return "-"
    value, low, high = entry["value"], entry.get("low"), entry.get("high")
    style = ".1%" if any(word in metric for word in SHARES) else ".4f"
    text = f"{value:{sign}{style}}"
    return text if low is None or high is None else f"{text} ± {(high - low) / 2:{style}}"
