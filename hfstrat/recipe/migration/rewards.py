"""Reward functions of other tools, as rewards of `objective: grpo`."""

from __future__ import annotations

from typing import Any

from hfstrat.recipe.migration.rules import Draft, as_list


def rewards(draft: Draft, functions: Any, weights: Any, key: str) -> None:
    """Set `objective.rewards`: a dotted name becomes a function of a file, any other one of `rewards.py`."""
    names, factors = as_list(functions), weights if isinstance(weights, list) else []
    found: list[Any] = []
    for place, name in enumerate(map(str, names)):
        module, _, function = name.rpartition(".")
        reward = f"{module.replace('.', '/') or 'rewards'}.py:{function}"
        weighted = place < len(factors) and factors[place] != 1
        found.append({"name": reward, "weight": float(factors[place])} if weighted else reward)
        where = f"the function {function} has to be in {reward.partition(':')[0]}"
        imported = "" if module else f"; if it is TRL's own, `from trl.rewards import {function}` there"
        draft.look(key, f"{name}: {where}{imported}; `hfstrat` has rewards by name, too: docs/rewards.md")
    draft.put("objective.rewards", found, key)
