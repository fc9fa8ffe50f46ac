"""Which names of labels mean the same: they may differ in case, spaces or the form LABEL_1."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERED = re.compile(r"(?:label[ _-]?)?(\d+)")


def normalized(name: str) -> str:
    """The name without case and separators; the number alone of `LABEL_1` (transformers' default names) and of `1`."""
    plain = re.sub(r"[\s_-]+", " ", name.strip().casefold())
    numbered = NUMBERED.fullmatch(plain)
    return f"#{int(numbered.group(1))}" if numbered else plain


def same_names(names: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """For each of `names` the one of `known` that means the same: equal, or equal in normalized form where that is unique."""
    found = {name: name for name in names if name in set(known)}
    left, free = [name for name in names if name not in found], [name for name in known if name not in found]
    ours, theirs = _unique(left), _unique(free)
    return found | {name: theirs[key] for key, name in ours.items() if key in theirs}


def _unique(names: Sequence[str]) -> dict[str, str]:
    """Names by their normalized form, without those that share one."""
    keys = [normalized(name) for name in names]
    return {key: name for key, name in zip(keys, names, strict=True) if keys.count(key) == 1}


def sources_of(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each of `names` the index of the one of `known` that means the same, None where there is none."""
    same, places = same_names(names, known), {name: index for index, name in enumerate(known)}
    return [places[same[name]] if name in same else None for name in names]
