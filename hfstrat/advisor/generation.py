"""How long a model takes to write the answers that it is trained on, and how much longer they make its examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfstrat.advisor.architecture import Model
from hfstrat.advisor.speed import Rate
from hfstrat.objectives.reinforcement.task import PromptRows
from hfstrat.recipe.schema import Recipe

# seconds of a pass through a block that decodes one token of each sequence. On a CPU: SmolLM2-135M with 2 to 64 sequences on a
# thread of an Intel Xeon; on a GPU an assumption, since Python starts its kernels one by one
PASS_SECONDS = {True: 2.1e-3, False: 0.9e-3}
DECODING = 0.09  # of the rate of matrix products, reached by products of one token for each sequence, from the same measurement


class Generation(NamedTuple):
    """Answers to each prompt, and the tokens of one: it is not known when they end, so each is as long as it may be.

    is_rewarded: whether they are scored, in evaluations too, where each prompt has one answer; else a teacher reads them.
    has_reference: whether another model reads them, from which the divergence is measured.
    """

    answers: int
    tokens: int
    is_rewarded: bool = True
    has_reference: bool = False

    def lengths(self, prompts: np.ndarray) -> np.ndarray:
        """Tokens of all sequences of an example, by those of its prompt."""
        return self.answers * (prompts + self.tokens)

    def seconds(self, model: Model, sequences: float, prompt: float, rate: Rate, on_cpu: bool) -> float:
        """Seconds in which a batch is answered.

        Args:
            sequences: in the batch.
            prompt: average tokens of a prompt, which are read at once.
        """
        operations = 2.0 * model.parameters * sequences
        decoded = PASS_SECONDS[on_cpu] * model.layers + operations / (DECODING * rate.value)
        return operations * prompt / rate.value + self.tokens * decoded


def with_answers(rate: Rate, model: Model, answers: Generation | None, prompt: float, batch: int, on_cpu: bool) -> Rate:
    """The rate of steps in each of which the model answers `batch` prompts of so many tokens, if it does."""
    if answers is None:
        return rate
    written = answers.seconds(model, batch * answers.answers, prompt, rate, on_cpu)
    return rate._replace(fixed=rate.fixed + written, band=None)


def evaluation_seconds(rows: float, model: Model, answers: Generation | None, prompt: float, rate: Rate, on_cpu: bool) -> float:
    """Seconds in which the model answers some rows of an evaluation; 0 where it does not."""
    if answers is None or not answers.is_rewarded:
        return 0.0
    batch = min(rows, PromptRows.answered_at_once)
    return rows / batch * answers.seconds(model, batch, prompt, rate, on_cpu)


def of_recipe(recipe: Recipe) -> Generation | None:
    """The answers that a run samples; None where it trains on given ones."""
    objective: Any = recipe.objective
    strategy: Any = recipe.strategy
    if objective.generates:
        return Generation(objective.num_generations, objective.max_completion_length, has_reference=bool(objective.beta))
    if getattr(strategy, "on_policy", False):
        return Generation(1, strategy.max_new_tokens, is_rewarded=False)
    return None
