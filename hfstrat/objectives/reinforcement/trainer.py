"""Group relative policy optimization: TRL's GRPOTrainer in our Trainer, with our order of examples, evaluation and checkpoints.

TRL's are the step (sampling, rewards, advantages, loss) and its metrics. Ours are the order of the prompts, their token ids,
evaluation by greedy answers, and checkpoints. Each step samples its own answers, so a resumed run samples what an uninterrupted
one does where the sampling itself is reproducible: with transformers' generation, not with vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from rich.markup import escape
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from hfstrat.data.prompts import GIVEN
from hfstrat.objectives.reinforcement.rewards import Scorer
from hfstrat.recipe.objectives import Grpo
from hfstrat.trainer.generating import GeneratingTrainer

SAME = (  # keys of the recipe that TRL's config has under the same name
    *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "loss_type", "scale_rewards", "epsilon"),
    *("epsilon_high", "mask_truncated_completions", "use_vllm", "vllm_mode"),
)
FLAT_STEPS = 10  # steps without any difference between rewards, after which this is said
FILE = "generations.jsonl"  # in the output folder: answers that were sampled in training
WRITTEN = 8  # answers of each log
SHOWN = 160  # characters of an answer in a line


class Prompts(Dataset[dict[str, Any]]):
    """The ids of each prompt with what its answers are scored by, in the format of TRL."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return {"prompt": [int(token) for token in row["input_ids"]], GIVEN: row[GIVEN]}


class GroupSampler(Sampler[int]):
    """The prompts of our order, each once for every answer.

    TRL takes all prompts of a step for each of its forward passes, and generates at the first, so a step is repeated.

    Args:
        order: the prompts of all steps.
        size: prompts of a step.
        answers: to each prompt.
        passes: of a step.
    """

    def __init__(self, order: Any, size: int, answers: int, passes: int) -> None:
        self.order, self.size, self.answers, self.passes = order, size, answers, passes

    def begin(self, step: int) -> None:
        self.order.begin(step)

    def __len__(self) -> int:
        return len(self.order) * self.answers * self.passes

    def __iter__(self) -> Iterator[int]:
        numbers = iter(self.order)
        while step := list(islice(numbers, self.size)):
            for _ in range(self.passes):
                yield from (number for number in step for _ in range(self.answers))


class _Trl(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer without arguments that it does not take."""

    def __init__(self, *, data_collator: Any, compute_loss_func: Any, compute_metrics: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compute_metrics, self.collate = compute_metrics, data_collator


class GrpoTrainer(GeneratingTrainer, _Trl):
    """TRL's training step in our Trainer.

    Args:
        section: of the recipe.
        args: of our plan, whose batches count prompts.
        train_dataset: token rows of prompts.
        sampler: the prompts of all steps, in order.
    """

    def __init__(
        self, *, section: Grpo, args: TrainingArguments, train_dataset: Any, sampler: Any, model: Any, **arguments: Any
    ) -> None:
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        theirs = {name: getattr(section, name) for name in SAME}
        theirs["per_device_train_batch_size"] = args.per_device_train_batch_size * section.num_generations
        theirs |= {"num_generations_eval": 1, "load_best_model_at_end": False}  # evaluation is ours
        theirs |= {"gradient_checkpointing": False, "reward_weights": [reward.weight for reward in section.rewards]}
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.scorer = Scorer(section, arguments["processing_class"])
        weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(
            args=GRPOConfig(**{**given, **theirs}),
            train_dataset=train_dataset,
            sampler=GroupSampler(sampler, size, section.num_generations, args.gradient_accumulation_steps),
            model=model,
            reward_funcs=[self._reward(place) for place in range(len(section.rewards))],
            **arguments,
        )
        self.args.load_best_model_at_end = args.load_best_model_at_end  # in the constructor it restricts save_steps
        self.train_dataset = Prompts(train_dataset)
        for name, parameter in model.named_parameters():
            if name in weights:  # TRL stores an adapter on a quantized model in bfloat16
                parameter.data = weights[name]
        self._keep_reference(section.beta)
        self._flat, self._warned, self._has_trimmed = 0, False, False

    @property
    def eval_collator(self) -> Any:
        return self.collate

    @property
    def evaluates_its_loss(self) -> bool:
        return True  # the rewards; the loss of a step is TRL's

    def _keep_reference(self, beta: float) -> None:
        """The initial weights, from which the divergence is measured: those below an adapter, or a copy of the model.

        TRL would read the model's folder again, and give an adapter a second copy.
        """
        self.beta = self.args.beta = beta
        if beta and not is_peft_model(self.model):
            self.ref_model = deepcopy(self.model).eval().requires_grad_(False)
            add_fused_lm_head(self.ref_model, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

    def _reward(self, place: int) -> Callable[..., list[float | None]]:
        def reward(*, completion_ids: list[list[int]], **of_trl: Any) -> list[float | None]:
            given = [json.loads(text) for text in of_trl[GIVEN]]
            further = {name: of_trl[name] for name in ("trainer_state", "log_extra", "log_metric")}
            return self.scorer.score(place, given, completion_ids, **further)

        reward.__name__ = self.scorer.names[place]
        return reward

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """In the precision of the forward pass: `generate` does not go through the wrapper that sets it."""
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """With activation checkpointing off, block by block: TRL would turn it on again for all blocks, frozen ones too."""
        blocks = [module for module in self.model.modules() if getattr(module, "gradient_checkpointing", False)]
        for block in blocks:
            block.gradient_checkpointing = False
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            for block in blocks:
                block.gradient_checkpointing = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        seen = self._metrics["train"]
        if self.model.training and "loss" in logs:
            pairs = zip(seen["frac_reward_zero_std"], seen["reward"], strict=True)
            self._note_flat([1.0 if math.isnan(reward) else share for share, reward in pairs])
        for name in [name for name, values in seen.items() if values and all(map(math.isnan, values))]:
            del seen[name]  # a reward that applied to no answer; trackers refuse None
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            self._write_generations()

    def _note_flat(self, shares: list[float]) -> None:
        """Say it where the answers to each prompt have had the same reward for many steps: there is nothing to learn from."""
        for share in shares:
            self._flat = self._flat + 1 if share == 1.0 else 0
        if self._flat >= FLAT_STEPS and not self._warned:
            self._warned = True
            self.print_line(
                f"{'warning':<9} in the last {self._flat} steps all answers to each prompt had the same reward, so there was "
                "no gradient: make a reward easier or add one for a part of it, raise objective.temperature or "
                "objective.num_generations, or train with objective: sft first"
            )

    def _sampled(self) -> list[dict[str, Any]]:
        """Answers of the latest step: prompt, answer, its rewards and its advantage."""
        tokenizer, logs = self.processing_class, self._logs
        rewards = [dict(zip(logs["rewards"], values, strict=True)) for values in zip(*logs["rewards"].values(), strict=True)]
        rows = zip(logs["prompt"], logs["completion"], rewards, logs["advantages"], strict=True)
        return [
            {"prompt": tokenizer.decode(ids), "completion": text, "rewards": scores, "advantage": advantage}
            for ids, text, scores, advantage in islice(rows, self.args.generation_batch_size)
        ]

    def _write_generations(self) -> None:
        """Add some answers of the latest step to a file, in place of those of an interrupted run from this step on."""
        file, step = Path(str(self.args.output_dir)) / FILE, self.state.global_step
        found = self._sampled()
        chosen = found[:: max(1, len(found) // WRITTEN)][:WRITTEN]
        lines = [json.dumps({"step": step, **_finite(row)}, ensure_ascii=False) for row in chosen]
        try:
            if not self._has_trimmed:
                before = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
                file.write_text("".join(f"{line}\n" for line in before if _step_of(line) < step), encoding="utf-8")
                self._has_trimmed = True
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
        except OSError as error:  # the run does not depend on it
            self.print_line(f"{'warning':<9} {FILE} was not written: {error}")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._in_steps and self.is_world_process_zero() and (sampled := self._sampled()):
            best, worst = (choose(sampled, key=lambda row: row["advantage"]) for choose in (max, min))
            for one in (best, worst) if best["advantage"] > worst["advantage"] else (best,):
                text = json.dumps(one["completion"][:SHOWN], ensure_ascii=False)
                scores = ", ".join(f"{name} {value:.2f}" for name, value in one["rewards"].items())
                self.print_line(escape(f"{'sampled':<9} {scores}: {text}"))
        found = super().evaluate(*args, **kwargs)
        if self.state.global_step == 0 and not any(value for name, value in found.items() if name.startswith("eval_rewards/")):
            self.print_line(
                f"{'warning':<9} no answer earned a reward before training, and there is nothing to learn from where none ever "
                "does: show the form of an answer in the prompt, or train with objective: sft on good answers first"
            )
        return found


def _step_of(line: str) -> float:
    """The step of a line of the file; infinity where the line is not complete."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row with null for rewards that do not apply."""
    return row | {"rewards": {name: None if math.isnan(value) else value for name, value in row["rewards"].items()}}
