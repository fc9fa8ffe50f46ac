"""Numbers as text: the one place that decides digits and units, so that every command shows the same figure for the same run.

Each function returns `MISSING` for None. Exact integers that matter as such are written with `f"{number:,}"`.
"""

from __future__ import annotations

from collections.abc import Iterable

MISSING = "–"
SHARES = (
    "accuracy",
    "f1",
    "exact_match",
    "acc",
    "regex",
    "json",
    "rouge",
    "chrf",
    "share",
    "precision",
    "recall",
    "map",
    "ap50",
)


def duration(seconds: float | None) -> str:
    """Time that something takes: '0.4s', '34s', '12m 05s', '3h 20m' or '2d 04h'."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if seconds < 3599.5:
        return "{}m {:02}s".format(*divmod(round(seconds), 60))
    if seconds < 86370:
        return "{}h {:02}m".format(*divmod(round(seconds / 60), 60))
    return "{}d {:02}h".format(*divmod(round(seconds / 3600), 24))


def clock(seconds: float) -> str:
    """Time left, as a counter that ticks: '4:07' or '1:04:07'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory(size: float | None) -> str:
    """Bytes in memory, in binary units: '412 MiB' or '3.02 GiB'."""
    return MISSING if size is None else _scaled(max(size, 0) / 2**10, (" KiB", " MiB", " GiB", " TiB"), 1024)


def file_size(size: float | None) -> str:
    """Bytes on the disk, in decimal units as on the Hub: '999 B', '3.41 kB', '1.24 MB' or '538 MB'."""
    return MISSING if size is None else _scaled(size, (" B", " kB", " MB", " GB", " TB"))


def count(number: float | None) -> str:
    """A count with three digits, exact below 10,000: '8,204', '260k', '1.38M' or '7.24B'."""
    if number is None:
        return MISSING
    return f"{number:,.0f}" if abs(number) < 9999.5 else _scaled(number, ("", "k", "M", "B", "T"))


def _scaled(number: float, units: tuple[str, ...], base: int = 1000) -> str:
    """`number` with three digits in the first unit where it is below 1,000; without decimals in the smallest unit."""
    power = 0
    while abs(number) >= 999.5 and power + 1 < len(units):
        number, power = number / base, power + 1
    digits = 0 if power == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:,.{digits}f}{units[power]}"


def percent(share: float | None, digits: int = 1, signed: bool = False) -> str:
    """A share of one: '81.2%'."""
    return MISSING if share is None else f"{share:{'+' if signed else ''}.{digits}%}"


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is shown in percent."""
    return metric.startswith(SHARES) or metric.endswith(("accuracy", "accuracies", "_f1"))


def without_negative(metrics: Iterable[str]) -> list[str]:
    """The names of metrics, without the loss where it is the negative reward."""
    names = list(metrics)
    return [name for name in names if not (name == "loss" and "reward" in names)]


def metric(name: str, value: float | None, signed: bool = False) -> str:
    """The value of a metric: '81.2%' of a share, '2.3457' of a loss, '15.32' of a perplexity."""
    if value is None:
        return MISSING
    if is_share(name):
        return percent(value, signed=signed)
    size = abs(value)
    digits = 0 if size >= 999.995 else 2 if size >= 9.99995 or name == "perplexity" else 4
    return f"{value:{'+' if signed else ''},.{digits}f}"


def difference(name: str, value: float | None) -> str:
    """The difference of two values of a metric: '-1.2 pp' (percentage points) of a share, '+0.0340' of a loss."""
    if value is None:
        return MISSING
    return f"{100 * value:+.1f} pp" if is_share(name) else metric(name, value, signed=True)


def interval(name: str, low: float, high: float) -> str:
    """The bounds of an interval of a metric: '80.1% to 82.3%'."""
    return f"{metric(name, low)} to {metric(name, high)}"


def rate(per_second: float | None, unit: str = "tokens") -> str:
    """A speed: '12,345 tokens/s', '0.52 tokens/s'."""
    if per_second is None:
        return MISSING
    return f"{per_second:,.{2 if per_second < 10 else 0}f} {unit}/s"


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: '1 seed', '1,200 seeds'; `nouns` is the plural where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def trainable(trainable_parameters: int, parameters: int) -> str:
    """PEFT's line: 'trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364'."""
    share = 100 * trainable_parameters / parameters if parameters else 0.0
    return f"trainable params: {trainable_parameters:,} || all params: {parameters:,} || trainable%: {share:.4f}"
