"""`hfstrat cache ls` and `hfstrat cache rm`. No torch."""

from __future__ import annotations

import re
import time

from hfstrat.cli.runs import aligned
from hfstrat.data import cache
from hfstrat.data.cache import Entry
from hfstrat.errors import UserError
from hfstrat.recipe.format import file_size, plural

AGES = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def lines() -> list[str]:
    """A table of the entries, the least recently used first, and their total size."""
    entries, limit = cache.entries(), cache.size_limit()
    bound = "without a limit" if limit == float("inf") else f"of at most {file_size(limit)}"
    size = file_size(sum(entry.size for entry in entries))
    total = f"{plural(len(entries), 'entry', 'entries')}, {size} {bound} (HFSTRAT_CACHE_MAX), in {cache.folder()}"
    cells = [[_short(e), e.kind, file_size(e.size), f"{_age(e.used)} ago", e.description] for e in entries]
    return [*(aligned([["name", "kind", "size", "used", "content"], *cells]) if cells else []), total]


def _short(entry: Entry) -> str:
    """The beginning of a name, enough to identify it."""
    kind, _, fingerprint = entry.name.rpartition("-")
    return f"{kind}-{fingerprint[:12]}" if kind else entry.name


def _age(since: float) -> str:
    passed = max(0.0, time.time() - since)
    unit = next((unit for unit in "dhm" if passed >= AGES[unit]), "")
    return f"{int(passed / AGES[unit])} {unit}" if unit else f"{passed:.0f} s"


def remove(names: list[str], every: bool, older_than: str | None) -> list[str]:
    """Remove the entries whose names begin like one of `names`, or all, or those unused for some time; returns a line for each.

    Raises:
        UserError: nothing is named, or a name matches no entry or several.
    """
    if not (names or every or older_than):
        raise UserError("name an entry (see hfstrat cache ls), or give --all or --older-than 30d")
    entries = cache.entries()
    chosen = [_find(name, entries) for name in names] if names else entries
    if older_than:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mhdw])", older_than)
        if not match:
            raise UserError(f"--older-than: {older_than}: expected a time such as 30d, 12h or 2w")
        before = time.time() - float(match[1]) * AGES[match[2]]
        chosen = [entry for entry in chosen if entry.used < before]
    if every:
        cache.remove_unfinished()
    results = [
        f"{'removed' if cache.remove(entry) else 'in use, kept'}  {_short(entry)}  {file_size(entry.size)}  {entry.description}"
        for entry in dict.fromkeys(chosen)
    ]
    return results or ["nothing to remove"]


def _find(name: str, entries: list[Entry]) -> Entry:
    found = [entry for entry in entries if entry.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} entries begin like this; give more of the name" if found else "no such entry; see hfstrat cache ls"
    raise UserError(f"{name}: {problem}")
