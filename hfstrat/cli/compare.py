"""The words of the command line as what is asked for."""

from __future__ import annotations

from pathlib import Path

from hfstrat.comparison import entries as budgets
from hfstrat.errors import UserError
from hfstrat.recipe.section import seconds


def compare(
    words: list[str],
    model: str | None,
    data: str | None,
    strategies: str | None,
    task: str | None,
    budget: str,
    seeds: int,
    output: Path,
    evaluate: str | None,
    timeout: str | None,
    retry: bool,
) -> int:
    """Carry out what was asked for; returns the exit code.

    Raises:
        UserError: an option that says nothing readable.
    """
    from hfstrat.advisor import recipes as advisor_recipes
    from hfstrat.comparison import compare as comparison_compare
    from hfstrat.comparison.entries import Asked

    if not budget:
        raise UserError("--budget: missing; expected what each run may spend, such as 10min, 2M-tokens or 500-steps")
    limit = None
    if timeout is not None:
        try:
            limit = seconds(timeout)
        except ValueError as error:
            raise UserError(f"--timeout: {timeout}: {error}") from None
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    recipes = [word for word in words if word not in overrides]
    spent = budgets.parse(budget)
    asked = Asked(recipes, overrides, model, data, strategies, task, spent, seeds, output, evaluate, limit, retry)
    return comparison_compare.compare(asked, advisor_recipes.predict)
