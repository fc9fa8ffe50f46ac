"""`hfstrat.evaluate`, also as a method of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfstrat.api import inputs


def measure(target: str | Path, data: Any, against: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What `hfstrat evaluate` writes with `--json`; its table is printed. Raises UserError."""
    from hfstrat.evaluation.evaluate import Request, evaluate

    other = None if against is None else str(against)
    return evaluate(Request(str(target), other, inputs.data_source(data, "data"), flat(overrides))) or {}


def flat(changes: Mapping[str, Any], before: str = "") -> list[str]:
    """Nested keys as overrides: `a.b=value` with the value as JSON."""
    found: list[str] = []
    for key, value in changes.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            found += flat(value, f"{name}.")
        else:
            found.append(f"{name}={json.dumps(value, default=inputs.plain, ensure_ascii=False)}")
    return found
