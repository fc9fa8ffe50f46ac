"""Causal language modeling by rewards: the rows are prompts, the metrics are rewards; the models are those of the task."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.data.prompts import COLUMNS, GIVEN, PromptFormat
from hfstrat.objectives.preference.task import PreferenceRows
from hfstrat.objectives.reinforcement.metrics import RewardMetrics
from hfstrat.recipe.rewards import WITH_REFERENCE, labels
from hfstrat.tasks.base import Pictures, Values
from hfstrat.tasks.causal_lm import CausalLM, LanguageText

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.objectives import Grpo
    from hfstrat.tasks.report import Result


class PromptRows(PreferenceRows):
    """Prompts that the model answers."""

    columns = COLUMNS
    noun = "prompt"
    answered_at_once = 64  # a step of generation costs nearly the same for one prompt as for many

    def __init__(self, section: Grpo) -> None:
        self.section: Any = section

    @property
    def reader(self) -> Callable[..., Any]:
        return PromptFormat.detect

    def encoder(self, data: Data, tokenizer: Any, template: str) -> Any:
        from hfstrat.data.prompt_rows import PromptEncoder
        from hfstrat.data.render import Renderer

        needs_answer = any(reward.name in WITH_REFERENCE for reward in self.section.rewards)
        return PromptEncoder(Renderer(tokenizer, template, "completions", data.chat_template_kwargs), needs_answer)

    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import Collator
        from hfstrat.models.fused_loss import is_bound
        from hfstrat.objectives.reinforcement.collate import PromptCollator

        plain = Collator(tokenizer.pad_token_id or 0, multiple, masks_logits=False, selects_rows=is_bound(base.model))
        return PromptCollator(plain, self.section.num_generations)

    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        from hfstrat.data.render import IGNORED

        return {"input_ids": [1] * (length + self.answer_tokens), "labels": [IGNORED] * length + [1] * self.answer_tokens}

    @property
    def answer_tokens(self) -> int:
        return int(self.section.max_completion_length)

    def longest(self, data: PreparedData) -> int:
        return int(max(data.lengths.max(), data.eval_lengths.max())) + self.answer_tokens

    def sizes(self, data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
        return (data.lengths + self.answer_tokens) * self.section.num_generations, data.eval_lengths

    def note(self, row: dict[str, Any]) -> str:
        answer = json.loads(row[GIVEN])["answer"]
        return "" if answer is None else f"answer to compare with: {answer}"

    def parts(self, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        return [("", row)]


class RewardText(LanguageText):
    """Predictions are greedy answers."""

    unit = "prompt"

    def __init__(self, section: Grpo) -> None:
        self.section = section

    @property
    def loss_unit(self) -> str:
        return "negative reward"

    def metrics(self, metrics: Values) -> str:
        names = labels(self.section.rewards)
        parts = [f"{name} {metrics[f'rewards/{name}/mean']:.3f}" for name in names if len(names) > 1]
        inside = f" ({', '.join(parts)})" if parts else ""
        return (
            f"reward {metrics['reward']:.3f}{inside}, answers of {metrics['completions/mean_length']:.1f} tokens, "
            f"{metrics['completions/clipped_ratio']:.0%} cut"
        )

    def change(self, before: Values, after: Values) -> str:
        length = "completions/mean_length"
        return (
            f"reward of greedy answers {before['reward']:.3f} -> {after['reward']:.3f}, "
            f"their length {before[length]:.1f} -> {after[length]:.1f} tokens"
        )

    def sections(self, result: Result, pictures: Pictures) -> list[Section]:
        from hfstrat.objectives.reinforcement import page

        return page.sections(result)

    def advice(self, result: Result) -> list[tuple[str, str]]:
        from hfstrat.objectives.reinforcement import page

        return page.advice(result)


class RewardTask(CausalLM):
    """The task `causal-lm` with rewards."""

    def __init__(self, section: Grpo) -> None:
        self.rows = PromptRows(section)
        self.metrics = RewardMetrics(section=section)  # type: ignore[assignment]
        self.text = RewardText(section)
