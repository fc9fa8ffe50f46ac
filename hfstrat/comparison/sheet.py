"""Numbers as people read them: three digits that matter, and a unit.

The table of a comparison as text: one column a recipe, one line a measure or a factor; terminal and page share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hfstrat.strategies import defaults

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


def metric_name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def difference(value: float, metric: str) -> str:
    """'-1.2 pt' of shares, '+0.034' of others."""
    return f"{100 * value:+.1f} pt" if metric in PERCENT else f"{value:+.3f}"


Row = dict[str, Any]


PRICES = {"seconds": "time", "memory": "memory"}


MEASURED = {"seconds": "seconds", "memory": "peak_memory_bytes"}


PREDICTED = {"seconds": "seconds", "memory": "memory_bytes"}


STATUS = {
    "out-of-memory": "out of memory",
    "timed-out": "out of time",
    "done": "done",
    "waiting": "waiting",
    "running": "running",
}


class Line(NamedTuple):
    """One line of the table: what it is, a cell for each recipe, and the group that it belongs to."""

    name: str
    cells: list[str]
    group: str = "measured"

    @property
    def is_empty(self) -> bool:
        return all(cell == NOTHING for cell in self.cells)


def sheet(table: Row) -> list[Line]:
    """All lines, from top to bottom."""
    rows, metric = table["entries"], table["quality"]["metric"]
    several = any(row["label"] != row["strategy"] for row in rows)

    def line(name: str, cell: Callable[[Row], str], group: str = "measured") -> Line:
        return Line(name, [cell(row) for row in rows], group)

    lines = [line("strategy", lambda row: row["strategy"])] if several else []
    lines += [
        line("runs", status),
        line(metric_name(metric), lambda row: quality(row["quality"], metric)),
        line("  over seeds, 95 %", lambda row: between(row["over_seeds"], metric)),
        line("  over examples, 95 %", lambda row: between(row.get("over_rows"), metric)),
        line("  from the best", lambda row: from_best(row, table)),
        line("  before training", lambda row: quality(row["before"], metric)),
        line("time", lambda row: seconds(row["seconds"])),
        line("  predicted", lambda row: predicted(row, "seconds", seconds), "predicted"),
        line("tokens/s", lambda row: count(row["tokens_per_second"] or None)),
        line("peak memory", lambda row: memory(row["peak_memory_bytes"])),
        line("  predicted", lambda row: predicted(row, "memory", memory), "predicted"),
        line("parameters that learn", lambda row: count(row["trainable_parameters"])),
        line("  of", lambda row: count(row["total_parameters"])),
        line("artifact", lambda row: size(row["artifact_bytes"])),
        line("on the front of", on_front),
        line("the adviser's place", lambda row: str(row["predicted"].get("rank", NOTHING)), "predicted"),
        line("the adviser said", lambda row: row["predicted"].get("verdict") or NOTHING, "predicted"),
        line("  from", lambda row: row["predicted"].get("source") or NOTHING, "sources"),
    ]
    lines.append(line("data there", lambda row: there(row, table), "factors"))
    if several:
        lines.append(line("model", lambda row: row["model"], "factors"))
    return lines + [
        line(name, lambda row, at=at: row["factors"][at], "factors")  # type: ignore[misc]
        for at, name in zip(defaults.Factors._fields, defaults.FACTOR_NAMES, strict=True)
    ]


def there(row: Row, table: Row) -> str:
    """'4,758 rows, 394 k tokens: 1.5 a parameter that learns'."""
    found, learning = table["rows"], row["trainable_parameters"]
    said = f"{found['train_rows']:,} rows, {count(found['train_tokens'])} tokens"
    if not learning:
        return said
    each = found["train_tokens"] / learning
    return f"{said}: {f'{each:.2g}' if each >= 0.01 else 'under 0.01'} a parameter that learns"


def status(row: Row) -> str:
    """'3 of 3', with what became of the others."""
    said = f"{row['finished']} of {len(row['runs'])}"
    return said if row["status"] == "done" else f"{said}: {STATUS.get(row['status'], row['status'])}"


def from_best(row: Row, table: Row) -> str:
    """'-1.2 pt (-2.4 to +0.1), not told apart'."""
    if row["label"] == table["best"]:
        return "best"
    found, metric = row.get("against_best"), table["quality"]["metric"]
    if not found:
        return NOTHING
    parts = [found[name] for name in ("difference", "low", "high")]
    first, low, high = (difference(part, metric) for part in parts)
    return (
        f"{first} ({low.removesuffix(' pt')} to {high.removesuffix(' pt')}){'' if found['told_apart'] else ', not told apart'}"
    )


def predicted(row: Row, what: str, say: Callable[[float | None], str]) -> str:
    """'34 s (30 s to 41 s)', with whether what was measured lies outside; empty where nothing was predicted."""
    value, band = row["predicted"].get(PREDICTED[what]), row["predicted"].get(f"{what}_band")
    if value is None:
        return NOTHING
    missed = f", missed by {100 * abs(row[MEASURED[what]] / value - 1):.0f} %" if is_within(row, what) is False else ""
    return say(value) + (f" ({say(band[0])} to {say(band[1])})" if band else "") + missed


def is_within(row: Row, what: str) -> bool | None:
    """Whether what was measured lies in the band that was predicted; None where one of them is not there."""
    band, measured = row["predicted"].get(f"{what}_band"), row[MEASURED[what]]
    return None if not band or measured is None else bool(band[0] <= measured <= band[1])


def summary(table: Row) -> list[str]:
    """What came out, in sentences."""
    rows, metric = table["entries"], table["quality"]["metric"]
    best = next((row for row in rows if row["label"] == table["best"]), None)
    if best is None:
        return []
    close = [row["label"] for row in rows if (found := row.get("against_best")) and not found["told_apart"]]
    said = [
        f"{best['label']} came out best: {metric_name(metric)} {quality(best['quality'], metric)}"
        + (f"; not told apart from it on these rows: {', '.join(close)}" if close else "")
    ]
    for price, name in PRICES.items():
        if on := [row["label"] for row in rows if row.get("front", {}).get(price)]:
            said.append(f"on the front of quality and {name}: {', '.join(on)}")
    return said + _advised(table, best)


def _advised(table: Row, best: Row) -> list[str]:
    """How good the adviser's word was: its first choice, and how many measurements lie where it said."""
    rows = table["entries"]
    first = next((row for row in rows if row["predicted"].get("rank") == 1), None)
    if first is None or len(rows) < 2:
        return []
    if first is best:
        how = "which came out best"
    elif first["quality"] is None:
        how = "which did not come to its end" if first["status"] not in ("waiting", "running") else "which has not run yet"
    else:
        how = f"from the best: {from_best(first, table)}"
    said = [f"the adviser's first choice was {first['label']}, {how}"]
    for what, name in PRICES.items():
        told = [is_within(row, what) for row in rows if is_within(row, what) is not None]
        if told:
            said.append(f"{name} came out within what was predicted in {sum(map(bool, told))} of {len(told)}")
    return said


def on_front(row: Row) -> str:
    """Which prices it is worth."""
    return ", ".join(PRICES[price] for price, is_on in row.get("front", {}).items() if is_on) or NOTHING


def failures(table: Row) -> list[str]:
    """A sentence for each run that failed, and for each strategy that was left out."""
    said = [
        f"{row['label']}, seed {run['seed']}: {STATUS.get(run['status'], run['status'])}: {run['sentence']}"
        for row in table["entries"]
        for run in row["runs"]
        if run["status"] not in ("done", "waiting", "running")
    ]
    return said + [f"{name} was left out: {reason}" for name, reason in table["left_out"].items()]


def remarks(table: Row) -> list[str]:
    """What has to be known to read the numbers rightly."""
    said = []
    if len(table["seeds"]) < 2:
        said.append("one seed: how much another one would change is not known (--seeds 3)")
    few = table["rows"]["eval_rows"]
    if few < 100:
        said.append(f"{few} evaluation rows are few: differences have to be large to be told apart")
    if table["budget"]["kind"] == "time":
        limit = table["budget"]["amount"]
        for row in table["entries"]:
            slow = [
                run for run in row["runs"] if run.get("steps") == 1 and run.get("train_seconds", 0) > limit and run["tokens"]
            ]
            if slow:
                said.append(f"{row['label']}: its one step took longer than the budget")
    return said
