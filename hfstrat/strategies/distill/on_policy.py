"""On-policy distillation (arXiv 2306.13649): the student is trained on its own answers, with the loss of TRL's
DistillationTrainer and our order of examples, evaluation and checkpoints.

In each step the student answers the prompts of the batch, sampling at `temperature`; for each sampled token the teacher's full
distribution is compared with its own. Evaluation is on the answers of the data, as in every other run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from trl import DistillationConfig, DistillationTrainer

from hfstrat.recipe.distill import Distill
from hfstrat.strategies.distill.sequence import prompt_ids
from hfstrat.trainer.generating import GeneratingTrainer

BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # TRL's names for them
REMARK = (
    "on-policy with TRL's DistillationTrainer: only the prompts of the data are used. The training loss is the divergence "
    "(without the factor T^2) on the student's answers, the evaluation loss is on the answers of the data; tokens/s counts "
    "prompts and generated tokens; each process samples its own answers"
)


class Prompts(Dataset[dict[str, list[int]]]):
    """The ids before the last answer of each example, in the format of TRL."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        return {"prompt": prompt_ids(self.rows[place], "on_policy: true")}


class RepeatSampler(Sampler[int]):
    """Repeats each group of `size` indices `times`: TRL takes all examples of a step for each micro-batch, and generates at the
    first."""

    def __init__(self, order: Any, size: int, times: int) -> None:
        self.order, self.size, self.times = order, size, times

    def begin(self, step: int) -> None:
        self.order.begin(step)

    def __len__(self) -> int:
        return len(self.order) * self.times

    def __iter__(self) -> Iterator[int]:
        numbers = iter(self.order)
        while step := list(islice(numbers, self.size)):
            for _ in range(self.times):
                yield from step


class _Trl(DistillationTrainer):  # type: ignore[misc]
    """TRL's trainer without arguments that it does not take."""

    def __init__(self, *, data_collator: Any, compute_loss_func: Any, compute_metrics: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compute_metrics, self.collate = compute_metrics, data_collator


class OnPolicyTrainer(GeneratingTrainer, _Trl):
    """TRL's training step in our Trainer, with our order of examples, evaluation and checkpoints."""

    start_counts = False  # the evaluation loss is on answers that the student is not trained on

    def __init__(
        self, *, distill: Distill, args: TrainingArguments, train_dataset: Any, sampler: Any, **arguments: Any
    ) -> None:
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        theirs_too = {
            "beta": BETA[distill.divergence],
            "temperature": distill.temperature,
            "max_completion_length": distill.max_new_tokens,
            "gradient_checkpointing": False,
            "load_best_model_at_end": False,  # in the constructor it restricts save_steps
        }
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        super().__init__(
            args=DistillationConfig(**{**given, **theirs_too}),
            train_dataset=Prompts(train_dataset),
            sampler=RepeatSampler(sampler, size, args.gradient_accumulation_steps),
            **arguments,
        )
        self.args.load_best_model_at_end = args.load_best_model_at_end
