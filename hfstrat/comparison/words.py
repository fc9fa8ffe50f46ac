"""Numbers as people read them: three digits that matter, and a unit."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "–"
PERCENT = ("accuracy", "macro_f1", "micro_f1", "token_accuracy")
NAMES = {"loss": "loss (nats/token)", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}


def seconds(value: float | None) -> str:
    """'0.4 s', '34 s', '12:05 min' or '3:20 h'."""
    if value is None:
        return NOTHING
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 99.5:
        return f"{value:.0f} s"
    whole = round(value)
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


def memory(value: float | None) -> str:
    """'412 MiB' or '3.02 GiB'."""
    if value is None:
        return NOTHING
    return f"{value / 2**20:.0f} MiB" if value < 1000 * 2**20 else f"{value / 2**30:.2f} GiB"


def size(value: float | None) -> str:
    """On the disk: '3.4 kB', '1.2 MB' or '538 MB'."""
    return NOTHING if value is None else _short(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: float | None) -> str:
    """'8,204', '260 k', '1.38 M' or '7.2 G'."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value < 9999.5 else _short(value, ("", "k", "M", "G", "T"))


def _short(value: float, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, max(0, int(math.log10(max(value, 1)) / 3)))
    scaled = value / 1000**power
    if scaled >= 999.5 and power + 1 < len(units):
        scaled, power = scaled / 1000, power + 1
    digits = 0 if power == 0 or scaled >= 99.5 else 1 if scaled >= 9.95 else 2
    return f"{scaled:.{digits}f} {units[power]}".strip()


def quality(value: float | None, metric: str, sign: str = "") -> str:
    """'81.2 %', or a loss with as many digits as tell."""
    if value is None:
        return NOTHING
    if metric in PERCENT:
        return f"{100 * value:{sign}.1f} %"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:{sign}.{digits}f}"


def rounded(value: float, metric: str) -> str:
    """The same at a tick of a chart."""
    return f"{100 * value:.3g} %" if metric in PERCENT else f"{value:.3g}"


def between(low_high: Any, metric: str, sign: str = "") -> str:
    """'80.1 to 82.3 %'."""
    if not low_high:
        return NOTHING
    low, high = (quality(each, metric, sign) for each in low_high)
    return f"{low.removesuffix(' %')} to {high}"


def name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def difference(value: float, metric: str) -> str:
    """'-1.2 pt' of shares, '+0.034' of others."""
    return f"{100 * value:+.1f} pt" if metric in PERCENT else f"{value:+.3f}"
