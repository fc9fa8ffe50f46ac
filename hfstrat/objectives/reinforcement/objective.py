"""The objective `grpo`: what it refuses, its task, and its Trainer."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from hfstrat.data.prompts import GIVEN
from hfstrat.errors import UserError
from hfstrat.objectives.base import Objective
from hfstrat.objectives.dropout import check_dropout, without_dropout
from hfstrat.objectives.reinforcement import rewards
from hfstrat.objectives.reinforcement.task import RewardTask
from hfstrat.recipe.rewards import labels
from hfstrat.tasks.base import Task
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, FSDP

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.schema import Recipe
    from hfstrat.trainer.train_data import TrainData

REFUSED = {  # strategies that cannot be combined with rewards, and why
    "scratch": "random weights earn no reward: train them with objective: sft first, then continue with full or lora",
    "head": "only the output layer would be trained, on cached states of given texts; use lora, partial or full",
    "distill": "a student is trained on its teacher's outputs; distill with objective: sft, then continue with full or lora",
}
TRIED = 2  # rows on which the user's functions are tried before training


class RewardObjective(Objective):
    """Group relative policy optimization."""

    section: Any

    @property
    def task(self) -> Task:
        return RewardTask(self.section)

    def check(self, recipe: Recipe, wrapping: str = ALONE) -> None:
        if recipe.task != CausalLM.name:
            raise UserError("objective: grpo: rewards are for generated answers; it needs task: causal-lm")
        if why := REFUSED.get(recipe.strategy.name):
            raise UserError(f"objective: grpo cannot be combined with strategy {recipe.strategy.name}: {why}")
        if getattr(recipe.strategy, "precompute", None) is True:
            raise UserError(
                "strategy.precompute: true: the answers change with the model, so no states can be cached; set auto or false"
            )
        if hasattr(recipe.strategy, "target_modules"):
            self._check_adapter(recipe)
        if recipe.training.must_pack:
            given = str(recipe.training.packing).lower()
            raise UserError(f"training.packing: {given}: the answers of grpo are not packed; set auto or false")
        self._check_data(recipe)
        check_dropout(recipe)
        if wrapping in (FSDP, DEEPSPEED):
            raise UserError(
                "objective: grpo: the model generates in every step, which needs all of it on each process; use "
                "--accelerate-config ddp"
            )
        if self.section.use_vllm and importlib.util.find_spec("vllm") is None:
            raise UserError("objective.use_vllm: true, but vLLM is not installed: pip install vllm, or remove it")
        rewards.check(self.section.rewards)

    def _check_adapter(self, recipe: Recipe) -> None:
        strategy: Any = recipe.strategy
        if "lm_head" in (strategy.target_modules or []):
            raise UserError("strategy.target_modules: lm_head: TRL's GRPO reads its weight without the adapter; leave it out")
        if recipe.model.add_tokens:
            raise UserError(
                "model.add_tokens: TRL's GRPO does not read the adapter of new tokens; use strategy full, or remove it"
            )
        if self.section.beta and (strategy.adapter or strategy.changes_base):
            raise UserError(
                "objective.beta: the divergence is measured from the model without its adapter, which is not where this run "
                "starts (strategy.adapter, or an init_lora_weights that changes the base); merge the adapter first, or set 0"
            )

    def _check_data(self, recipe: Recipe) -> None:
        data = recipe.data
        if data.overflow == "split":
            raise UserError("data.overflow: split: prompts cannot be split; set drop or error")
        if data.documents == "files":
            raise UserError("data.documents: files: complete files are no prompts; remove it, or set objective: sft")
        if data.train_on != "auto":
            raise UserError(f"data.train_on: {data.train_on}: grpo trains on the model's own answers; remove it")

    def prepare(self, recipe: Recipe, model: nn.Module, rows: TrainData, data: PreparedData) -> tuple[TrainData, PreparedData]:
        without_dropout(model, rows)
        self._try_rewards(data)
        return rows, data

    def _try_rewards(self, data: PreparedData) -> None:
        """Call each function on the answers of some rows, so that it does not fail after the first generation."""
        tokenizer, tried = data.renderer.tokenizer, range(min(TRIED, len(data.train)))
        given = [json.loads(data.train[place][GIVEN]) for place in tried]
        ids = [tokenizer(row["answer"] or "", add_special_tokens=False)["input_ids"] for row in given]
        scorer = rewards.Scorer(self.section, tokenizer)
        for place in range(len(scorer.names)):
            scorer.score(place, given, ids)

    def facts(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """The rewards of training, by step."""
        names = ["reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "kl"]
        names += [f"rewards/{name}/mean" for name in labels(self.section.rewards)]
        found = [{"step": e["step"], **{n: e[n] for n in names if n in e}} for e in history if "reward" in e]
        return {"rewards": found}

    @property
    def trainer_class(self) -> Any:
        from hfstrat.objectives.reinforcement.trainer import GrpoTrainer

        return partial(GrpoTrainer, section=self.section)
