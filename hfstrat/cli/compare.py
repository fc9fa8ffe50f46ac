"""`hfstrat compare`: options in, one call out."""

from __future__ import annotations

from pathlib import Path

from hfstrat.comparison.entries import Request, parse_budget
from hfstrat.errors import UserError
from hfstrat.recipe.section import seconds


def compare(
    arguments: list[str],
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
    """Compare recipes, or the strategies for a model and data; returns the exit code.

    Args:
        arguments: recipe files and overrides for all of them.

    Raises:
        UserError: a wrong option.
    """
    from hfstrat.advisor import recipes as advisor_recipes
    from hfstrat.comparison import compare as comparison_compare

    if not budget:
        raise UserError("--budget: missing; give what each run may spend, such as 10min, 2M-tokens or 500-steps")
    limit = None
    if timeout is not None:
        try:
            limit = seconds(timeout)
        except ValueError as error:
            raise UserError(f"--timeout: {timeout}: {error}") from None
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).is_file()]
    recipes = [argument for argument in arguments if argument not in overrides]
    spent = parse_budget(budget)
    request = Request(recipes, overrides, model, data, strategies, task, spent, seeds, output, evaluate, limit, retry)
    return comparison_compare.compare(request, advisor_recipes.predict)
