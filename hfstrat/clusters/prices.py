"""What a job costs: prices of the user per hour, times the predicted time or the time limit. No prices are shipped."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfstrat.errors import UserError, first_line
from hfstrat.recipe import format

KINDS = ("gpu", "machine")
EXPECTED = "expected `currency: USD`, `gpu: {a100: 2.0}` and `machine: {a100x8: 16.0}`, prices per hour"
COLUMNS = ("kind", "name", "price")


@dataclass(frozen=True)
class Prices:
    """Prices per hour, of one GPU and of one machine, by lower-case name."""

    file: str
    currency: str
    gpu: dict[str, float]
    machine: dict[str, float]

    def per_hour(self, nodes: int, gpus: int, gpu: str | None, machines: list[str]) -> tuple[float, str]:
        """The price of all machines of a job per hour, and its basis in words.

        Args:
            gpus: of one machine.
            gpu: their type.
            machines: names of the machine, such as a flavor or a partition; the first with a price counts.

        Raises:
            UserError: the file has no price for this job.
        """
        many = format.plural(nodes, "machine")
        for name in [*machines, *(["cpu"] if not gpus else [])]:
            if name.lower() in self.machine:
                price = self.machine[name.lower()]
                return price * nodes, f"{many} of {name} at {price:g}"
        if gpus and gpu and gpu.lower() in self.gpu:
            price = self.gpu[gpu.lower()]
            return price * nodes * gpus, f"{nodes * gpus} GPUs of {gpu} at {price:g}"
        wanted = [f"machine.{name}" for name in machines] + (
            [f"gpu.{gpu}"] if gpus and gpu else [] if gpus else ["machine.cpu"]
        )
        known = [f"{kind}.{name}" for kind in KINDS for name in getattr(self, kind)]
        hint = "" if wanted else " (--gpu-type names the GPU)"
        raise UserError(
            f"--prices: {self.file}: no price for {' or '.join(wanted) or 'this job'}{hint}; it has {', '.join(known)}"
        )


def read(path: str) -> Prices:
    """The prices of a YAML or CSV file. Raises UserError: what is wrong, and where."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--prices: {path}: no such file; {EXPECTED}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prices: {path}: cannot be read as text: {first_line(error)}") from None
    return _of_csv(path, text) if file.suffix.lower() == ".csv" else _of_yaml(path, text)


def _of_yaml(path: str, text: str) -> Prices:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--prices: {path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"--prices: {path}: {EXPECTED}")
    if unknown := [str(key) for key in data if key not in ("currency", *KINDS)]:
        raise UserError(f"--prices: {path}: unknown key {unknown[0]}; {EXPECTED}")
    tables: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        table = data.get(kind) or {}
        if not isinstance(table, dict):
            raise UserError(f"--prices: {path}: {kind} has to map names to prices; {EXPECTED}")
        tables[kind] = {str(name).lower(): _price(path, f"{kind}.{name}", value) for name, value in table.items()}
    return _made(path, data.get("currency"), tables)


def _of_csv(path: str, text: str) -> Prices:
    rows = list(csv.DictReader(text.splitlines()))
    columns = list(rows[0]) if rows else []
    if missing := [name for name in COLUMNS if name not in columns]:
        raise UserError(f"--prices: {path}: no column {missing[0]}; expected kind,name,price,currency with kind gpu or machine")
    tables: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    currencies = {(row.get("currency") or "").strip() for row in rows} - {""}
    if len(currencies) > 1:
        raise UserError(f"--prices: {path}: several currencies ({', '.join(sorted(currencies))}); give one")
    for number, row in enumerate(rows, 2):
        kind = (row["kind"] or "").strip()
        if kind not in KINDS:
            raise UserError(f"--prices: {path}, line {number}: kind is {kind or 'empty'}; expected gpu or machine")
        name = (row["name"] or "").strip()
        tables[kind][name.lower()] = _price(path, f"line {number}, {name}", row["price"])
    return _made(path, next(iter(currencies), None), tables)


def _price(path: str, place: str, value: Any) -> float:
    try:
        price = float(value)
    except (TypeError, ValueError):
        price = math.nan
    if isinstance(value, bool) or not math.isfinite(price) or price < 0:
        raise UserError(f"--prices: {path}: {place}: {value}; expected a price per hour, a number of at least 0")
    return price


def _made(path: str, currency: Any, tables: dict[str, dict[str, float]]) -> Prices:
    if not currency or not isinstance(currency, str):
        raise UserError(f"--prices: {path}: no currency; {EXPECTED}")
    if not any(tables.values()):
        raise UserError(f"--prices: {path}: no prices; {EXPECTED}")
    return Prices(path, currency, tables["gpu"], tables["machine"])


@dataclass(frozen=True)
class Time:
    """A predicted time in seconds, with its interval where one was validated, and the reason if nothing is predicted."""

    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    basis: str = ""

    def words(self) -> str:
        if self.seconds is None:
            return f"not predicted: {self.basis}"
        band = "no interval was validated"
        if self.low is not None and self.high is not None:
            band = f"{format.duration(self.low)} to {format.duration(self.high)}"
        return f"about {format.duration(self.seconds)} ({band}), {self.basis}"


def cost_lines(prices: Prices, per_hour: float, basis: str, time: Time, limit: float | None, sessions: int) -> list[str]:
    """Lines about the cost: expected, with the interval of the time, and the most that the limits allow."""
    unit = prices.currency
    lines = [f"{per_hour:.2f} {unit} per hour: {basis}, from {prices.file}"]
    if time.seconds is not None:
        band = ""
        if time.low is not None and time.high is not None:
            band = f" ({per_hour * time.low / 3600:.2f} to {per_hour * time.high / 3600:.2f})"
        lines.append(
            f"expected {per_hour * time.seconds / 3600:.2f} {unit}{band}, for the predicted time; waiting is not included"
        )
    if limit is None:
        lines.append("no upper limit: --time sets one")
        return lines
    one = per_hour * limit / 3600
    more = (
        f", at most {one * sessions:.2f} {unit} in {sessions} sessions (--max-restarts {sessions - 1})" if sessions > 1 else ""
    )
    lines.append(f"at most {one:.2f} {unit} in a session of {format.duration(limit)}{more}")
    return lines
