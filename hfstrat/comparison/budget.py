"""What every run of a comparison may spend: a time, real tokens, or optimiser steps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hfstrat.config import seconds
from hfstrat.errors import UserError

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
FREE = ["training.num_train_epochs=null", "training.max_steps=null", "training.max_time=null"]


@dataclass(frozen=True)
class Budget:
    """`amount` is seconds of training, real (unpadded) tokens that are trained on, or optimiser steps."""

    kind: str  # time, tokens or steps
    amount: float
    text: str  # as it was given

    def words(self, steps: int | None = None) -> list[str]:
        """The overrides of a recipe that spends it; of tokens the `steps` that they are enough for (1 to look at it)."""
        if self.kind == "time":
            return [*FREE[:2], f"training.max_time={self.amount:g}s"]
        count = int(self.amount) if self.kind == "steps" else steps or 1
        return [*FREE[::2], f"training.max_steps={count}"]


def parse(text: str) -> Budget:
    """'10min', '2M-tokens' or '500-steps'.

    Raises:
        UserError: anything else, or nothing to spend.
    """
    wanted = "expected a time such as 10min, tokens such as 2M-tokens, or steps such as 500-steps"
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGB]?)[ -]?(token|step)s?", text.strip())
    if match is None:
        try:
            return Budget("time", seconds(text), text.strip())
        except ValueError:
            raise UserError(f"--budget: {text}: {wanted}") from None
    amount = float(match[1]) * UNITS[match[2]]
    if amount < 1 or (match[3] == "step" and not amount.is_integer()):
        raise UserError(f"--budget: {text}: not one whole {match[3]}; {wanted}")
    return Budget(f"{match[3]}s", amount, text.strip())
