"""A Trainer whose training step is TRL's and generates first: training data are prompts, evaluation data are batches."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hfstrat.models.chunked_loss import multiply_once
from hfstrat.trainer.trainer import StrategyTrainer


class GeneratingTrainer(StrategyTrainer):
    """The parts of TRL's generating trainers that are ours: token ids of prompts, evaluation, cards.

    The class after this one in the order of methods is TRL's; it keeps the collator of evaluations in `collate`.
    """

    data_collator: Any
    collate: Any
    counts_tokens = True

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with multiply_once(self.model):  # not in evaluations, whose loss is computed in chunks by a head without hooks
            return super().training_step(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Evaluation inputs are batches already; training inputs are prompts that the model answers first."""
        return Trainer._prepare_inputs(self, inputs) if isinstance(inputs, dict) else super()._prepare_inputs(inputs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return Trainer._get_eval_sampler(self, eval_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        prompts_as_they_are: Any = self.data_collator
        self.data_collator = self.collate
        try:
            return Trainer.get_eval_dataloader(self, eval_dataset)
        finally:
            self.data_collator = prompts_as_they_are

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the result gets our own card."""
