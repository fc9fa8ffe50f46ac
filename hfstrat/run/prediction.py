"""What was predicted for a run before it started. The command predicts; the run, which is another process, reports it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from hfstrat.recipe.schema import Recipe
from hfstrat.tasks.report_parts import Predicted

VARIABLE = "HFSTRAT_PREDICTED"


def for_environment(recipe: Recipe, predicted: Mapping[str, Any]) -> dict[str, str]:
    """The variable that carries a prediction to the process of this run."""
    known = {name: value for name, value in predicted.items() if name in Predicted.model_fields}
    return {VARIABLE: json.dumps({"output_dir": recipe.output_dir, "predicted": known})}


def of_environment(recipe: Recipe) -> Predicted | None:
    """The prediction for this recipe; None for another run, such as one that this one has started."""
    try:
        given = json.loads(os.environ.get(VARIABLE, ""))
        return Predicted.model_validate(given["predicted"]) if given["output_dir"] == recipe.output_dir else None
    except (ValueError, KeyError, TypeError):
        return None
