"""`hfstrat cache ls` and `hfstrat cache rm`. No torch."""

from __future__ import annotations

import re
import time

from hfstrat.data import cache
from hfstrat.data.cache import Entry
from hfstrat.errors import UserError
from hfstrat.recipe.format import file_size

AGES = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def lines() -> list[str]:
    """Every entry, the one used longest ago first, and what they take together."""
    there = cache.entries()
    allowed = cache.size_limit()
    bound = "without a limit" if allowed == float("inf") else f"of at most {file_size(allowed)}"
    size = file_size(sum(entry.size for entry in there))
    total = f"{len(there)} entries, {size} {bound} (HFSTRAT_CACHE_MAX), in {cache.folder()}"
    if not there:
        return [total]
    table = [("name", "kind", "size", "used", "made of")]
    table += [(_short(e), e.kind, file_size(e.size), f"{age(e.used)} ago", e.description) for e in there]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    return ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[4]]) for row in table] + [total]


def _short(entry: Entry) -> str:
    """Enough of a name to tell it by."""
    kind, _, fingerprint = entry.name.rpartition("-")
    return f"{kind}-{fingerprint[:12]}" if kind else entry.name


def age(since: float) -> str:
    passed = max(0.0, time.time() - since)
    unit = next((unit for unit in "dhm" if passed >= AGES[unit]), "")
    return f"{int(passed / AGES[unit])} {unit}" if unit else f"{passed:.0f} s"


def remove(names: list[str], every: bool, older_than: str | None) -> list[str]:
    """Remove entries by the beginning of their names, all, or those not used for some time; says what became of each.

    Raises:
        UserError: nothing is named, or a name means no entry or several.
    """
    if not (names or every or older_than):
        raise UserError("name an entry (see hfstrat cache ls), or give --all or --older-than 30d")
    there = cache.entries()
    chosen = [_find(name, there) for name in names] if names else there
    if older_than:
        before = time.time() - _seconds(older_than)
        chosen = [entry for entry in chosen if entry.used < before]
    if every:
        cache.remove_unfinished()
    said = []
    for entry in dict.fromkeys(chosen):
        gone = cache.remove(entry)
        said.append(f"{'removed' if gone else 'in use, kept'}  {_short(entry)}  {file_size(entry.size)}  {entry.description}")
    return said or ["nothing to remove"]


def _find(name: str, there: list[Entry]) -> Entry:
    found = [entry for entry in there if entry.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} entries begin like this; give more of the name" if found else "no such entry; see hfstrat cache ls"
    raise UserError(f"{name}: {what}")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mhdw])", text)
    if not match:
        raise UserError(f"--older-than: {text}: expected a time such as 30d, 12h or 2w")
    return float(match[1]) * AGES[match[2]]
