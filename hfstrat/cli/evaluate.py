"""From the flags of `hfstrat evaluate` to a request, in this process or in several. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.evaluation.request import Request


def evaluate(
    target: str,
    overrides: list[str],
    against: str | None,
    data: str | None,
    words: dict[str, Any],
    output: Path | None,
    processes: int | None,
    quantization: str = "recorded",
) -> int:
    """Carry it out; returns the exit code.

    Args:
        words: values of `evaluation:` keys that have a flag of their own; lists may hold several names with commas.
    """
    given = [f"evaluation.{key}={json.dumps(_listed(value))}" for key, value in words.items() if value]
    request = Request(target, against, data, [*given, *overrides], str(output) if output else None, quantization)
    if (processes or 1) == 1:
        from hfstrat.evaluation.evaluate import evaluate as carry_out

        carry_out(request)
        return 0
    from hfstrat.run import launch

    request.check()
    return launch.start(launch.plan_launch([request.to_json()], None, processes, program="hfstrat.evaluation.evaluate"))


def _listed(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [name.strip() for each in value for name in each.split(",") if name.strip()]
